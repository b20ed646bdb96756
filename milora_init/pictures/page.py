"""Write a page with the pictures of a scan or of a finished run: one HTML file that needs no network.

The pictures are SVG and one table, which says the same to a screen reader. Scripts only sort the table and say what is
under the pointer; without them the page is complete.

Every name comes from a file and is escaped. A content security policy allows the page's own style and script, by their
hashes, and no connection at all: whatever a name contains, a browser runs and loads nothing of it.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from milora_init import __version__
from milora_init.manifest import Manifest, WeightRecord
from milora_init.pictures.grid import Grid, Metric, extent, grid_of, shortened
from milora_init.pictures.metrics import number, report_metrics, scan_metrics
from milora_init.pictures.style import GENERATOR, PALETTE
from milora_init.report import duration, loading_lines, notes, size, warnings
from milora_init.spectra import ScanResult, WeightSpectrum, mean_curve
from milora_init.untrusted import printable

_CELL = 20  # pixels
_LEVELS = len(PALETTE)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 320, 190, 44, 24  # of a chart
_MOST_LINES = 32  # in a chart
_MOST_REMARKS = 100


@dataclass(frozen=True, slots=True)
class _Chart:
    """One chart of the page: lines over a common logarithmic axis, each with the level of its colour.

    `band` is the part of the horizontal axis, from 0 to 1, that is marked.
    """

    title: str
    lines: Sequence[tuple[int, Sequence[tuple[float, float]]]]
    band: tuple[float, float] | None
    horizontal: tuple[str, str]


def scan_page(result: ScanResult) -> str:
    """The page of a scan."""
    grid = grid_of(result.weights, lambda weight: weight.module)
    facts = {
        "model": result.model,
        "architecture": result.architecture,
        "weights": f"{len(result.weights):,}",
        "rank of the figures": str(result.rank),
        "scanned in": duration(result.elapsed_s),
        "init at this rank": f"about {duration(result.init_s)}",
    }
    explained = (
        "Singular values from the largest (left) to the smallest, on a logarithmic axis; one line for each layer, dark "
        f"for the first ones. The marked part on the right is the component of the {result.rank} smallest."
    )
    metrics = scan_metrics(result.rank)
    parts = [
        _heat_maps(grid, metrics),
        _charts("Spectra", explained, _spectra(grid, result.rank)),
        _table(grid, metrics),
    ]
    return _page(f"Singular spectra of {_last(result.model)}", facts, result.notes, metrics, parts)


def report_page(manifest: Manifest) -> str:
    """The page of a finished run."""
    grid = grid_of(manifest.weights, lambda weight: weight.module)
    source = manifest.source
    facts = {
        "model": str(source["model"]),
        "architecture": str(source["architecture"]),
        "method": manifest.method.name,
        "rank": str(manifest.inputs["rank"]),
        "weights": f"{len(manifest.weights):,}",
        "size": size(sum(manifest.files.values())),
        "made in": duration(manifest.elapsed_s),
        "fingerprint": manifest.fingerprint[:12],
    }
    explained = (
        "For each layer, from left to right: the upper line is the largest singular value of the weight, the bar below "
        "reaches from the largest to the smallest one of the component. The axis is logarithmic."
    )
    metrics = report_metrics(manifest)
    parts = [
        _heat_maps(grid, metrics),
        _charts("The component in the spectrum", explained, _components(grid)),
        _table(grid, metrics),
        f"<section><h2>Load it</h2><pre>{_text(loading_lines(manifest), lines=True)}</pre></section>",
    ]
    remarks = [*warnings(manifest), *notes(manifest)]
    return _page(f"milora-init: {_last(manifest.out)}", facts, remarks, metrics, parts)


def _page(
    title: str, facts: Mapping[str, str], remarks: Sequence[str], metrics: Sequence[Metric[Any]], parts: Iterable[str]
) -> str:
    style = _resource("page.css") + "".join(
        f".c{level} {{ fill: {color}; stroke: {color}; background: {color}; }}\n" for level, color in enumerate(PALETTE)
    )
    style += ".none { fill: var(--none); }\n#maps figure { display: none; }\n"
    # Which map is shown needs no script.
    style += (
        ", ".join(f"#maps:has(#m-{key}:checked) #map-{key}" for key in (metric.key for metric in metrics))
        + " { display: block; }\n"
    )
    script = _resource("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    described = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    shown = "".join(f"<li>{_text(remark)}</li>" for remark in remarks[:_MOST_REMARKS])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{GENERATOR} {__version__}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<dl>{described}</dl>
{f'<ul class="remarks">{shown}</ul>' if shown else ""}
{"".join(parts)}
</main>
<footer>Made by {GENERATOR} {__version__}.</footer>
<script>{script}</script>
</body>
</html>
"""


