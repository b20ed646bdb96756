"""Pictures as PNG, by matplotlib: the extra `plot`. Everything else in this folder needs no package.

`heat_maps` and `png` serve any picture of this package: one look, one size, the same bytes for the same figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from milora_init.errors import UsageError
from milora_init.manifest import Manifest
from milora_init.pictures.grid import Grid, Metric, extent, grid_of, shortened
from milora_init.pictures.metrics import report_metrics, scan_metrics
from milora_init.pictures.style import GENERATOR, PALETTE
from milora_init.spectra import ScanResult, mean_curve

_MOST_PANELS = 12  # of spectra
_DPI = 100


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise UsageError if matplotlib is not installed."""
    if not has_matplotlib():
        raise UsageError("pictures need matplotlib, which is not installed", hint="pip install matplotlib")


def png(figure: Any) -> bytes:
    """A figure of matplotlib as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": GENERATOR})
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Any:
    """A new figure of this size in inches, without a window."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def scan_plot(result: ScanResult) -> bytes:
    """The picture of a scan: two heat maps, and the spectra of each kind of module."""
    grid = grid_of(result.weights, lambda weight: weight.module)
    shown = {metric.key: metric for metric in scan_metrics(result.rank)}
    rows = list(range(min(len(grid.kinds), _MOST_PANELS)))
    lines = -(-len(rows) // 4)
    map_height = 0.9 + 0.22 * len(grid.kinds)
    figure = new_figure(11, 2 * map_height + 2.4 * lines + 0.4)
    maps, spectra = figure.subfigures(2, 1, height_ratios=[2 * map_height, 2.4 * lines + 0.4])
    heat_maps(maps, grid, [shown["energy-min"], shown["condition"]])
    _spectra(spectra, grid, rows, lines)
    _title(figure, f"Singular spectra of {_last(result.model)}")
    return png(figure)


def report_plot(manifest: Manifest) -> bytes:
    """The picture of a finished run: heat maps of energy, time, and if a base was written, leak and error."""
    grid = grid_of(manifest.weights, lambda weight: weight.module)
    shown = {metric.key: metric for metric in report_metrics(manifest)}
    chosen = [shown[key] for key in ("energy", "leak", "error", "time") if key in shown]
    figure = new_figure(11, 0.5 + len(chosen) * (0.9 + 0.22 * len(grid.kinds)))
    heat_maps(figure, grid, chosen)
    _title(figure, f"{_last(str(manifest.source['model']))}: {manifest.method.name}, rank {manifest.inputs['rank']}")
    return png(figure)


def heat_maps(figure: Any, grid: Grid[Any], metrics: Sequence[Metric[Any]]) -> None:
    """Draw a heat map of layers and modules for each metric, one below the other, into a figure or subfigure."""
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    colors = ListedColormap(PALETTE).with_extremes(bad="0.9")
    for axes, metric in zip(figure.subplots(len(metrics), 1, squeeze=False).flat, metrics, strict=True):
        values = [[math.nan] * len(grid.columns) for _ in grid.kinds]
        for (row, column), weights in grid.cells.items():
            value = metric.figure(weights)
            values[row][column] = math.nan if value is None else value
        flat = [value for line in values for value in line if not math.isnan(value)]
        low, high = extent(flat, metric.scale)
        finite = [[min(value, high) if not math.isnan(value) else value for value in line] for line in values]
        norm = LogNorm(low, high, clip=True) if metric.scale == "log" and 0 < low < high else Normalize(low, high)
        image = axes.imshow(finite, aspect="auto", cmap=colors, norm=norm, interpolation="nearest")
        axes.set_yticks(range(len(grid.kinds)), [plain(kind) for kind in grid.kinds], fontsize=8)
        step = max(1, len(grid.columns) // 16)
        axes.set_xticks(range(0, len(grid.columns), step), grid.columns[::step], fontsize=8)
        axes.set_title(metric.label, fontsize=10, loc="left")
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        bar.ax.minorticks_off()
        bar.set_ticks([low, high] if low < high else [low], labels=[metric.form(v) for v in sorted({low, high})])
        bar.ax.tick_params(labelsize=8)
    figure.supxlabel("layer", fontsize=9)


def _spectra(figure: Any, grid: Grid[Any], rows: Sequence[int], lines: int) -> None:
    panels = figure.subplots(lines, min(4, len(rows)), squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    for axes, row in zip(panels.flat, rows, strict=False):
        axes.set_visible(True)
        for (of_row, column), weights in sorted(grid.cells.items()):
            if of_row == row:
                curve = [value or math.nan for value in mean_curve([weight.curve for weight in weights])]
                level = round(column / max(1, len(grid.columns) - 1) * (len(PALETTE) - 2))
                axes.plot(
                    [place / (len(curve) - 1) for place in range(len(curve))], curve, color=PALETTE[level], lw=0.8
                )
        axes.set_yscale("log")
        axes.set_xticks([0, 1], ["largest", "smallest"], fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(plain(grid.kinds[row]), fontsize=8)
    figure.supylabel("singular values, by layer", fontsize=9)


def _title(figure: Any, text: str) -> None:
    figure.suptitle(plain(text), fontsize=12)


def plain(text: str) -> str:
    """Text in which matplotlib reads no mathematics."""
    return text.replace("$", r"\$")


def _last(path: str) -> str:
    return shortened(path.rstrip("/").rpartition("/")[2] or path)
