"""Scan a model: the singular spectrum of every weight, streamed like a run, and nothing is written.

The plan is that of an adapter alone: it names the files and the weights, and which of them are still on the Hub. Each
weight is read once, on the threads of a `SolverPool`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from array import array
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from milora_init.checkpoint.dequantise import QuantisedSource
from milora_init.checkpoint.files import stamp
from milora_init.checkpoint.folder import RemoteFiles
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.tensor_file import TensorSource, open_shard
from milora_init.errors import CheckpointError, PlanError, SolveError, UsageError
from milora_init.hub.source import fetch_file
from milora_init.linalg.cost import solve_flops, solve_memory_bytes
from milora_init.linalg.spectrum import effective_rank, energy, estimated_leaks, gap, singular_values, stable_rank
from milora_init.options import InitOptions, measured_target
from milora_init.plan.output_files import ShardJob
from milora_init.plan.plan import Plan, make_plan
from milora_init.plan.weights import WeightPlan
from milora_init.run.dense import locate
from milora_init.run.devices import multiply_rate, resolve_devices
from milora_init.run.pool import DeviceLock, SolverPool, weights_at_once
from milora_init.run.prefetch import Prefetcher
from milora_init.run.progress import Progress
from milora_init.run.weight import gpu_errors, read_weight
from milora_init.spectra import CURVE_POINTS, RankFigures, ScanResult, WeightSpectrum

_METHOD = "mica"  # its plan writes no base, and reads no tensor but the weights


@dataclass(frozen=True, slots=True)
class _Job:
    """Find the spectrum of the weight at `source`."""

    plan: WeightPlan
    source: TensorSource | QuantisedSource
    ranks: tuple[int, ...]
    keep_all: bool  # all singular values, and not the curve alone
    rate: float  # multiply-adds per second, for the estimate of init's time


def scan_options(options: InitOptions) -> InitOptions:
    """The options whose plan lists the weights to scan: the model and the targets of `options`."""
    return dataclasses.replace(
        options, out="scan", rank=1, method=_METHOD, mode=None, rank_pattern={}, alpha_pattern={}, alpha=None,
        dtype="auto", task_type=None, low_disk=False, push_to_hub=None,
    )  # fmt: skip


def scan(
    options: InitOptions,
    folder: Path,
    remote: RemoteFiles | None,
    *,
    ranks: Sequence[int],
    spectrum: bool = False,
    progress: Progress | None = None,
) -> ScanResult:
    """Scan the weights that the options name.

    Args:
        options: The model, the targets and the devices.
        folder: The folder of the model, or its snapshot in the cache of the Hub.
        remote: For a snapshot, the files that are on the Hub.
        ranks: The ranks to give figures for.
        spectrum: Keep all singular values.
        progress: Receives the events.

    Raises:
        CheckpointError, PlanError, SolveError: The model cannot be read, does not fit the options, or has a weight with
            NaN or Inf entries.
        UsageError: A device that this machine does not have.
        HubError: The Hub refused, or cannot be reached.
    """
    progress = progress or Progress()
    started = time.monotonic()
    plan = make_plan(scan_options(options), folder, remote)
    devices = resolve_devices(options.device)
    rate = multiply_rate(devices[0])
    threads = SolverPool.THREADS_PER_DEVICE
    if [device.type for device in devices] == ["cpu"]:
        count = weights_at_once([_memory_bytes(w) for w in plan.weights])
        devices, threads = devices * count, 1 if count > 1 else threads
    wanted = tuple(sorted(set(ranks)))
    widest = max(min(w.weight.shape) for w in plan.weights)
    if wanted[0] > widest:
        raise PlanError(f"rank {wanted[0]} is above the {widest} that the weights allow", hint=f"--rank {widest}")
    found: dict[str, WeightSpectrum] = {}
    finished = 0
    progress.begin(plan, [])
    progress.scanning()

    def finish(job: ShardJob, results: Sequence[Future[WeightSpectrum]]) -> None:
        nonlocal finished
        found.update({result.module: result for result in (future.result() for future in results)})
        if changed := next((path for path, planned in job.stamps.items() if stamp(path) != planned), None):
            hint = "wait until nobody writes to it, and run again"
            raise CheckpointError(f"{changed} changed during the scan", hint=hint)
        finished += 1
        progress.scanned(job.source.name, len(results), finished, len(plan.jobs), time.monotonic() - started)

    with (
        SolverPool(devices, threads_per_device=threads, progress=progress) as pool,
        _prefetcher(plan, progress) as prefetcher,
    ):
        # A job is a small value: all of them may wait in the pool, and a file that is slow keeps no device waiting.
        begun: deque[tuple[ShardJob, list[Future[WeightSpectrum]]]] = deque()
        for planned in plan.jobs:
            job = prefetcher.take(planned).result()
            begun.append((job, [pool.submit(_run, task) for task in _jobs(job, wanted, spectrum, rate)]))
            while begun and all(future.done() for future in begun[0][1]):
                finish(*begun.popleft())
        while begun:
            finish(*begun.popleft())
    return ScanResult(
        model=options.model,
        revision=remote.commit if remote else None,
        architecture=plan.structure.architecture,
        ranks=wanted,
        weights=tuple(found[w.weight.module] for w in plan.weights),
        notes=tuple(_notes(plan, wanted)),
        elapsed_s=round(time.monotonic() - started, 3),
    )


def measured_targets(
    options: InitOptions, folder: Path, remote: RemoteFiles | None, *, progress: Progress | None = None
) -> dict[str, tuple[str, ...]]:
    """The modules that each measured target of the options means, by the target; empty if there is none.

    `kappa:P` are the share P of the linear layers with the lowest condition numbers, as in PEFT's
    `find_kappa_target_modules` (KappaTune, arXiv 2506.16289); `energy:P` those whose component has the largest share of
    the weight's squared norm. The candidates are those of `all-linear`, without what `exclude` names.

    Raises:
        UsageError: `energy` for a method that takes neither the smallest nor the largest triplets.
        CheckpointError, PlanError, SolveError, HubError: As `scan`.
    """
    asked = {target: found for target in options.target or () if (found := measured_target(target))}
    if not asked:
        return {}
    mode = options.effective_method.mode
    if mode not in ("min", "max") and any(figure == "energy" for figure, _ in asked.values()):
        hint = "name the modules, or choose by kappa"
        raise UsageError(f"energy is known of the smallest and the largest triplets, not of `{mode}`", hint=hint)
    candidates = dataclasses.replace(options, target=("all-linear",))
    result = scan(candidates, folder, remote, ranks=[1, options.rank], progress=progress)
    chosen = {}
    for target, (figure, share) in asked.items():
        if figure == "kappa":
            ordered = sorted(result.weights, key=lambda weight: weight.kappa)
        else:
            energies = {w.module: getattr(w.at(options.rank), f"energy_{mode}", -1.0) for w in result.weights}
            ordered = sorted(result.weights, key=lambda weight: -float(energies[weight.module]))
        chosen[target] = tuple(weight.module for weight in ordered[: max(1, int(share * len(ordered)))])
    return chosen


def _memory_bytes(w: WeightPlan) -> int:
    m, n = w.weight.shape
    return solve_memory_bytes(max(m, n), min(m, n), min(m, n), "min", 2 * m * n * 4)


def _prefetcher(plan: Plan, progress: Progress) -> Prefetcher:
    """Downloads the files that are still on the Hub into its cache."""
    remote, headers = plan.checkpoint.remote, plan.checkpoint.headers
    absent = set(remote.absent) if remote else set()
    if remote and plan.absent:
        from milora_init.hub.download import require_cache_space

        require_cache_space(dataclasses.replace(remote, absent=plan.absent), plan.source)

    def fetch(job: ShardJob) -> Path:
        name = job.source.name
        for other in {place.path.name for place in job.elsewhere.values()} & absent:  # parts of quantised weights
            fetch_file(plan.options, remote, other, None)
        progress.fetching(name, headers[name].file_bytes)
        return fetch_file(plan.options, remote, name, None)

    return Prefetcher(plan.jobs, {name: [header.raw] for name, header in headers.items()}, fetch)


def _jobs(job: ShardJob, ranks: tuple[int, ...], keep_all: bool, rate: float) -> Iterator[_Job]:
    """One job for each weight of a file, the largest first."""
    with open_shard(job.source) as shard:
        for plan in sorted(job.splits, key=lambda plan: -math.prod(plan.weight.shape)):
            source = locate(plan.weight.tensor, job, shard)
            row = plan.weight.row
            yield _Job(plan, source if row is None else source.at(row), ranks, keep_all, rate)


def _run(job: _Job, device: torch.device, device_lock: DeviceLock, progress: Progress) -> WeightSpectrum:
    """Do a job on a device: a task of the `SolverPool`. Raises CheckpointError, SolveError."""
    weight = job.plan.weight
    with gpu_errors(job.source, device):
        W = read_weight(job.source, pinned=device.type == "cuda")
        with device_lock:
            progress.solving(weight.module, str(device))
            started = time.monotonic()
            s = _values(job, W, device)
    W = W.mT if weight.transposed else W
    found = _spectrum(job, W, s, started)
    progress.tensor(job.source.name, job.source.size_bytes)
    return found


def _values(job: _Job, W: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The singular values; those of a weight that is too large for a GPU are found on the CPU."""
    try:
        with suppress(torch.OutOfMemoryError):
            return singular_values(W.to(device))
        torch.cuda.empty_cache()
        return singular_values(W)
    except ValueError as error:
        raise SolveError(
            f"{job.source.name} in {job.source.path}: {error}", hint="repair the checkpoint, or --exclude the module"
        ) from error


