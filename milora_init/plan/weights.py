"""Plan each weight: its rank, its scale, and its names in the adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.header import safetensors_name
from milora_init.errors import PlanError
from milora_init.lora.config import lora_scale, make_adapter_config, stacked_alpha
from milora_init.lora.targets import PeftTargets, matching, peft_targets, select, selects_experts
from milora_init.model.adaptable import Adaptable, ModelStructure
from milora_init.options import InitOptions

_WITH_A_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_SOLVABLE = ("F64", "F32", "BF16", "F16")
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32")


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """One weight to split.

    Attributes:
        weight: Which.
        source_dtype, dtype: Before and after, in safetensors' names.
        rank, scale: Of its factors.
        key: What stands for it in the names of the adapter's tensors.
        seed: Its own, so that no weight's draw depends on the order of the work.
    """

    weight: Adaptable
    source_dtype: str
    dtype: str
    rank: int
    scale: float
    key: str
    seed: int


def plan_weights(
    options: InitOptions, checkpoint: Checkpoint, structure: ModelStructure
) -> tuple[tuple[WeightPlan, ...], dict[str, Any]]:
    """Every weight to split, in the model's order, and the content of adapter_config.json.

    Raises:
        PlanError: The request does not fit the model.
    """
    _require_task(options.task_type, structure)
    chosen = select(structure, options.target, options.exclude)
    targets = peft_targets(chosen, structure)
    sizes = _sizes(chosen, options)
    weights = tuple(_plan_weight(weight, checkpoint, options, sizes[weight.target], targets) for weight in chosen)
    _require_rank(weights)
    return weights, _adapter_config(options, structure, targets, weights, sizes)


def _require_task(task: str | None, structure: ModelStructure) -> None:
    if task is None or task == structure.task_type or task in structure.task_types:
        return
    if task in _WITH_A_HEAD:
        raise PlanError(
            f"task type {task}: PEFT wants the weights of the task's head in the adapter, and this one holds none",
            hint="leave --task-type out; the README's `A new head` has the lines that train a head with the pair",
        )
    why = ": AutoModel gives its modules other names" if task == "FEATURE_EXTRACTION" else ""
    raise PlanError(f"task type {task} does not fit a {structure.architecture}{why}", hint="leave --task-type out")


def quantised(checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors that look quantised, by their dtype and shape: each with `fp8` or `packed`."""
    return {
        name: _kind(info.dtype)
        for name, info in checkpoint.tensors.items()
        # A causal mask, as GPT-2 has one, is of bytes too.
        if info.dtype.startswith("F8") or (info.dtype in _PACKED and len(info.shape) > 1 and info.shape[:2] != (1, 1))
    }


def _kind(dtype: str) -> str:
    return "fp8" if dtype.startswith("F8") else "packed"


def own_seed(seed: int, tensor: str, row: int | None) -> int:
    """The seed of one weight."""
    name = tensor if row is None else f"{tensor}[{row}]"
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _sizes(chosen: Sequence[Adaptable], options: InitOptions) -> dict[str, tuple[int, int]]:
    """Rank and alpha of each target: the last pattern that names it, else what holds for all.

    Raises:
        PlanError: A pattern that names nothing.
    """
    ranks = _by_pattern("rank_pattern", options.rank_pattern, chosen)
    alphas = _by_pattern("alpha_pattern", options.alpha_pattern, chosen)
    sizes = {}
    for target in {weight.target: None for weight in chosen}:
        rank = ranks.get(target, options.rank)
        default = rank if options.alpha is None else options.alpha
        sizes[target] = (rank, alphas.get(target, default))
    return sizes


def _by_pattern(option: str, patterns: Mapping[str, int], chosen: Sequence[Adaptable]) -> dict[str, int]:
    found: dict[str, int] = {}
    names = {name for w in chosen for name in (w.target, w.target.rpartition(".")[0])}
    for pattern, value in patterns.items():
        matches = matching([pattern], names)
        linears = {w.target for w in chosen if not w.expert and w.target in matches}
        hits = linears | {w.target for w in chosen if w.expert and selects_experts(pattern, matches, w.target)}
        if not hits:
            raise PlanError(
                f"{option} names {pattern!r}, which matches no weight that is adapted",
                hint=f"drop it, or add --target {pattern}",
            )
        found |= dict.fromkeys(hits, value)
    return found


def _plan_weight(
    weight: Adaptable,
    checkpoint: Checkpoint,
    options: InitOptions,
    size: tuple[int, int],
    targets: PeftTargets,
) -> WeightPlan:
    dtype = checkpoint.tensors[weight.tensor].dtype
    if dtype not in _SOLVABLE:
        raise PlanError(
            f"{weight.tensor} is stored as {dtype}: {_kind(dtype)}, it has no singular components of its own",
            hint="start from the unquantised checkpoint, or dequantise it and save it again",
        )
    rank, alpha = size
    return WeightPlan(
        weight=weight,
        source_dtype=dtype,
        dtype=dtype if options.dtype == "auto" else safetensors_name(options.dtype),
        rank=rank,
        scale=lora_scale(rank, alpha, rslora=options.rslora),
        key=targets.keys[weight.target],
        seed=own_seed(options.seed, weight.tensor, weight.row),
    )


def _adapter_config(
    options: InitOptions,
    structure: ModelStructure,
    targets: PeftTargets,
    weights: Sequence[WeightPlan],
    sizes: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    parts = {w.weight.target: w.weight.expert.parts if w.weight.expert else 1 for w in weights}
    rslora = options.rslora
    return make_adapter_config(
        base=options.out,
        rank=options.rank,
        alpha=options.lora_alpha,
        rslora=rslora,
        dropout=options.dropout,
        task_type=options.task_type or structure.task_type,
        targets=targets,
        fan_in_fan_out=all(w.weight.transposed for w in weights),
        ranks={targets.names[t]: rank * parts[t] for t, (rank, _) in sizes.items()},
        alphas={targets.names[t]: stacked_alpha(alpha, parts[t], rslora=rslora) for t, (_, alpha) in sizes.items()},
    )


def _require_rank(weights: Sequence[WeightPlan]) -> None:
    too_high = [w for w in weights if w.rank > min(w.weight.shape)]
    if too_high:
        w = min(too_high, key=lambda w: min(w.weight.shape))  # what it allows, all others do
        shape, limit = list(w.weight.shape), min(w.weight.shape)
        suffix = w.weight.target.rpartition(".")[2]
        raise PlanError(
            f"rank {w.rank} is above the {limit} that {w.weight.module} allows: its shape is {shape}",
            hint=f"--rank {limit}, or --exclude {suffix}, or a rank_pattern for {suffix} in a recipe",
        )
