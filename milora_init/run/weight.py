"""Split one weight: read it, solve, and write residual and factors.

A WeightJob holds paths and numbers and no tensors, and its result is a record. So the same job runs on a thread of
this process, on a GPU, or on another machine that sees the same disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch

from milora_init.checkpoint.dequantise import QuantisedSource
from milora_init.checkpoint.dtypes import TORCH_DTYPES
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.checkpoint.writer import WriteTarget
from milora_init.errors import SolveError
from milora_init.linalg.split import Split, split
from milora_init.manifest import WeightRecord
from milora_init.methods import Factors, Mode
from milora_init.plan.output_files import ShardJob
from milora_init.plan.weights import WeightPlan
from milora_init.run.adapter_file import part_key
from milora_init.run.dense import locate
from milora_init.run.pool import DeviceLock
from milora_init.run.progress import Progress
from milora_init.run.shard import ShardWriter


@dataclass(frozen=True, slots=True)
class WeightJob:
    """Split the weight at `source` and write its parts to `residual`, `A` and `B`; no residual if that is None."""

    plan: WeightPlan
    source: TensorSource | QuantisedSource
    residual: WriteTarget | None
    A: WriteTarget
    B: WriteTarget
    mode: Mode
    factors: Factors
    nf4_rounds: int = 0


def weight_jobs(job: ShardJob, shard: ShardWriter[WeightRecord]) -> list[WeightJob]:
    """One job for each weight of a shard, the largest first, so that no long one is left for the end."""
    jobs = []
    for plan in sorted(job.splits, key=lambda plan: -math.prod(plan.weight.shape)):
        weight = plan.weight
        source = locate(weight.tensor, job, shard)
        residual = shard.target(weight.tensor) if job.header else None
        jobs.append(
            WeightJob(
                plan=plan,
                source=source if weight.row is None else source.at(weight.row),
                residual=residual if weight.row is None or residual is None else residual.at(weight.row),
                A=shard.part_target(part_key(weight.module, "A")),
                B=shard.part_target(part_key(weight.module, "B")),
                mode=job.mode,
                factors=job.factors,
                nf4_rounds=job.nf4_rounds,
            )
        )
    return jobs


def run(job: WeightJob, device: torch.device, device_lock: DeviceLock, progress: Progress) -> WeightRecord:
    """Do a job on a device: a task of the `SolverPool`.

    Reading, writing, and copying to and from the device happen without the lock, solving with it. So while one thread
    solves, another one reads the next weight or writes the last one.

    Raises:
        CheckpointError: The weight cannot be read.
        SolveError: It cannot be split, its residual does not fit the dtype, or the GPU failed.
        OutputError: The result cannot be written.
    """
    with gpu_errors(job.source, device), ExitStack() as files:
        write_residual = files.enter_context(job.residual.opened()) if job.residual else None
        write_A, write_B = files.enter_context(job.A.opened()), files.enter_context(job.B.opened())
        read_started = time.monotonic()
        pinned = device.type == "cuda"
        W = read_weight(job.source, pinned=pinned)
        # If the GPU is full now, W is copied after the lock is taken, when the other thread's weight has left the GPU.
        with suppress(torch.OutOfMemoryError):
            W = W.to(device, non_blocking=pinned)
        read_ended = time.monotonic()
        with device_lock:
            progress.solving(job.plan.weight.module, str(device))
            solve_started = time.monotonic()
            result, solved_on = _split_or_retry(job, W, device)
            solve_ended = time.monotonic()
        del W
        if write_residual:
            write_residual(_on_cpu(result.residual.mT if job.plan.weight.transposed else result.residual))
        write_A(_on_cpu(result.A))
        write_B(_on_cpu(result.B))
    written = time.monotonic()
    seconds = {
        "read_s": read_ended - read_started,
        "elapsed_s": solve_ended - solve_started,
        "write_s": written - solve_ended,
    }
    record = _record(job, result, solved_on, seconds)
    progress.tensor(job.source.name, job.source.size_bytes)
    return record


@contextmanager
def gpu_errors(source: TensorSource | QuantisedSource, device: torch.device) -> Iterator[None]:
    """Raise a SolveError for what a GPU raises. Its errors come late: any call may raise them."""
    try:
        yield
    except RuntimeError as error:
        # The command line explains an OutOfMemoryError (errors.explain), on a GPU too.
        if device.type == "cpu" or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).partition("\n")[0]
        raise SolveError(
            f"{source.name} in {source.path}: {device} failed: {reason}",
            hint="run the same command again to resume, or with --device cpu",
        ) from error


def read_weight(source: TensorSource | QuantisedSource, *, pinned: bool) -> torch.Tensor:
    """The weight, in page-locked memory if `pinned` and if the machine has enough of it."""
    if pinned:
        with suppress(RuntimeError):
            return source.read(pinned=True)
    return source.read()


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU. From a GPU it is copied into page-locked memory, which is several times as fast."""
    if not tensor.is_cuda:
        return tensor.cpu()
    try:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # page-locked memory is limited
        return tensor.cpu()
    return buffer.copy_(tensor)


def _split_or_retry(job: WeightJob, W: torch.Tensor, device: torch.device) -> tuple[Split, str]:
    """The parts of a weight, and the device that they were computed on, in words.

    Without memory on the GPU it is tried again there, with an empty cache, and then on the CPU.
    """
    plan = job.plan

    def attempt(device: torch.device) -> Split:
        on_device = W.to(device)
        on_device = on_device.mT if plan.weight.transposed else on_device
        return split(
            on_device,
            plan.rank,
            scale=plan.scale,
            mode=job.mode,
            factors=job.factors,
            dtype=TORCH_DTYPES[plan.dtype],
            seed=plan.seed,
            nf4_rounds=job.nf4_rounds,
        )

    try:
        for _ in range(2):
            try:
                return attempt(device), str(device)
            except torch.OutOfMemoryError:
                # No other thread solves on this device: what else fills it is a waiting weight, and torch's cache.
                torch.cuda.empty_cache()
        return attempt(torch.device("cpu")), f"cpu, because {device} ran out of memory"
    except ValueError as error:
        raise SolveError(
            f"{job.source.name} in {job.source.path}: {error}",
            hint="--dtype float32"
            if "overflows" in str(error) and plan.dtype != "F32"
            else "repair the checkpoint, or --exclude the module",
        ) from error


def _record(job: WeightJob, result: Split, solved_on: str, seconds: dict[str, float]) -> WeightRecord:
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
        source_dtype=torch_name(plan.source_dtype),
        dtype=torch_name(plan.dtype),
        rank=plan.rank,
        scale=plan.scale,
        s_first=s[0],
        s_last=s[-1],
        s_max=triplets.s_max,
        energy=result.energy,
        # Only balanced factors contain sqrt(s): where s is near 0, B and A are too, and get no gradient.
        untrainable=sum(value < 1e-6 * triplets.s_max or value == 0 for value in s) if job.factors == "balanced" else 0,
        certificate=triplets.certificate,
        rounding=result.rounding,
        device=solved_on,
        **{name: round(value, 4) for name, value in seconds.items()},
    )