def _spectrum(job: _Job, W: torch.Tensor, s: torch.Tensor, started: float) -> WeightSpectrum:
    weight, q = job.plan.weight, s.numel()
    ranks = [rank for rank in job.ranks if rank <= q]
    leaks = estimated_leaks(W, [float(s[q - rank :].norm()) for rank in ranks], job.plan.seed)
    p = max(weight.shape)
    figures = tuple(
        RankFigures(
            rank=rank,
            energy_min=energy(s, slice(q - rank, q)),
            energy_max=energy(s, slice(rank)),
            gap_min=gap(s, q - rank),
            gap_max=gap(s, rank),
            leak=leak,
            init_s=round(solve_flops(p, q, rank, "min") / job.rate, 4),
        )
        for rank, leak in zip(ranks, leaks, strict=True)
    )
    s_max, s_min = float(s[0]), float(s[-1])
    condition = s_max / s_min if s_min > 0 else math.inf
    places = [round(point * (q - 1) / (CURVE_POINTS - 1)) for point in range(CURVE_POINTS)]
    return WeightSpectrum(
        module=weight.module,
        tensor=weight.tensor,
        row=weight.row,
        suffix=weight.suffix,
        shape=weight.shape,
        dtype=torch_name(job.plan.source_dtype),
        s_max=s_max,
        s_min=s_min,
        condition=condition if math.isfinite(condition) else None,
        stable_rank=stable_rank(s),
        effective_rank=effective_rank(s),
        ranks=figures,
        curve=tuple(s[places].tolist()),
        singular_values=array("d", s.tolist()) if job.keep_all else None,
        elapsed_s=round(time.monotonic() - started, 4),
    )


