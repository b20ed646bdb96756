"""compare.py: the problems, what is compared, and the table and plot of the results. The run itself is no test."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare import RANK, Result, Variant, plot, table, variants
from evaluation.answers import gsm8k_results
from training_methods import METHODS
from word_problems import split

RESULTS = [
    Result(Variant(method, alpha), rate, seed, 2.0 - rate * 10 - seed / 10, 3.1 + seed / 10, 0.25, 1.0)
    for method, alpha in (("lora", 2 * RANK), ("milora", RANK), ("full", None))
    for rate in (1e-3, 1e-2)
    for seed in (0, 1)
]


BEFORE = {"new": 5.0, "old": 3.0}


def test_problems_are_the_same_for_a_seed_and_none_is_in_both_parts() -> None:
    training, held = split(300, 50, seed=0)
    assert (training, held) == split(300, 50, seed=0)
    assert split(300, 50, seed=1) != (training, held)
    assert not {problem.question for problem in training} & {problem.question for problem in held}


def test_the_gsm8k_task_grades_the_responses_as_right() -> None:
    for problem in split(50, 0, seed=0)[0]:
        doc, response = problem.gsm8k_row(), problem.training_row()["response"]
        assert gsm8k_results(doc, [response]) == {"exact_match": 1.0}
        assert gsm8k_results(doc, [f"{problem.steps} The answer is: {problem.answer + 1}"]) == {"exact_match": 0.0}


def test_lora_is_compared_at_both_scales_and_everything_else_at_alpha_r() -> None:
    found = variants()
    assert [variant.alpha for variant in found if variant.method == "lora"] == [2 * RANK, RANK]
    for variant in found:
        if variant.method == "full":
            assert variant.alpha is None
        elif variant.method != "lora":
            assert variant.alpha == RANK
        assert variant.method in METHODS


def test_the_table_shows_every_seed() -> None:
    text = table(RESULTS, BEFORE)
    assert "| lora, alpha 2r | 0.001 | 1.990 / 1.890 | 3.100 / 3.200 | 25% / 25% |" in text
    assert "| full | 0.01 | 1.900 / 1.800 |" in text
    assert "5.000 on word problems (new), 3.000 on docstrings (old)" in text


def test_the_plot_is_written_as_png_and_svg_without_dates(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install '.[dev]'")
    plot(RESULTS, BEFORE, tmp_path)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "results.svg").read_bytes()
    plot(RESULTS, BEFORE, tmp_path)
    assert (tmp_path / "results.svg").read_bytes() == first
