"""What `scan` says of a model: the singular spectrum of every weight, and the figures that decide rank and targets.

`run.scan` computes these values. This file imports no torch, so that a result can be printed, drawn and tested without.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from milora_init.envelope import envelope
from milora_init.result import Result

DEFAULT_RANKS = (8, 16, 32, 64, 128)
_DEFAULT_RANK = 64  # of init
CURVE_POINTS = 48  # of a spectrum, for pictures


@dataclass(frozen=True, slots=True)
class RankFigures:
    """What a component of r triplets of a weight would be.

    Attributes:
        rank: r.
        energy_min, energy_max: The share of the r smallest or largest triplets in the squared Frobenius norm.
        gap_min, gap_max: The gap at the cut between the component and the rest: the distance of the two singular values
            next to the cut, relative to the larger. None if the component is the whole weight.
        leak: By dtype of the residual: the part of the component of the r smallest triplets that rounding would leave
            in the base, see `accuracy.Rounding.leak`. An estimate: a random component of the same norm takes the place
            of the real one. None if the residual overflows.
        init_s: Estimate of the seconds that one device needs to find the r smallest triplets.
    """

    rank: int
    energy_min: float
    energy_max: float
    gap_min: float | None
    gap_max: float | None
    leak: Mapping[str, float | None]
    init_s: float


@dataclass(frozen=True, slots=True)
class WeightSpectrum:
    """The spectrum of one weight W (m, n), whose singular values are s_1 >= ... >= s_q, q = min(m, n).

    Attributes:
        module, tensor, row: The weight's names in the model and on disk; see `manifest.WeightRecord`.
        suffix: The end of the name, which is the same in all layers.
        shape: (m, n).
        dtype: As stored.
        s_max, s_min: Largest and smallest singular value.
        condition: s_max / s_min; None for infinite.
        stable_rank: ||W||_F^2 / s_max^2.
        effective_rank: exp(H), H the entropy of s / sum(s) (Roy and Vetterli, 2007).
        ranks: The figures of each rank that the weight allows.
        curve: Singular values at evenly spaced indices, from the first to the last, for pictures.
        singular_values: All of them, descending, if they were asked for; else None.
        elapsed_s: Seconds for all of this.
    """

    module: str
    tensor: str
    row: int | None
    suffix: str
    shape: tuple[int, int]
    dtype: str
    s_max: float
    s_min: float
    condition: float | None
    stable_rank: float
    effective_rank: float
    ranks: tuple[RankFigures, ...]
    curve: tuple[float, ...]
    singular_values: Sequence[float] | None
    elapsed_s: float

    def at(self, rank: int) -> RankFigures | None:
        """The figures of a rank; None if the weight does not allow it."""
        return next((figures for figures in self.ranks if figures.rank == rank), None)

    @property
    def kappa(self) -> float:
        """The condition number, as a number that can be compared."""
        return math.inf if self.condition is None else self.condition

    def to_json(self) -> dict[str, Any]:
        """The weight's object in `scan --json`."""
        found = asdict(self)
        del found["curve"]
        if self.singular_values is None:
            del found["singular_values"]
        else:
            found["singular_values"] = list(self.singular_values)
        return {**found, "shape": list(self.shape), "ranks": list(found["ranks"])}


@dataclass(frozen=True, slots=True)
class SpectrumGroup:
    """All weights with the same last part of their name and the same shape, at one rank.

    Attributes:
        suffix, shape, count: The last part of the name, the shape (m, n), the number of weights.
        s_max, condition: The largest of them; the condition is None for infinite.
        stable_rank, effective_rank: Their means.
        energy_min, energy_max: Their means; None if the shape does not allow the rank.
        gap_min: The smallest.
        leak: The largest, in the dtype that the weights have; None if the shape does not allow the rank.
        init_s: The sum.
        curve: The mean curve, by the mean of the logarithms.
    """

    suffix: str
    shape: tuple[int, int]
    count: int
    s_max: float
    condition: float | None
    stable_rank: float
    effective_rank: float
    energy_min: float | None
    energy_max: float | None
    gap_min: float | None
    leak: float | None
    init_s: float | None
    curve: tuple[float, ...]


def spectrum_groups(weights: Iterable[WeightSpectrum], rank: int) -> list[SpectrumGroup]:
    """The rows of the table: weights by suffix and shape, in the model's order."""
    groups: dict[tuple[str, tuple[int, int]], list[WeightSpectrum]] = {}
    for weight in weights:
        groups.setdefault((weight.suffix, weight.shape), []).append(weight)
    return [_group(suffix, shape, group, rank) for (suffix, shape), group in groups.items()]


