"""Content of adapter_config.json: ranks, alphas, scales and patterns.

The file has only keys that every PEFT since 0.13 knows, because PEFT 0.13 refuses unknown keys; everything else is in
the manifest. `init_lora_weights` is true and not "pissa": with "pissa" PEFT would run another SVD and change the base.
Only with "mica" does PEFT freeze B, so that method has it; PEFT runs no SVD if it loads with `low_cpu_mem_usage=True`.
Experts, and modules that PEFT would take for experts, are named in `target_parameters`, which needs a newer PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from milora_init.errors import PlanError
from milora_init.lora.targets import PeftTargets, name_suffixes
from milora_init.untrusted import plain_names


def lora_scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """The factor of B @ A in PEFT: alpha / rank, or alpha / sqrt(rank) with rsLoRA (https://arxiv.org/abs/2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def stacked_alpha(alpha: float, parts: int, *, rslora: bool) -> float:
    """The alpha that keeps the scale when the rank becomes `parts` times as high."""
    return alpha * math.sqrt(parts) if rslora and parts > 1 else alpha * parts


def match_pattern(patterns: Mapping[str, float]) -> Callable[[str], float | None]:
    """A function that looks up a name in rank_pattern or alpha_pattern as PEFT does: the first key that is its suffix.

    Raises:
        ValueError: A key that is not made of plain names. PEFT would use it as a regular expression.
    """
    places: dict[str, tuple[int, float]] = {}
    for place, (key, value) in enumerate(patterns.items()):
        for name in plain_names(key):
            places.setdefault(name, (place, value))

    def find(name: str) -> float | None:
        found = [places[suffix] for suffix in name_suffixes(name) if suffix in places] if places else []
        return min(found)[1] if found else None

    return find


def rank_and_alpha_patterns(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, rank: int, alpha: float
) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern, with an entry for each name whose rank or alpha is not the default.

    Raises:
        PlanError: PEFT would find another name's rank or alpha for a name.
    """
    not_default = [name for name in ranks if ranks[name] != rank or alphas[name] != alpha]
    rank_pattern = {name: ranks[name] for name in not_default}
    alpha_pattern = {name: alphas[name] for name in not_default}
    try:
        rank_of, alpha_of = match_pattern(rank_pattern), match_pattern(alpha_pattern)
    except ValueError as error:
        raise PlanError(f"a name that PEFT's rank_pattern cannot hold: {error}", hint="--exclude it") from None
    for name in ranks:
        found = (rank_of(name) or rank, alpha_of(name) or alpha)
        if found != (ranks[name], alphas[name]):
            raise PlanError(
                f"PEFT would give {name} the rank and alpha of another module, whose name has the same end",
                hint="give both the same rank and alpha",
            )
    return rank_pattern, alpha_pattern


def make_adapter_config(  # noqa: PLR0913  the fields of the file
    *,
    base: str,
    revision: str | None = None,
    rank: int,
    alpha: int,
    rslora: bool,
    dropout: float,
    init_lora_weights: bool | str = True,
    task_type: str | None,
    targets: PeftTargets,
    fan_in_fan_out: bool,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> dict[str, Any]:
    """Content of adapter_config.json.

    Args:
        base: The residual base, which PEFT's Auto classes load; or the original model, where nothing was taken out.
        revision: The commit of `base`, if it is on the Hub.
        rank, alpha: The defaults.
        ranks, alphas: Of every target, by its name in `targets.names`.

    Raises:
        PlanError: PEFT would find another target's rank or alpha for a target.
    """
    rank_pattern, alpha_pattern = rank_and_alpha_patterns(ranks, alphas, rank=rank, alpha=alpha)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        **({"revision": revision} if revision else {}),
        "r": rank,
        "lora_alpha": alpha,
        # PEFT's wrapper of a parameter supports neither dropout nor Conv1D.
        "lora_dropout": 0.0 if targets.parameters else dropout,
        "bias": "none",
        "target_modules": targets.modules,
        **({"target_parameters": targets.parameters} if targets.parameters else {}),
        "init_lora_weights": init_lora_weights,
        "inference_mode": False,
        "fan_in_fan_out": fan_in_fan_out and not targets.parameters,
        "use_rslora": rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
