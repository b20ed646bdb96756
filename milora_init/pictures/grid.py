"""Arrange the weights of a model in a grid of layers and modules, whatever their names and their number.

A model has up to 10^5 weights, and its names come from a file. So a grid has a bounded number of rows and columns: the
experts of a layer share a cell, neighbouring layers share a column, and the rarest modules share the last row.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from milora_init.untrusted import printable

MOST_KINDS, MOST_COLUMNS = 24, 128
_OTHERS = "(others)"
_NO_LAYER = "-"
_MOST_CHARACTERS = 60
_INDEX = re.compile(r"\[\d+\]$")

Weight = TypeVar("Weight")


@dataclass(frozen=True, slots=True)
class Metric(Generic[Weight]):
    """A figure of a weight.

    Attributes:
        key: A short identifier.
        label, meaning: What it is called, and what it says, in a sentence.
        of: The figure of a weight; None where it has none. Infinite is allowed.
        form: A figure as text.
        combine: The figure of several weights: their mean, the largest or the smallest of them, or their sum.
        scale: How figures become colours.
    """

    key: str
    label: str
    meaning: str
    of: Callable[[Weight], float | None]
    form: Callable[[float], str]
    combine: Literal["mean", "max", "min", "sum"] = "mean"
    scale: Literal["log", "linear"] = "log"

    def figure(self, weights: Sequence[Weight]) -> float | None:
        """The figure of several weights; None where none of them has one."""
        values = [value for weight in weights if (value := self.of(weight)) is not None and not math.isnan(value)]
        if not values:
            return None
        if self.combine == "mean":
            return statistics.fmean(values)
        return sum(values) if self.combine == "sum" else max(values) if self.combine == "max" else min(values)


@dataclass(frozen=True, slots=True)
class Grid(Generic[Weight]):
    """The weights of a model by module and layer.

    Attributes:
        kinds: The names of the rows: modules without the number of their layer.
        columns: The names of the columns: numbers of layers, or `-` for modules outside layers.
        cells: The weights by (row, column). A cell without weights is absent.
    """

    kinds: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], Sequence[Weight]]

    def level(self, metric: Metric[Weight], levels: int) -> dict[tuple[int, int], int]:
        """A colour for each cell that has the figure: 0 for the smallest, levels - 1 for the largest."""
        figures = {place: found for place, cell in self.cells.items() if (found := metric.figure(cell)) is not None}
        low, high = extent(list(figures.values()), metric.scale)
        return {
            place: round(_position(value, low, high, metric.scale) * (levels - 1)) for place, value in figures.items()
        }


def extent(values: Sequence[float], scale: Literal["log", "linear"]) -> tuple[float, float]:
    """The smallest and the largest finite value; for a logarithmic scale those above 0. (0, 0) if there is none."""
    usable = [value for value in values if math.isfinite(value) and (scale == "linear" or value > 0)]
    return (min(usable), max(usable)) if usable else (0.0, 0.0)


def _position(value: float, low: float, high: float, scale: Literal["log", "linear"]) -> float:
    """Where a value lies between low and high, from 0 to 1."""
    if value <= low or high <= low:
        return 0.0 if value <= low else 1.0
    if value >= high:
        return 1.0
    if scale == "log":
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def grid_of(weights: Sequence[Weight], name: Callable[[Weight], str]) -> Grid[Weight]:
    """Arrange weights by their names."""
    places = [_place(name(weight)) for weight in weights]
    prefixes = {prefix for prefix, _, layer in places if layer is not None}
    named = [
        (f"{prefix}.*.{kind}" if prefix and len(prefixes) > 1 and layer is not None else kind, layer)
        for prefix, kind, layer in places
    ]
    counts = Counter(kind for kind, _ in named)
    first = dict.fromkeys(kind for kind, _ in named)  # in the model's order
    kept = set(first) if len(first) <= MOST_KINDS else {kind for kind, _ in counts.most_common(MOST_KINDS - 1)}
    kinds = [kind for kind in first if kind in kept] + ([_OTHERS] if len(kept) < len(first) else [])
    row_of = {kind: row for row, kind in enumerate(kinds)}
    layers = sorted({layer for _, layer in named if layer is not None})
    width = -(-len(layers) // MOST_COLUMNS) or 1
    bins = [layers[start : start + width] for start in range(0, len(layers), width)]
    column_of = {layer: column for column, numbers in enumerate(bins) for layer in numbers}
    columns = [str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}" for numbers in bins]
    if any(layer is None for _, layer in named):
        columns.append(_NO_LAYER)
    cells: dict[tuple[int, int], list[Weight]] = {}
    for weight, (kind, layer) in zip(weights, named, strict=True):
        row = row_of.get(kind, len(kinds) - 1)
        column = len(columns) - 1 if layer is None else column_of[layer]
        cells.setdefault((row, column), []).append(weight)
    return Grid(tuple(map(shortened, kinds)), tuple(columns), cells)


def _place(name: str) -> tuple[str, str, int | None]:
    """What stands before the number of the layer, what stands after it, and the number; None where there is none.

    Further numbers, such as that of an expert, are replaced by `*`.
    """
    parts = _INDEX.sub("", name).split(".")
    at = next((place for place, part in enumerate(parts) if part.isascii() and part.isdigit() and len(part) < 9), None)
    if at is None or at == len(parts) - 1:
        return "", ".".join(parts), None
    kind = ".".join("*" if part.isdigit() else part for part in parts[at + 1 :])
    return ".".join(parts[:at]), kind, int(parts[at])


def shortened(name: str) -> str:
    """A name from a file, on one line and not too long."""
    text = printable(name[: 4 * _MOST_CHARACTERS] + name[4 * _MOST_CHARACTERS :][-_MOST_CHARACTERS:])
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS // 2 - 1]}...{text[-_MOST_CHARACTERS // 2 + 2 :]}"
