"""verdict: the most specific finding decides the code, in any order of the checks."""

from __future__ import annotations

from itertools import permutations
from typing import get_args

import pytest

from milora_init.verification.verdict import TEXTS, Code, Finding, Problem, Verdict, note, verdict_code

CASES: list[tuple[tuple[Problem, ...], Code]] = [
    (("changed",), "damaged"),
    (("changed_weights",), "damaged"),
    (("missing_adapter",), "residual_alone"),
    (("missing_adapter", "changed"), "residual_alone"),
    (("missing_adapter", "changed_weights"), "damaged"),
    (("changed_weights", "original_weights"), "original_with_adapter"),
    (("changed", "replaced_adapter"), "replaced_adapter"),
    (("adapter_misfit",), "adapter_misfit"),
    (("adapter_misfit", "changed"), "damaged"),
    (("changed_weights", "original_weights", "foreign_adapter"), "foreign_adapter"),
    (("other_model",), "other_model"),
    (("other_model", "changed"), "damaged"),
    (("other_model", "adapter_misfit"), "adapter_misfit"),
]


@pytest.mark.parametrize(("problems", "code"), CASES)
def test_the_most_specific_problem_decides(problems: tuple[Problem, ...], code: Code) -> None:
    for order in permutations(problems):
        findings = [Finding("a", "b", "c", problem) for problem in order]
        assert verdict_code([note("a", "b"), *findings], trained=False) == code
        assert verdict_code(findings, trained=True) == code


def test_notes_do_not_change_the_verdict() -> None:
    assert verdict_code([note("a", "b")], trained=False) == "pair"
    assert verdict_code([note("a", "b")], trained=True) == "trained_pair"
    verdict = Verdict("out", "pair", (note("a", "b"),), {})
    assert verdict.ok
    assert verdict.to_json()["notes"] == ["a: b"]


def test_every_code_has_its_own_text() -> None:
    assert set(TEXTS) == set(get_args(Code))
    assert len(set(TEXTS.values())) == len(TEXTS)
