"""Split a weight, or a batch of equal ones: read it, solve, and write residual and factors.

A WeightJob holds paths and numbers and no tensors, and its result is a record. So the same job runs on a thread of
this process, on a GPU, or on another machine that sees the same disk.

A GPU solves small weights of one shape in batches, such as the experts of a layer. Which ones are together depends on
the file and the request alone: so they are together again in a run that is resumed, and on any number of GPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch

from milora_init.checkpoint.dequantise import QuantisedSource
from milora_init.checkpoint.dtypes import TORCH_DTYPES
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.checkpoint.writer import WriteTarget
from milora_init.errors import SolveError
from milora_init.linalg.split import Split, split, split_batch
from milora_init.manifest import WeightRecord
from milora_init.methods import Factors, Mode
from milora_init.plan.output_files import ShardJob
from milora_init.plan.weights import WeightPlan
from milora_init.run.adapter_file import part_key
from milora_init.run.dense import locate
from milora_init.run.pool import DeviceLock
from milora_init.run.progress import Progress
from milora_init.run.shard import ShardWriter

Write = Callable[[torch.Tensor], None]


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


def batches(job: ShardJob, *, on_gpus: bool) -> list[list[WeightPlan]]:
    """The weights of a shard as they are solved together, the largest first, so that no long one is left for the end.

    A CPU solves each alone.
    """
    ordered = sorted(job.splits, key=lambda plan: -math.prod(plan.weight.shape))
    if not on_gpus or job.nf4_rounds:
        return [[plan] for plan in ordered]
    equal: dict[Hashable, list[WeightPlan]] = {}
    for plan in ordered:
        weight = plan.weight
        alike = (weight.shape, weight.transposed, plan.source_dtype, plan.dtype, plan.rank, plan.scale)
        equal.setdefault(alike, []).append(plan)
    found = []
    for plans in equal.values():
        count = plans[0].most_at_once(job.mode)
        found += [plans[start : start + count] for start in range(0, len(plans), count)]
    return found


def weight_jobs(
    job: ShardJob, shard: ShardWriter[WeightRecord], *, on_gpus: bool = False
) -> list[tuple[WeightJob, ...]]:
    """The jobs of each batch of a shard."""
    return [tuple(_weight_job(plan, job, shard) for plan in plans) for plans in batches(job, on_gpus=on_gpus)]


def _weight_job(plan: WeightPlan, job: ShardJob, shard: ShardWriter[WeightRecord]) -> WeightJob:
    weight = plan.weight
    source = locate(weight.tensor, job, shard)
    residual = shard.target(weight.tensor) if job.header else None
    return WeightJob(
        plan=plan,
        source=source if weight.row is None else source.at(weight.row),
        residual=residual if weight.row is None or residual is None else residual.at(weight.row),
        A=shard.part_target(part_key(weight.module, "A")),
        B=shard.part_target(part_key(weight.module, "B")),
        mode=job.mode,
        factors=job.factors,
        nf4_rounds=job.nf4_rounds,
    )


def run(
    jobs: tuple[WeightJob, ...], device: torch.device, device_lock: DeviceLock, progress: Progress
) -> tuple[WeightRecord, ...]:
    """Do the jobs of a batch on a device: a task of the `SolverPool`.

    Reading, writing, and copying to and from the device happen without the lock, solving with it. So while one thread
    solves, another one reads the next weights or writes the last ones.

    Raises:
        CheckpointError: A weight cannot be read.
        SolveError: One cannot be split, its residual does not fit the dtype, or the GPU failed.
        OutputError: The result cannot be written.
    """
    with gpu_errors(jobs[0].source, device), ExitStack() as files:
        writers = [_writers(job, files) for job in jobs]
        read_started = time.monotonic()
        weights = [_read_to_device(job.source, device) for job in jobs]
        read_ended = time.monotonic()
        with device_lock:
            for job in jobs:
                progress.solving(job.plan.weight.module, str(device))
            solve_started = time.monotonic()
            results = _solve(jobs, weights, device)
            solve_ended = time.monotonic()
        for job, (result, _), (write_residual, write_A, write_B) in zip(jobs, results, writers, strict=True):
            if write_residual:
                write_residual(_on_cpu(result.residual.mT if job.plan.weight.transposed else result.residual))
            write_A(_on_cpu(result.A))
            write_B(_on_cpu(result.B))
    written = time.monotonic()
    times = {
        "read_s": read_ended - read_started,
        "elapsed_s": solve_ended - solve_started,
        "write_s": written - solve_ended,
    }
    seconds = {name: value / len(jobs) for name, value in times.items()}
    records = [_record(job, result, where, seconds) for job, (result, where) in zip(jobs, results, strict=True)]
    for job in jobs:
        progress.tensor(job.source.name, job.source.size_bytes)
    return tuple(records)


def _writers(job: WeightJob, files: ExitStack) -> tuple[Write | None, Write, Write]:
    """The functions that write the residual, if there is one, A and B."""
    residual = files.enter_context(job.residual.opened()) if job.residual else None
    return residual, files.enter_context(job.A.opened()), files.enter_context(job.B.opened())


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
            hint="run the same command again, or with --device cpu: finished files are kept",
        ) from error


def read_weight(source: TensorSource | QuantisedSource, *, pinned: bool) -> torch.Tensor:
    """The weight, in page-locked memory if `pinned` and if the machine has enough of it."""
    if pinned:
        with suppress(RuntimeError):
            return source.read(pinned=True)
    return source.read()


def _read_to_device(source: TensorSource | QuantisedSource, device: torch.device) -> torch.Tensor:
    """The weight on the device; or on the CPU, if the GPU is full.

    Then it is copied after the lock is taken, when the other thread's weights have left the GPU.
    """
    pinned = device.type == "cuda"
    W = read_weight(source, pinned=pinned)
    with suppress(torch.OutOfMemoryError):
        return W.to(device, non_blocking=pinned)
    return W


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU. From a GPU it is copied into page-locked memory, which is several times as fast."""
    if not tensor.is_cuda:
        return tensor.cpu()
    try:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # page-locked memory is limited
        return tensor.cpu()
    return buffer.copy_(tensor)


def _solve(jobs: Sequence[WeightJob], weights: list[torch.Tensor], device: torch.device) -> list[tuple[Split, str]]:
    """The parts of each weight, and the device that they were computed on, in words. The list of weights is emptied.

    Those that the batch does not solve are solved one by one.
    """
    together = _split_together(jobs, weights, device) if len(jobs) > 1 else [None]
    results = []
    for job, made in zip(jobs, together, strict=True):
        W = weights.pop(0)
        results.append((made, str(device)) if made else _split_or_retry(job, W, device))
    return results


def _split_together(
    jobs: Sequence[WeightJob], weights: Sequence[torch.Tensor], device: torch.device
) -> list[Split | None]:
    """The parts of equal weights, None for one that has to be solved alone: all, if the GPU has no memory for them."""
    plan = jobs[0].plan
    for _ in range(2):
        try:
            W = torch.stack([W.to(device) for W in weights])
            return split_batch(
                W.mT if plan.weight.transposed else W,
                plan.rank,
                scale=plan.scale,
                mode=jobs[0].mode,
                factors=jobs[0].factors,
                dtype=TORCH_DTYPES[plan.dtype],
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return [None] * len(jobs)


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
