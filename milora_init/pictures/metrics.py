"""The figures that pages and plots show: of a weight that was scanned, and of one that was split."""

from __future__ import annotations

import math
from collections.abc import Sequence

from milora_init.accuracy import SolverPath
from milora_init.manifest import Manifest, WeightRecord
from milora_init.pictures.grid import Metric
from milora_init.report import component_error, duration, percent
from milora_init.spectra import RankFigures, WeightSpectrum

_PATHS: Sequence[SolverPath] = ("mixed", "lanczos", "eigh", "svd")


def number(value: float) -> str:
    """A figure as text: 1340, 0.0123, 1.3e+06, infinite."""
    return "infinite" if math.isinf(value) else f"{value:.3g}"


def seconds(value: float) -> str:
    """A time as text, with digits for short ones."""
    return f"{value:.2g} s" if value < 1 else duration(value)


def scan_metrics(rank: int) -> list[Metric[WeightSpectrum]]:
    """The figures of a scan, at one rank."""

    def at(weight: WeightSpectrum, name: str) -> float | None:
        figures = weight.at(rank)
        value = None if figures is None else getattr(figures, name)
        return None if value is None else float(value)

    def leak(weight: WeightSpectrum) -> float | None:
        figures: RankFigures | None = weight.at(rank)
        return None if figures is None else figures.leak.get(weight.dtype)

    return [
        Metric("energy-min", f"energy, {rank} smallest", f"Share of the {rank} smallest singular triplets in the "
               "weight's squared norm: what MiLoRA would adapt.", lambda w: at(w, "energy_min"), percent),
        Metric("energy-max", f"energy, {rank} largest", f"Share of the {rank} largest singular triplets in the "
               "weight's squared norm: what PiSSA would adapt.", lambda w: at(w, "energy_max"), percent,
               scale="linear"),
        Metric("leak", "leak", f"Estimate of the part of the {rank} smallest triplets that rounding to the weight's "
               "dtype would leave in the base.", leak, percent, "max"),
        Metric("condition", "condition", "Largest singular value over the smallest.", lambda w: w.kappa, number, "max"),
        Metric("s-max", "s_max", "Largest singular value.", lambda w: w.s_max, number, "max"),
        Metric("stable-rank", "stable rank", "Squared Frobenius norm over the squared largest singular value.",
               lambda w: w.stable_rank, number),
        Metric("effective-rank", "effective rank", "Exponential of the entropy of the singular values.",
               lambda w: w.effective_rank, number),
        Metric("gap", "gap at the cut", f"Relative gap between the {rank} smallest singular values and the next one.",
               lambda w: at(w, "gap_min"), number, "min"),
        Metric("time", "init's time", "Estimate of the time to find the triplets.", lambda w: at(w, "init_s"), seconds,
               "sum"),
    ]  # fmt: skip


def report_metrics(manifest: Manifest) -> list[Metric[WeightRecord]]:
    """The figures of a finished run."""

    def condition(weight: WeightRecord) -> float | None:
        return weight.s_max / weight.s_last if weight.s_last > 0 else math.inf

    found: list[Metric[WeightRecord]] = [
        Metric("energy", "energy", "The component's share of the weight's squared norm.", lambda w: w.energy, percent),
        Metric("leak", "leak", "The part of the component that rounding leaves in the base.", lambda w: w.rounding.leak,
               percent, "max"),
        Metric("error", "step-0 error", "Distance of base and component from the weight, relative to the weight.",
               lambda w: w.rounding.error, percent, "max"),
        Metric("certified", "certified", "Proven bound of the component's relative error.", component_error,
               lambda value: f"{value:.0e}" if math.isfinite(value) else "not unique", "max"),
        Metric("solver", "solver", "The algorithm: mixed precision, Lanczos, all eigenvectors, or a full SVD.",
               lambda w: float(_PATHS.index(w.certificate.path)) if w.certificate.path in _PATHS else None,
               lambda value: _PATHS[round(value)], "max", "linear"),
        Metric("time", "time", "Seconds for solving.", lambda w: w.elapsed_s, seconds, "sum"),
    ]  # fmt: skip
    if not manifest.method.writes_base:  # nothing is rounded
        found = [metric for metric in found if metric.key not in ("leak", "error")]
    if manifest.method.mode == "min":
        of_weight = Metric(
            "condition", "condition", "Largest singular value over the smallest.", condition, number, "max"
        )
        found.insert(len(found) - 3, of_weight)
    return found