def _group(suffix: str, shape: tuple[int, int], group: Sequence[WeightSpectrum], rank: int) -> SpectrumGroup:
    at_rank = [(weight.dtype, found) for weight in group if (found := weight.at(rank))]
    figures = [found for _, found in at_rank]
    leaks = [found.leak.get(dtype) for dtype, found in at_rank]
    gaps = [found.gap_min for found in figures if found.gap_min is not None]
    condition = max(weight.kappa for weight in group)
    return SpectrumGroup(
        suffix=suffix,
        shape=shape,
        count=len(group),
        s_max=max(weight.s_max for weight in group),
        condition=condition if math.isfinite(condition) else None,
        stable_rank=statistics.fmean(weight.stable_rank for weight in group),
        effective_rank=statistics.fmean(weight.effective_rank for weight in group),
        energy_min=statistics.fmean(found.energy_min for found in figures) if figures else None,
        energy_max=statistics.fmean(found.energy_max for found in figures) if figures else None,
        gap_min=min(gaps, default=None),
        leak=max((leak for leak in leaks if leak is not None), default=None),
        init_s=sum(found.init_s for found in figures) if figures else None,
        curve=mean_curve([weight.curve for weight in group]),
    )


def mean_curve(curves: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of curves by their logarithms, point by point; 0 where one of them is 0."""
    return tuple(
        math.exp(statistics.fmean(map(math.log, values))) if min(values) > 0 else 0.0
        for values in zip(*curves, strict=True)
    )


@dataclass(frozen=True, slots=True, repr=False)
class ScanResult(Result):
    """What `scan` returns.

    Attributes:
        model, revision: The model as given, and its commit on the Hub.
        architecture: The class that config.json names.
        ranks: The ranks for which each weight has figures.
        weights: Every weight, in the model's order.
        notes: What the scan left out.
        elapsed_s: Seconds for the whole scan.
    """

    model: str
    revision: str | None
    architecture: str
    ranks: tuple[int, ...]
    weights: tuple[WeightSpectrum, ...]
    notes: tuple[str, ...]
    elapsed_s: float

    @property
    def rank(self) -> int:
        """The rank that tables and pictures show: 64, the default of init, or else the largest that has figures."""
        allowed = {figures.rank for weight in self.weights for figures in weight.ranks}
        return _DEFAULT_RANK if _DEFAULT_RANK in allowed else max(allowed)

    @property
    def init_s(self) -> float:
        """Estimate of the seconds that one device needs to initialise all of the weights at `rank`."""
        rank = self.rank
        return sum(figures.init_s for weight in self.weights if (figures := weight.at(rank)))

    def groups(self) -> list[SpectrumGroup]:
        """The weights by suffix and shape, at `rank`."""
        return spectrum_groups(self.weights, self.rank)

    def summary(self) -> Mapping[str, object]:
        worst = max(weight.kappa for weight in self.weights)
        return {
            "model": self.model,
            "weights": len(self.weights),
            "rank": self.rank,
            "condition": f"up to {worst:.2g}",
            "elapsed_s": round(self.elapsed_s, 1),
        }

    def to_json(self) -> dict[str, Any]:
        groups = [asdict(group) for group in self.groups()]
        for group in groups:
            group["shape"] = list(group["shape"])
            del group["curve"]
        return envelope(
            "scan",
            "done",
            source={"model": self.model, "revision": self.revision},
            notes=list(self.notes),
            architecture=self.architecture,
            rank=self.rank,
            ranks=list(self.ranks),
            weight_count=len(self.weights),
            elapsed_s=self.elapsed_s,
            init_s=self.init_s,
            groups=groups,
            weights=[weight.to_json() for weight in self.weights],
        )

    def to_csv(self) -> str:
        """One line for each weight; the figures of a rank r have `_r` at the end of their name."""
        names = ["module", "tensor", "row", "m", "n", "dtype", "s_max", "s_min", "condition", "stable_rank"]
        names += ["effective_rank", "elapsed_s"]
        of_rank = ["energy_min", "energy_max", "gap_min", "gap_max", "init_s"]
        dtypes = list(dict.fromkeys(name for w in self.weights for figures in w.ranks for name in figures.leak))
        columns = [f"{name}_{rank}" for rank in self.ranks for name in (*of_rank, *(f"leak_{d}" for d in dtypes))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, *columns])
        for w in self.weights:
            row: list[object] = [_cell(w.module), _cell(w.tensor), w.row, *w.shape]
            row += [w.dtype, w.s_max, w.s_min, w.condition, w.stable_rank, w.effective_rank, w.elapsed_s]
            for rank in self.ranks:
                figures = w.at(rank)
                row += [getattr(figures, name, None) for name in of_rank]
                row += [figures.leak.get(name) if figures else None for name in dtypes]
            writer.writerow(row)
        return text.getvalue()


def _cell(name: str) -> str:
    """A name for a CSV file. A spreadsheet would run a text that begins with one of these characters as a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
