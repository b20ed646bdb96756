"""The adapter folder: what PEFT reads from `lora/`.

adapter_config.json holds only keys that every PEFT since 0.13 knows, because 0.13 refuses a key it does not know; our
own facts are in the manifest. `init_lora_weights` is true and not "pissa": PEFT would run another SVD and change the
base. Experts and what PEFT would take for experts go by `target_parameters`, which asks for a newer PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_init.errors import PlanError
from milora_init.layout import factor_shapes, lora_key
from milora_init.naming import Adaptable, Naming
from milora_init.safetensors_format import Header, plan_header
from milora_init.targets import ends, named
from milora_init.untrusted import plain_names

FOLDER = "lora"
CONFIG = f"{FOLDER}/adapter_config.json"
WEIGHTS = f"{FOLDER}/adapter_model.safetensors"

PEFT_FOR_MODULES = "0.13"
PEFT_FOR_EXPERTS = "0.19.1"  # the first that knows which side of a fused parameter is `out`


@dataclass(frozen=True, slots=True)
class Targets:
    """What PEFT is told to adapt.

    Attributes:
        modules: `target_modules`: a list of names and suffixes, or one regular expression.
        parameters: `target_parameters`, full names.
        keys: By target, what stands for it in the names of the adapter's tensors.
        names: By target, what PEFT looks up in rank_pattern and alpha_pattern.
    """

    modules: list[str] | str
    parameters: list[str]
    keys: Mapping[str, str]
    names: Mapping[str, str]


def plan_targets(weights: Iterable[Adaptable], naming: Naming) -> Targets:
    """How PEFT is to be told of exactly these weights, in the model's order.

    Raises:
        PlanError: There is no way to name them.
    """
    modules: list[str] = []
    wrapped: list[str] = []
    fused: list[str] = []
    for weight in {weight.target: weight for weight in weights}.values():
        as_parameter = weight.target.rpartition(".")[2] in naming.as_parameters
        (fused if weight.expert else wrapped if as_parameter else modules).append(weight.target)
    names = {module: module for module in modules} | {module: f"{module}.weight" for module in wrapped}
    keys = {module: module for module in (*modules, *wrapped)}
    # PEFT wraps an owner once for each of its parameters, the first inmost.
    owners = [parameter.rpartition(".")[0] for parameter in fused]
    for place, parameter in enumerate(fused):
        names[parameter] = parameter
        keys[parameter] = owners[place] + ".base_layer" * owners[place + 1 :].count(owners[place])
    targets = target_modules(modules, naming.modules) if modules else []
    if naming.as_parameters and isinstance(targets, str):
        raise PlanError(
            "PEFT cannot be told of these modules of a model with experts without hitting others",
            hint="--target the modules of one kind only",
        )
    return Targets(targets, sorted(names[target] for target in (*wrapped, *fused)), keys, names)


def plan_adapter(weights: Iterable[tuple[str, int, Adaptable]]) -> Header:
    """Header of the adapter's file, in float32, for each (key, rank, weight); the experts of a layer share a key."""
    tensors: dict[str, tuple[int, int]] = {}
    for key, rank, weight in weights:
        A, B = factor_shapes(rank, weight.shape, weight.expert)
        tensors |= {lora_key(key, "A"): A, lora_key(key, "B"): B}
    return plan_header(((name, "F32", shape) for name, shape in tensors.items()), metadata={"format": "pt"})


def targeted(targets: object, modules: Sequence[str]) -> set[str]:
    """The modules that PEFT resolves `target_modules` to: a list of names and suffixes, or full names joined by `|`.

    Raises:
        ValueError: A regular expression that is more than that.
    """
    if isinstance(targets, str):
        return set(plain_names(targets)).intersection(modules)
    return named(map(str, targets), modules) if isinstance(targets, (list, tuple)) else set()


def target_modules(adapted: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """The shortest `target_modules` that PEFT resolves to exactly the adapted modules.

    Suffixes like `q_proj` where they hit nothing else, full names where they would, and where even a full name is
    another module's end, one regular expression, which PEFT matches from end to end.
    """
    wanted = set(adapted)
    for names in (sorted({module.rpartition(".")[2] for module in adapted}), sorted(adapted)):
        if named(names, modules) == wanted:
            return names
    return "|".join(re.escape(module) for module in sorted(adapted))


def scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """What PEFT multiplies B @ A with: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def stacked_alpha(alpha: int, parts: int, *, rslora: bool) -> float:
    """The alpha at which `parts` stacked matrices of one rank keep the scale that each has by itself."""
    return alpha * math.sqrt(parts) if rslora and parts > 1 else alpha * parts


def pattern_of(patterns: Mapping[str, float]) -> Callable[[str], float | None]:
    """What PEFT finds for a name in rank_pattern or alpha_pattern: the value of the first key that is its end.

    Raises:
        ValueError: A key that is more than plain names; PEFT takes it for a regular expression.
    """
    places: dict[str, tuple[int, float]] = {}
    for place, (key, value) in enumerate(patterns.items()):
        for name in plain_names(key):
            places.setdefault(name, (place, value))

    def find(name: str) -> float | None:
        found = [places[end] for end in ends(name) if end in places] if places else []
        return min(found)[1] if found else None

    return find


def patterns(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, rank: int, alpha: float
) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern: for each name that has another rank or alpha than the defaults, its own.

    Raises:
        PlanError: PEFT would find another rank or alpha for a name than its own.
    """
    other = [name for name in ranks if ranks[name] != rank or alphas[name] != alpha]
    rank_pattern = {name: ranks[name] for name in other}
    alpha_pattern = {name: alphas[name] for name in other}
    try:
        rank_of, alpha_of = pattern_of(rank_pattern), pattern_of(alpha_pattern)
    except ValueError as error:
        raise PlanError(f"PEFT cannot be told the rank of a module: {error}", hint="--exclude it") from None
    for name in ranks:
        found = (rank_of(name) or rank, alpha_of(name) or alpha)
        if found != (ranks[name], alphas[name]):
            raise PlanError(
                f"PEFT would give {name} the rank and alpha of another module whose name ends alike",
                hint="give both the same rank and alpha",
            )
    return rank_pattern, alpha_pattern


def adapter_config(
    *,
    base: str,
    rank: int,
    alpha: int,
    rslora: bool,
    dropout: float,
    task_type: str | None,
    targets: Targets,
    fan_in_fan_out: bool,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> dict[str, Any]:
    """Content of adapter_config.json.

    Args:
        base: The residual base, which PEFT's Auto classes load.
        rank, alpha: The defaults; `ranks` and `alphas` hold every target's own, by the name in `targets.names`.

    Raises:
        PlanError: PEFT would find another rank or alpha for a target than its own.
    """
    rank_pattern, alpha_pattern = patterns(ranks, alphas, rank=rank, alpha=alpha)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT's wrapper of a parameter has no dropout and knows no Conv1D.
        "lora_dropout": 0.0 if targets.parameters else dropout,
        "bias": "none",
        "target_modules": targets.modules,
        **({"target_parameters": targets.parameters} if targets.parameters else {}),
        "init_lora_weights": True,
        "inference_mode": False,
        "fan_in_fan_out": fan_in_fan_out and not targets.parameters,
        "use_rslora": rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
