"""Make the content of adapter_config.json: ranks, alphas, scales and patterns.

The file contains only keys that every PEFT since 0.13 knows, because PEFT 0.13 refuses unknown keys. Everything else is
in the manifest. `init_lora_weights` is true and not "pissa", because with "pissa" PEFT would compute another SVD and
change the base. It is "mica" for that method, because only then PEFT freezes B; PEFT computes no SVD for it if it loads
with `low_cpu_mem_usage=True`. Experts, and modules that PEFT would map to experts, are listed in `target_parameters`,
which needs a newer PEFT.
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
    """The alpha that keeps the scale if the rank is multiplied by `parts`."""
    return alpha * math.sqrt(parts) if rslora and parts > 1 else alpha * parts


def match_pattern(patterns: Mapping[str, float]) -> Callable[[str], float | None]:
    """A function that looks up a name in rank_pattern or alpha_pattern as PEFT does.

    The first key that is a suffix of the name gives the value. Without such a key the function returns None.

    Raises:
        ValueError: A key is more than plain names. PEFT would use it as a regular expression.
    """
    position_and_value: dict[str, tuple[int, float]] = {}
    for position, (key, value) in enumerate(patterns.items()):
        for name in plain_names(key):
            position_and_value.setdefault(name, (position, value))

    def find(name: str) -> float | None:
        suffixes = name_suffixes(name) if position_and_value else []
        found = [position_and_value[suffix] for suffix in suffixes if suffix in position_and_value]
        return min(found)[1] if found else None

    return find


def rank_and_alpha_patterns(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, rank: int, alpha: float
) -> tuple[dict[str, int], dict[str, float]]:
    """Make rank_pattern and alpha_pattern, with an entry for each name whose rank or alpha is not the default.

    PEFT looks a target parameter `<module>.weight` up by its name, and vLLM by the module's: without an entry of that
    name, vLLM would use the default rank and alpha without a warning. So such a target has an entry of either name.

    Args:
        ranks, alphas: The rank and the alpha of every name.
        rank, alpha: The defaults.

    Raises:
        PlanError: PEFT would use the entry of another name for a name, or cannot have the name as a key.
    """
    not_default = [name for name in ranks if ranks[name] != rank or alphas[name] != alpha]
    keys = {key: name for name in not_default for key in (name, name.removesuffix(".weight"))}
    rank_pattern = {key: ranks[name] for key, name in keys.items()}
    alpha_pattern = {key: alphas[name] for key, name in keys.items()}
    try:
        rank_of, alpha_of = match_pattern(rank_pattern), match_pattern(alpha_pattern)
    except ValueError as error:
        raise PlanError(
            f"PEFT's rank_pattern cannot contain a module name: {error}", hint="--exclude the module"
        ) from None
    for name in ranks:
        found = (rank_of(name) or rank, alpha_of(name) or alpha)
        if found != (ranks[name], alphas[name]):
            raise PlanError(
                f"PEFT would give {name} the rank and alpha of another module, whose name is a suffix of this name",
                hint="give both modules the same rank and alpha",
            )
    return rank_pattern, alpha_pattern


def make_adapter_config(  # noqa: PLR0913  one parameter for each field of the file
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
    """Make the content of adapter_config.json.

    Args:
        base: The path or repository of the residual base, from which PEFT's Auto classes load the model; the original
            model, if the method writes no base.
        revision: The commit of `base`, if it is an original model on the Hub.
        rank, alpha: The default rank and alpha.
        rslora: Whether the scale is alpha / sqrt(rank).
        dropout: The dropout of the adapter. It is 0 in the file if there are `target_parameters`.
        init_lora_weights: True, or the name that PEFT needs to know; see `methods.Method`.
        task_type: PEFT's task type, or None.
        targets: The modules and parameters to adapt.
        fan_in_fan_out: Whether the modules store their weights as (in, out).
        ranks, alphas: The rank and alpha of every target, by its name in `targets.names`.

    Raises:
        PlanError: PEFT would use the rank or alpha of another target for a target.
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
