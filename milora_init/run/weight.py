"""Split one weight: read it, solve, and write residual and factors.

A WeightJob holds paths and numbers and no tensors, and its result is a record. So the same job runs on a thread of
this process, on a GPU, or on another machine that sees the same disk.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from milora_init.checkpoint.header import DTYPES, torch_name
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.checkpoint.writer import WriteTarget
from milora_init.errors import SolveError
from milora_init.linalg.split import Split, split
from milora_init.manifest import WeightRecord
from milora_init.modes import Mode
from milora_init.plan.weights import WeightPlan


@dataclass(frozen=True, slots=True)
class WeightJob:
    """Split the weight at `source` and write its parts to `residual`, `A` and `B`."""

    plan: WeightPlan
    source: TensorSource
    residual: WriteTarget
    A: WriteTarget
    B: WriteTarget
    mode: Mode


def run(job: WeightJob, device: torch.device, device_lock: AbstractContextManager[Any]) -> WeightRecord:
    """Do a job on a device.

    Reading, copying to and from the device and writing happen outside `turn`, the split inside: while one worker of a
    device has its turn, another reads the next weight or writes the last one.

    Raises:
        CheckpointError: The weight cannot be read.
        SolveError: It cannot be decomposed, or its residual does not fit the dtype.
        OutputError: The result cannot be written.
    """
    with job.residual.opened() as write_residual, job.A.opened() as write_A, job.B.opened() as write_B:
        began = time.monotonic()
        pinned = device.type == "cuda"
        W = job.source.read(pinned=pinned)
        with suppress(torch.OutOfMemoryError):  # then it goes there in its turn, when the other hand's has left
            W = W.to(device, non_blocking=pinned)
        read = time.monotonic()
        with device_lock:
            started = time.monotonic()
            result, where = _split(job, W, device)
            solved = time.monotonic()
        del W
        write_residual(_on_cpu(result.residual.mT if job.plan.weight.transposed else result.residual))
        write_A(_on_cpu(result.A))
        write_B(_on_cpu(result.B))
    written = time.monotonic()
    return _record(job, result, where, read_s=read - began, elapsed_s=solved - started, write_s=written - solved)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, by way of page-locked memory where it comes from a GPU: several times as fast."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def _split(job: WeightJob, W: torch.Tensor, device: torch.device) -> tuple[Split, str]:
    plan = job.plan

    def attempt(device: torch.device) -> Split:
        there = W.to(device)
        there = there.mT if plan.weight.transposed else there
        dtype = DTYPES[job.residual.dtype]
        return split(there, plan.rank, scale=plan.scale, mode=job.mode, dtype=dtype, seed=plan.seed)

    try:
        try:
            return attempt(device), str(device)
        except torch.OutOfMemoryError:
            # This worker has the device's turn: what else lies there waits or is cached.
            torch.cuda.empty_cache()
        try:
            return attempt(device), str(device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        return attempt(torch.device("cpu")), f"cpu, because {device} ran out of memory"
    except ValueError as error:
        raise SolveError(
            f"{job.source.name} in {job.source.path}: {error}",
            hint="--dtype float32"
            if "overflows" in str(error) and job.residual.dtype != "F32"
            else "repair the checkpoint, or --exclude the module",
        ) from error


def _record(job: WeightJob, result: Split, where: str, **seconds: float) -> WeightRecord:
    plan, weight, triplets = job.plan, job.plan.weight, result.triplets
    s = triplets.s.tolist()
    m, n = result.residual.shape
    return WeightRecord(
        module=weight.module,
        tensor=weight.tensor,
        shape=(m, n),
        transposed=weight.transposed,
        row=weight.row,
        expert=weight.expert,
        key=plan.key,
        source_dtype=torch_name(job.source.dtype),
        dtype=torch_name(job.residual.dtype),
        rank=plan.rank,
        scale=plan.scale,
        s_first=s[0],
        s_last=s[-1],
        s_max=triplets.s_max,
        energy=result.rounding.component**2,
        untrainable=sum(value < 1e-6 * triplets.s_max or value == 0 for value in s),
        certificate=dataclasses.asdict(triplets.certificate),
        rounding=dataclasses.asdict(result.rounding),
        device=where,
        **{name: round(value, 4) for name, value in seconds.items()},
    )
