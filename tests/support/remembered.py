"""Ask transformers and PEFT about each model and adapter once a worker: that is half of the time of a tiny run.

The tests in model/ and plan/ call these functions themselves: what they import is not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch import nn

from milora_init.model.adaptable import ModelStructure, read_structure
from milora_init.plan import peft_check

CALLERS = (
    "export.merge_plan",
    "export.other_class",
    "plan.plan",
    "verification.verify",
    "verification.without_manifest",
)
Answer = TypeVar("Answer")
Expected = tuple[Mapping[str, tuple[int, ...]], Mapping[str, float]]


def remember(patch: pytest.MonkeyPatch) -> None:
    """Replace `read_structure` and `expected_by_peft` where commands call them. Errors are not remembered."""
    structures: dict[str, ModelStructure] = {}
    expectations: dict[str, Expected] = {}

    def structure(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Any], **options: Any) -> ModelStructure:
        if options.get("trust_remote_code"):  # the code in the folder belongs to what is asked
            return read_structure(folder, config, shapes, **options)
        return _once(structures, lambda: read_structure(folder, config, shapes, **options), config, shapes, options)

    ask = peft_check.expected_by_peft

    def expected(model: nn.Module, config: Mapping[str, Any], planned: Mapping[str, Any]) -> Expected:
        of_model = (type(model).__name__, str(model.config))
        return _once(expectations, lambda: ask(model, config, planned), of_model, config, planned)

    for caller in CALLERS:
        patch.setattr(f"milora_init.{caller}.read_structure", structure)
    patch.setattr(peft_check, "expected_by_peft", expected)


def _once(answers: dict[str, Answer], ask: Callable[[], Answer], *question: Any) -> Answer:
    key = repr(question)
    if key not in answers:
        answers[key] = ask()
    return answers[key]
