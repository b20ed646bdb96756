"""A grid of layers and modules is small whatever the model's names are, and no weight is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from support import pages

from milora_init.pictures.grid import MOST_COLUMNS, MOST_KINDS, Grid, Metric, extent, grid_of, shortened


def grid(names: Sequence[str]) -> Grid[str]:
    return grid_of(names, str)


def test_modules_are_rows_and_layers_are_columns() -> None:
    found = grid(["model.layers.0.attn.q", "model.layers.0.mlp.up", "model.layers.10.attn.q", "model.layers.2.attn.q"])
    assert found.kinds == ("attn.q", "mlp.up")
    assert found.columns == ("0", "2", "10")
    assert found.cells[0, 2] == ["model.layers.10.attn.q"]
    assert (1, 1) not in found.cells


def test_the_experts_of_a_layer_share_a_cell() -> None:
    found = grid([f"m.layers.0.experts.{e}.w1" for e in range(8)] + [f"m.layers.0.experts.down[{e}]" for e in range(4)])
    assert found.kinds == ("experts.*.w1", "experts.down")
    assert [len(cell) for cell in found.cells.values()] == [8, 4]


def test_encoder_and_decoder_are_told_apart_and_modules_outside_layers_are_shown() -> None:
    found = grid(["encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q", "pooler.dense", "head.3"])
    assert found.kinds == ("encoder.block.*.layer.*.q", "decoder.block.*.layer.*.q", "pooler.dense", "head.3")
    assert found.columns == ("0", "-")


@pytest.mark.parametrize(
    "names", [pages.LLAMA_405B, pages.EXPERTS, pages.SHUFFLED, [pages.HOSTILE], ["", ".", "0", "1.2"]]
)
def test_a_grid_is_bounded_and_has_every_weight(names: Sequence[str]) -> None:
    found = grid(names)
    assert len(found.kinds) <= MOST_KINDS
    assert len(found.columns) <= MOST_COLUMNS + 1
    assert sum(map(len, found.cells.values())) == len(names)
    assert all(name.isprintable() and len(name) <= 60 for name in found.kinds)
    assert all(0 <= row < len(found.kinds) and 0 <= column < len(found.columns) for row, column in found.cells)


def test_many_layers_share_columns() -> None:
    found = grid([f"layers.{layer}.q" for layer in range(1000)])
    assert found.columns[:2] == ("0 to 7", "8 to 15")


def test_a_number_that_is_no_layer_does_no_harm() -> None:
    assert grid([f"m.{'9' * 5000}.q", "m.\u0661.q"]).columns == ("-",)


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_colours_keep_the_order_of_the_figures(scale: str) -> None:
    figures = {"l.0.a": 0.0, "l.1.a": 1e-6, "l.2.a": 1e-3, "l.3.a": 1.0, "l.4.a": math.inf, "l.5.a": None}
    metric = Metric("k", "k", "", figures.get, str, scale="log" if scale == "log" else "linear")
    levels = grid(list(figures)).level(metric, 12)
    ordered = [levels[0, column] for column in range(5)]
    assert ordered == sorted(ordered)
    assert (ordered[0], ordered[3], ordered[4]) == (0, 11, 11)
    assert (0, 5) not in levels


def test_the_figure_of_several_weights() -> None:
    def combined(how: str) -> float | None:
        return Metric("k", "k", "", float, str, combine=how).figure(["1", "4", "nan"])  # type: ignore[arg-type]

    assert [combined(how) for how in ("mean", "max", "min", "sum")] == [2.5, 4, 1, 5]
    absent: Metric[str] = Metric("k", "k", "", lambda _: None, str)
    assert absent.figure(["1"]) is None
    assert extent([0.0, math.inf, 2.0, 3.0], "log") == (2.0, 3.0)
    assert extent([], "log") == (0.0, 0.0)


def test_long_names_are_cut_in_the_middle() -> None:
    assert shortened("a" * 100 + "end").endswith("end")
    assert len(shortened("\x1b" * 10_000)) <= 60
