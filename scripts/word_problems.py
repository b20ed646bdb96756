"""Generated arithmetic word problems, as rows for training and as GSM8K-like problems for evaluation."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("Ann", "Ben", "Eva", "Tom", "Mia", "Sam", "Lea", "Max")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "stamps", "stones")
LARGEST = 9


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, the steps to its answer, and the answer."""

    question: str
    steps: str
    answer: int

    def training_row(self) -> dict[str, str]:
        return {"query": self.question, "response": f"{self.steps} The answer is: {self.answer}"}

    def gsm8k_row(self) -> dict[str, str]:
        return {"question": self.question, "answer": f"{self.steps}\n#### {self.answer}"}


def problems(seed: int) -> Iterator[Problem]:
    """Endless problems of one step, addition or subtraction of numbers up to LARGEST; the same for the same seed."""
    dice = random.Random(seed)
    while True:
        name, thing = dice.choice(NAMES), dice.choice(THINGS)
        a, b = dice.randint(1, LARGEST), dice.randint(1, LARGEST)
        if dice.random() < 0.5:
            question = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"
            yield Problem(question, f"{a} + {b} = {a + b}.", a + b)
        else:
            a, b = max(a, b), min(a, b)
            question = f"{name} has {a} {thing} and gives {b} away. How many {thing} does {name} have now?"
            yield Problem(question, f"{a} - {b} = {a - b}.", a - b)


def split(train: int, held: int, *, seed: int) -> tuple[list[Problem], list[Problem]]:
    """So many problems to train on and so many others to measure with, no question in both."""
    source = problems(seed)
    training = [next(source) for _ in range(train)]
    known = {problem.question for problem in training}
    new: dict[str, Problem] = {}
    while len(new) < held:
        problem = next(source)
        if problem.question not in known:
            new[problem.question] = problem
    return training, list(new.values())


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