def _notes(plan: Plan, ranks: Collection[int]) -> Iterator[str]:
    """What the scan left out."""
    scanned = {w.weight.module for w in plan.weights}
    if plan.options.target is None:
        candidates = {name for name in plan.structure.adaptable.keys() - plan.structure.heads if not _tower(plan, name)}
        if others := len(candidates - scanned):
            yield f"{others} other linear layers were not scanned; --target all-linear adds them"
    least = min((w.weight for w in plan.weights), key=lambda weight: min(weight.shape))
    if max(ranks) > min(least.shape):
        fewer = sum(min(w.weight.shape) < max(ranks) for w in plan.weights)
        yield (
            f"{least.module} allows rank {min(least.shape)} at most, and init refuses a higher one for it; "
            f"{fewer} weights have no figures of rank {max(ranks)}"
        )
    if plan.structure.experts and not any(w.weight.expert for w in plan.weights):
        count = sum(len(group) for group in plan.structure.experts.values())
        yield f"the {count} matrices of the experts were not scanned; --target experts scans them"
    if skipped := [t for t in plan.structure.towers if not any(name.startswith(f"{t}.") for name in scanned)]:
        yield f"not scanned: {' and '.join(skipped)}; a --target that contains the name adds it"


def _tower(plan: Plan, module: str) -> bool:
    return any(module.startswith(f"{tower}.") for tower in plan.structure.towers)
