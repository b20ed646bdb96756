"""The adapter folder: what PEFT reads from `lora/`.

adapter_config.json holds only keys that every PEFT since 0.13 knows, because 0.13 refuses a key it does not know; our
own facts are in the manifest. `init_lora_weights` is true and not "pissa": PEFT would run another SVD and change the
base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from milora_init.naming import REGEX, matcher
from milora_init.safetensors_format import Header, plan_header

FOLDER = "lora"
CONFIG = f"{FOLDER}/adapter_config.json"
WEIGHTS = f"{FOLDER}/adapter_model.safetensors"


def lora_key(module: str, factor: str) -> str:
    """PEFT's name for factor `A` or `B` of a module."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def module_and_factor(key: str) -> tuple[str, str] | None:
    """The module and the factor, `A` or `B`, that a key of an adapter file names; None for any other key."""
    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
    return (match[1], match[2]) if match else None


def targeted(targets: object, modules: Sequence[str]) -> set[str]:
    """The modules that PEFT resolves `target_modules` to: a list of names and suffixes, or one regular expression."""
    if isinstance(targets, str):
        targets = [f"{REGEX}{targets}"]
    if not isinstance(targets, (list, tuple)):
        return set()
    matches = matcher([str(target) for target in targets])
    return {module for module in modules if matches(module)}


def plan_adapter(weights: Sequence[tuple[str, tuple[int, int]]], rank: int) -> Header:
    """Header of a file with A (rank, n) and B (m, rank) in float32 for each (module, (m, n))."""
    return plan_header(
        (
            entry
            for module, (m, n) in weights
            for entry in ((lora_key(module, "A"), "F32", (rank, n)), (lora_key(module, "B"), "F32", (m, rank)))
        ),
        metadata={"format": "pt"},
    )


def target_modules(adapted: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """The shortest `target_modules` that PEFT resolves to exactly the adapted modules.

    Suffixes like `q_proj` where they hit nothing else, full names where they would, and where even a full name is
    another module's end, one regular expression, which PEFT matches from end to end.
    """
    wanted = set(adapted)
    for names in (sorted({module.rpartition(".")[2] for module in adapted}), sorted(adapted)):
        matches = matcher(names)
        if {module for module in modules if matches(module)} == wanted:
            return names
    return "|".join(re.escape(module) for module in sorted(adapted))


def adapter_config(
    *,
    base: str,
    rank: int,
    alpha: int,
    rslora: bool,
    dropout: float,
    task_type: str | None,
    targets: list[str] | str,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """Content of adapter_config.json; `base` is the residual base, which PEFT's Auto classes load."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": targets,
        "init_lora_weights": True,
        "inference_mode": False,
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": rslora,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