def _heat_maps(grid: Grid[Any], metrics: Sequence[Metric[Any]]) -> str:
    """A heat map of layers and modules for each figure; one is shown at a time, chosen by radio buttons."""
    buttons, maps = [], []
    rows = "".join(f"<li>{_text(kind)}</li>" for kind in grid.kinds)
    for place, metric in enumerate(metrics):
        checked = " checked" if place == 0 else ""
        buttons.append(f'<label><input type="radio" name="figure" id="m-{metric.key}"{checked}>{metric.label}</label>')
        maps.append(_heat_map(grid, metric, rows))
    return (
        f'<section id="maps"><h2>Layers and modules</h2><fieldset><legend>Figure</legend>{"".join(buttons)}</fieldset>'
        f'<output aria-live="polite">Point at a cell, or tap it, to see its figure.</output>{"".join(maps)}</section>'
    )


def _heat_map(grid: Grid[Any], metric: Metric[Any], rows: str) -> str:
    levels = grid.level(metric, _LEVELS)
    cells, figures = [], []
    for (row, column), weights in grid.cells.items():
        value = metric.figure(weights)
        shown = "no figure" if value is None else metric.form(value)
        if value is not None:
            figures.append(value)
        color = f"c{levels[row, column]}" if (row, column) in levels else "none"
        cells.append(
            f'<rect class="{color}" x="{column * _CELL}" y="{row * _CELL}">'
            f"<title>layer {grid.columns[column]}: {shown}</title></rect>"
        )
    height, width = len(grid.kinds) * _CELL, len(grid.columns) * _CELL
    step = max(1, -(-len(grid.columns) // 12)) if len(grid.columns) > 16 else 1
    ticks = "".join(
        f'<text x="{column * _CELL + _CELL // 2}" y="{height + 14}" text-anchor="middle">{grid.columns[column]}</text>'
        for column in range(0, len(grid.columns), step)
    )
    low, high = extent(figures, metric.scale)
    steps = "".join(f'<i class="c{level}"></i>' for level in range(_LEVELS))
    ends = (metric.form(low), metric.form(high)) if figures else ("", "")
    return (
        f'<figure id="map-{metric.key}"><figcaption>{metric.meaning}</figcaption>'
        f'<div class="map"><ul aria-hidden="true">{rows}</ul>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="heat map, scrolls sideways">'
        f'<svg role="img" aria-label="Heat map: {metric.label} by layer and module; the table has the values" '
        f'width="{width}" height="{height + _CELL}">{"".join(cells)}{ticks}</svg></div></div>'
        f'<div class="scale"><span>{ends[0]}</span><span aria-hidden="true">{steps}</span><span>{ends[1]}</span></div>'
        "</figure>"
    )


def _charts(title: str, explained: str, charts: Sequence[_Chart]) -> str:
    drawn = "".join(map(_chart, charts))
    return f'<section><h2>{title}</h2><p>{explained}</p><div class="charts">{drawn}</div></section>'


def _spectra(grid: Grid[WeightSpectrum], rank: int) -> list[_Chart]:
    charts = []
    for row, kind in enumerate(grid.kinds):
        cells = _thinned(
            [(column, grid.cells[place]) for place in sorted(grid.cells) for r, column in [place] if r == row]
        )
        lines = []
        for column, weights in cells:
            curve = mean_curve([weight.curve for weight in weights])
            points = [(place / (len(curve) - 1), value) for place, value in enumerate(curve)]
            lines.append((_depth(column, grid), points))
        q = min(min(weight.shape) for _, weights in cells for weight in weights)
        most = max(min(weight.shape) for _, weights in cells for weight in weights)
        band = (1 - rank / q, 1.0) if rank <= q == most else None
        charts.append(_Chart(kind, lines, band, ("s_1", f"s_{q}" if q == most else "smallest")))
    return charts


def _components(grid: Grid[WeightRecord]) -> list[_Chart]:
    charts = []
    last = max(1, len(grid.columns) - 1)
    for row, kind in enumerate(grid.kinds):
        cells = [(column, grid.cells[place]) for place in sorted(grid.cells) for r, column in [place] if r == row]
        lines: list[tuple[int, list[tuple[float, float]]]] = []
        if len(cells) > 1:
            lines.append((2, [(column / last, max(w.s_max for w in weights)) for column, weights in cells]))
        else:
            top = max(w.s_max for w in cells[0][1])
            lines.append((2, [(0.0, top), (1.0, top)]))
        for column, weights in cells:
            first, smallest = max(w.s_first for w in weights), min(w.s_last for w in weights)
            lines.append((7, [(column / last, first), (column / last, smallest)]))
        charts.append(_Chart(kind, lines, None, (f"layer {grid.columns[0]}", grid.columns[-1])))
    return charts


def _thinned(cells: list[tuple[int, Sequence[WeightSpectrum]]]) -> list[tuple[int, Sequence[WeightSpectrum]]]:
    step = max(1, -(-len(cells) // _MOST_LINES))
    return cells[::step]


def _depth(column: int, grid: Grid[Any]) -> int:
    """The colour of a layer: the first ones are dark."""
    return round(column / max(1, len(grid.columns) - 1) * (_LEVELS - 2))


def _chart(chart: _Chart) -> str:
    values = [value for _, points in chart.lines for _, value in points]
    low, high = extent(values, "log")
    # Twelve decades show all that float64 resolves, and zeros are drawn at the bottom.
    low = max(low, high * 1e-12)
    bottom, top = (math.log10(low) - 0.05, math.log10(high) + 0.05) if high > 0 else (0.0, 1.0)
    width, height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 8

    def place(x: float, value: float) -> tuple[float, float]:
        part = (math.log10(value) - bottom) / (top - bottom) if value > 0 else 0.0
        return _LEFT + x * width, 8 + (1 - min(1.0, max(0.0, part))) * height

    lines = []
    for level, points in chart.lines:
        placed = " ".join(f"{x:.0f},{y:.1f}" for x, y in (place(*point) for point in points))
        lines.append(f'<polyline class="c{level}" points="{placed}"/>')
    ticks = []
    for value in _ticks(bottom, top):
        y = place(0, value)[1]
        ticks.append(f'<path class="tick" d="M{_LEFT} {y:.1f}h{width}"/>')
        ticks.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    band = ""
    if chart.band:
        x = [_LEFT + end * width for end in chart.band]
        band = f'<rect class="band" x="{x[0]:.1f}" y="8" width="{max(1.5, x[1] - x[0]):.1f}" height="{height}"/>'
    name = _text(chart.title)
    return (
        f'<figure><h3>{name}</h3><svg role="img" aria-label="{name}: from {number(high)} to {number(low)}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}"><rect class="frame" x="{_LEFT}" y="8" width="{width}" height="{height}"/>'
        f'{"".join(ticks)}{band}{"".join(lines)}<text x="{_LEFT}" y="{_HEIGHT - 8}">{chart.horizontal[0]}</text>'
        f'<text x="{_LEFT + width}" y="{_HEIGHT - 8}" text-anchor="end">{chart.horizontal[1]}</text></svg></figure>'
    )


def _ticks(bottom: float, top: float) -> list[float]:
    """Values to mark on an axis from 10^bottom to 10^top: powers of ten, or where those are few, 1, 2 and 5 times."""
    first, last = math.ceil(bottom), math.floor(top)
    if last - first >= 1:
        return [10.0**decade for decade in range(first, last + 1, max(1, -(-(last - first) // 6)))]
    marks = [digit * 10.0**decade for decade in range(first - 1, last + 1) for digit in (1, 2, 5)]
    return [mark for mark in marks if bottom <= math.log10(mark) <= top]


def _table(grid: Grid[Any], metrics: Sequence[Metric[Any]]) -> str:
    """One row for each cell: the figures of the pictures, for reading, sorting and screen readers."""
    heads = "".join(
        f'<th scope="col"><button type="button">{label}</button></th>'
        for label in ("module", "layer", "weights", "shape", *(metric.label for metric in metrics))
    )
    rows = []
    for row, column in sorted(grid.cells, key=lambda place: (place[1], place[0])):
        weights = grid.cells[row, column]
        shapes = {weight.shape for weight in weights}
        shape = " x ".join(map(str, weights[0].shape)) if len(shapes) == 1 else "various"
        cells = [
            f'<td data-v="{column}">{grid.columns[column]}</td>',
            f'<td data-v="{len(weights)}">{len(weights)}</td>',
        ]
        cells.append(f'<td data-v="{math.prod(weights[0].shape)}">{shape}</td>')
        for metric in metrics:
            value = metric.figure(weights)
            if value is None:
                cells.append("<td></td>")
            else:
                sortable = "1e999" if math.isinf(value) else f"{value:.4g}"
                cells.append(f'<td data-v="{sortable}">{metric.form(value)}</td>')
        rows.append(f'<tr><th scope="row" data-v="{row}">{_text(grid.kinds[row])}</th>{"".join(cells)}</tr>')
    return (
        '<section><h2>Table</h2><div class="scroll" tabindex="0" role="region" aria-label="table, scrolls sideways">'
        "<table><caption>Every layer and module. Experts of a layer share a row. Click a heading to sort.</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _text(text: str, *, lines: bool = False) -> str:
    """Text from a file as HTML: escaped, without control characters, on one line unless `lines`."""
    if lines:
        return "\n".join(map(_text, text.splitlines()))
    return escape(printable(text), quote=True)


def _last(path: str) -> str:
    return shortened(path.rstrip("/").rpartition("/")[2] or path)


def _resource(name: str) -> str:
    return files("milora_init.pictures").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
