"""The grading of GSM8K and MATH."""

from __future__ import annotations

import re

import pytest
from evaluate import TASK_FILES
from evaluation.answers import gsm8k_results, last_boxed, math_results
from train import PROMPT

SAYS = "So it is.\nThe answer is: "


@pytest.mark.parametrize(
    ("reference", "response", "right"),
    [
        ("1234567", SAYS + "1,234,567", True),
        ("1,234,567", SAYS + "1234567", True),
        ("1234", SAYS + "1,234,567", False),
        ("18", SAYS + "18.4", False),
        ("18", SAYS + "1800", False),
        ("50", SAYS + "5000", False),
        ("18", SAYS + "$18.00.", True),
        ("18", SAYS + "18 eggs", True),
        ("-3", SAYS + "-3", True),
        ("0.5", SAYS + "1/2", True),
        ("1", SAYS + r"\frac{1}{2}", False),
        ("18", "It is 18", False),
        ("18", "", False),
        ("18", SAYS + "eighteen", False),
        ("18", SAYS + "17\nThe answer is: 18", True),
        ("18", "Response: the Response is a Response.\nThe answer is: 18", True),
        ("18", SAYS + "18\n### And then 7", True),
        ("18", SAYS + "__import__('os').abort()", False),
        ("0", SAYS + "1/0", False),
    ],
)
def test_gsm8k(reference: str, response: str, right: bool) -> None:
    doc = {"answer": f"Some steps 12\n#### {reference}"}
    assert gsm8k_results(doc, [response]) == {"exact_match": float(right)}


@pytest.mark.parametrize(
    ("reference", "response", "right"),
    [
        (r"\frac{1}{2}", SAYS + "1/2", True),
        (r"\frac{1}{2}", SAYS + r"\frac12", True),
        (r"\frac{1}{2}", SAYS + "$0.5$.", True),
        (r"2\sqrt{3}", SAYS + r"\sqrt{12}", True),
        (r"2\sqrt{3}", SAYS + r"2\sqrt3", True),
        (r"\sqrt{2}", SAYS + "1.414", False),
        ("18", SAYS + "1800", False),
        ("18", SAYS + "18.4", False),
        ("1,234,567", SAYS + "1234567", True),
        (r"10\%", SAYS + "10", True),
        ("x^2+1", SAYS + "1+x^2", True),
        ("[1,2]", SAYS + "(1,2)", False),
        ("(1,2)", SAYS + "(1, 2)", True),
        (r"\text{Evelyn}", SAYS + "Evelyn", True),
        (r"\frac{1}{2}", "It is 1/2", False),
        (r"\frac{1}{2}", SAYS, False),
        (r"\frac{1}{2}", SAYS + r"\frac{{{", False),  # cannot be read: not compared with itself
        ("5", SAYS + "__import__('os').abort()", False),
    ],
)
def test_math(reference: str, response: str, right: bool) -> None:
    assert math_results({"solution": f"So we get $\\boxed{{{reference}}}$."}, [response]) == {
        "exact_match": float(right)
    }


def test_the_last_box_counts_with_its_inner_braces() -> None:
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{\sqrt{2}}} end") == r"\frac{1}{\sqrt{2}}"
    assert last_boxed(r"$\boxed 7$") == "7"
    assert last_boxed("none") is None
    assert last_boxed(r"\boxed{1") is None


@pytest.mark.parametrize(("task", "field"), [("gsm8k", "question"), ("MATH", "problem")])
def test_the_evaluation_prompt_is_the_training_prompt_with_the_authors_suffix(task: str, field: str) -> None:
    content = (TASK_FILES / f"{task}.yaml").read_text(encoding="utf-8")
    found = re.search(r'^doc_to_text: "(.*)"$', content, re.MULTILINE)
    assert found is not None
    prompt = found.group(1).replace(r"\n", "\n").replace("{{" + field + "}}", "{instruction}")
    assert prompt == PROMPT + " Let's think step by step."
