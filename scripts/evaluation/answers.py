"""Read and compare answers, for gsm8k.yaml and MATH.yaml.

A response counts if it has the phrase "The answer is: " and what follows equals the reference: for GSM8K as an exact
number, for MATH as math-verify compares. No text of a model is evaluated as code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

PHRASE = re.compile(r"The answer is:?\s*")
NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


def gsm8k_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results` for one GSM8K problem."""
    reference = number_in(doc["answer"].rpartition("####")[2])
    if reference is None:
        raise ValueError(f"no number after #### in {doc['answer']!r}")
    return {"exact_match": float(number_in(answer_in(results[0])) == reference)}


def math_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results` for one MATH problem."""
    reference = last_boxed(doc["solution"])
    if reference is None:
        raise ValueError(f"no \\boxed in {doc['solution']!r}")
    return {"exact_match": float(math_equal(reference, answer_in(results[0])))}


def answer_in(response: str) -> str:
    """What follows the last "The answer is:", to the end of its line; empty without that phrase."""
    parts = PHRASE.split(response)
    return parts[-1].partition("\n")[0].strip() if len(parts) > 1 else ""


def number_in(text: str) -> Fraction | None:
    """The first number of a text, exactly: thousands separators, decimals and a/b are read. None without one."""
    found = NUMBER.search(text.replace("$", ""))
    if found is None or "\\" in text:  # the first number of \frac{1}{2} is not its value
        return None
    try:
        return Fraction(re.sub(r"[,\s]", "", found.group()))
    except (ValueError, ZeroDivisionError):
        return None


def last_boxed(solution: str) -> str | None:
    r"""The content of the last \boxed{...} or \boxed x; None without one."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[start:].partition("boxed" if solution.startswith("\\boxed", start) else "fbox")[2]
    if not rest.startswith("{"):
        return rest.strip().partition("$")[0].strip()
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:place].strip()
    return None


def math_equal(reference: str, answer: str) -> bool:
    """Whether two mathematical expressions in LaTeX are equal; False for what cannot be read."""
    from math_verify import LatexExtractionConfig, parse, verify

    answer = answer.strip().rstrip(".").strip("$ ")
    if not answer:
        return False
    if _plain(answer) == _plain(reference):
        return True
    # Without ExprExtractionConfig: sympy's parser of plain expressions, behind it, evaluates text as Python.
    read = [parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback") for text in (reference, answer)]
    return all(read) and bool(verify(*read))


def math_problems(**_: Any) -> Any:
    """The 5,000 test problems of MATH, all seven subjects, from the Hub."""
    from datasets import DatasetDict, concatenate_datasets, load_dataset

    parts = [load_dataset("EleutherAI/hendrycks_math", subject, split="test") for subject in MATH_SUBJECTS]
    return DatasetDict(test=concatenate_datasets(parts))


def _plain(text: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\[!,;]|\\left|\\right|\\?[%$]", "", text)
