"""After training: how far each weight moved, and into which directions of the original weight."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from milora_init.checkpoint.dequantise import locate
from milora_init.envelope import envelope
from milora_init.errors import PlanError, SolveError
from milora_init.export.convert import difference
from milora_init.export.merge_plan import MergePlan
from milora_init.linalg.movement import Movement, movement
from milora_init.lora.folder import adapter_folder, open_factors, read_lora
from milora_init.manifest import Manifest, WeightRecord
from milora_init.pictures import plots
from milora_init.pictures.grid import Metric, grid_of
from milora_init.pictures.metrics import number
from milora_init.report import percent
from milora_init.verification.tensors import read_row

_NO_DORA = "DoRA changes the length of every row: its update is not of low rank; merge it and compare the models"


@dataclass(frozen=True, slots=True)
class MovedWeight:
    """One weight and what the training did to it."""

    module: str
    suffix: str
    rank: int
    moved: Movement


@dataclass(frozen=True, slots=True)
class MovedGroup:
    """All weights with the same last part of their name: means of the shares, and the largest figures of the others.

    Attributes:
        suffix: The last part of the name.
        count: How many weights.
        relative: Mean of |D| / |W|.
        minor, middle, principal: Mean shares of the update in these directions of the original weight.
        intruders, vectors: Sum of intruder dimensions, and of the vectors that were compared.
    """

    suffix: str
    count: int
    relative: float
    minor: float
    middle: float
    principal: float
    intruders: int
    vectors: int


def measure(plan: MergePlan, pair: Path, progress: Callable[[int, int], None] = lambda *_: None) -> list[MovedWeight]:
    """Measure every adapted weight of a trained adapter, one at a time.

    Args:
        plan: The merge of the adapter, which was checked against the pair.
        pair: The folder of the pair.
        progress: Called after each weight, with the number of measured weights and of all.

    Raises:
        CheckpointError: A file that cannot be read.
        PlanError: The adapter has DoRA.
        SolveError: A weight whose directions cannot be computed.
    """
    manifest, trained = plan.manifest, plan.adapter
    if any(factors.magnitude for factors in trained.modules.values()):
        raise PlanError(f"{trained.path}: {_NO_DORA}", hint="give an adapter that was trained without DoRA")
    initial = read_lora(adapter_folder(pair, manifest.method), manifest.weights)
    found = []
    with (
        open_factors(initial.weights) as before,
        open_factors(trained.weights) as after,
    ):
        for record in manifest.weights:
            start, end = before.read(record), after.read(record)
            R = read_row(locate(plan.base, record.tensor), record.row).double()
            found.append(_measure(record, R.mT if record.transposed else R, start, end, manifest))
            progress(len(found), len(manifest.weights))
    return found


def _measure(
    record: WeightRecord, R: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor], manifest: Manifest
) -> MovedWeight:
    """Measure one weight: R (m, n) is the residual, or the original weight where the method writes no base."""
    (B0, A0), (B, A) = start, end
    W = R + record.scale * (B0.double() @ A0.double()) if manifest.method.writes_base else R
    A_D, B_D = difference((A, B), (A0, B0), 1)
    try:
        moved = movement(W, record.scale * B_D[0], A_D[0], record.rank)
    except ValueError as error:
        raise SolveError(
            f"{record.module}: {error}", hint="look at the training: NaN or Inf cannot be measured"
        ) from error
    return MovedWeight(record.module, record.suffix, record.rank, moved)


def groups(weights: Iterable[MovedWeight]) -> list[MovedGroup]:
    """The rows of the table, in the model's order."""
    by_suffix: dict[str, list[Movement]] = {}
    for weight in weights:
        by_suffix.setdefault(weight.suffix, []).append(weight.moved)
    return [
        MovedGroup(
            suffix=suffix,
            count=len(moved),
            relative=statistics.fmean(m.relative for m in moved),
            minor=statistics.fmean(m.minor for m in moved),
            middle=statistics.fmean(m.middle for m in moved),
            principal=statistics.fmean(m.principal for m in moved),
            intruders=sum(m.intruders for m in moved),
            vectors=sum(m.vectors for m in moved),
        )
        for suffix, moved in by_suffix.items()
    ]


def movement_plot(weights: Sequence[MovedWeight], title: str) -> bytes:
    """A PNG with heat maps of layers and modules: the norm of the update, its shares, and the intruder dimensions.

    Raises:
        UsageError: matplotlib is not installed.
    """
    metrics: list[Metric[MovedWeight]] = [
        Metric("relative", "norm of the update / of the weight", "", lambda w: w.moved.relative, percent),
        Metric("minor", "share in the smallest directions", "", lambda w: w.moved.minor, percent, scale="linear"),
        Metric("principal", "share in the largest ones", "", lambda w: w.moved.principal, percent, scale="linear"),
        Metric("intruders", "intruder dimensions", "", lambda w: float(w.moved.intruders), number, "sum", "linear"),
    ]
    grid = grid_of(weights, lambda weight: weight.module)
    figure = plots.new_figure(11, 0.5 + len(metrics) * (0.9 + 0.22 * len(grid.kinds)))
    plots.heat_maps(figure, grid, metrics)
    figure.suptitle(plots.plain(title), fontsize=12)
    return plots.png(figure)


def movement_json(
    manifest: Manifest, adapter: str, weights: Sequence[MovedWeight], warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """The object that `report --adapter --json` prints."""
    return envelope(
        "report",
        "done",
        out=manifest.out,
        fingerprint=manifest.fingerprint,
        source=manifest.source,
        warnings=warnings,
        adapter=adapter,
        movement=[{"module": weight.module, "rank": weight.rank, **asdict(weight.moved)} for weight in weights],
        movement_groups=[asdict(group) for group in groups(weights)],
    )
