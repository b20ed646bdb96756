"""Plan each weight to split: its rank, scale, dtype and seed, and its name in the adapter.

The same pass makes the content of adapter_config.json: PEFT must read from it the rank and the scale that the solver
uses here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.header import FLOATS, safetensors_name
from milora_init.errors import PlanError
from milora_init.linalg.cost import weights_at_once
from milora_init.lora.config import lora_scale, make_adapter_config, stacked_alpha
from milora_init.lora.targets import PeftTargets, matching, peft_targets, select, selects_experts
from milora_init.methods import Mode
from milora_init.model.adaptable import Adaptable, ModelStructure
from milora_init.options import DEFAULT_TARGET, InitOptions

_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_PACKED_DTYPES = ("I8", "U8", "I16", "U16", "I32", "U32")  # quantised formats store several values in each integer


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """One weight to split.

    Attributes:
        weight: The weight W of the model.
        source_dtype: Dtype of W, as in a safetensors header (`BF16`).
        dtype: Dtype of the residual, as in a safetensors header.
        rank: Rank r of the factors B (m, r) and A (r, n).
        scale: The residual is W - scale * B A.
        key: The part of the names of A and B in the adapter that names this weight.
        seed: Seed of this weight. It does not depend on the order in which the weights are solved.
    """

    weight: Adaptable
    source_dtype: str
    dtype: str
    rank: int
    scale: float
    key: str
    seed: int

    def most_at_once(self, mode: Mode) -> int:
        """How many weights like this one a GPU solves in one batch."""
        q, p = sorted(self.weight.shape)
        return weights_at_once(p, q, self.rank, mode)


def plan_weights(
    options: InitOptions,
    checkpoint: Checkpoint,
    structure: ModelStructure,
    measured: Mapping[str, Collection[str]] = {},
) -> tuple[tuple[WeightPlan, ...], dict[str, Any]]:
    """Return every weight to split, in the model's order, and the content of adapter_config.json.

    Raises:
        PlanError: The options do not fit the model.
    """
    _require_task_type(options.task_type, structure)
    selected = select(structure, _targets(options, structure), options.exclude, measured)
    targets = peft_targets(selected, structure)
    ranks_and_alphas = _ranks_and_alphas(selected, options)
    weights = tuple(
        _plan_weight(weight, checkpoint, options, ranks_and_alphas[weight.target], targets) for weight in selected
    )
    _require_possible_ranks(weights, options.rank)
    if options.nf4 and (expert := next((w for w in weights if w.weight.expert or w.weight.transposed), None)):
        raise PlanError(
            f"--nf4: bitsandbytes does not quantise {expert.weight.module} as a linear layer", hint="--exclude it"
        )
    return weights, _adapter_config(options, checkpoint, structure, targets, weights, ranks_and_alphas)


def _targets(options: InitOptions, structure: ModelStructure) -> tuple[str, ...]:
    """Return the targets of the options; without any, the default ones, or `all-linear` if the model lacks one."""
    if options.target is not None:
        return options.target
    return ("all-linear",) if lacking_default_targets(structure) else DEFAULT_TARGET


def lacking_default_targets(structure: ModelStructure) -> list[str]:
    """Return the default targets that select no weight of the model."""
    lacking = []
    for name in DEFAULT_TARGET:
        try:
            select(structure, [name])
        except PlanError:
            lacking.append(name)
    return lacking


def quantised_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tensors that look quantised although config.json names no quantisation, each with its format."""
    if checkpoint.quantisation:
        return {}  # a tensor that no rule reads was refused
    return {
        name: "packed"
        for name, info in checkpoint.stored.items()
        # (1, 1, n, n) is a causal mask, which GPT-2 checkpoints store as bytes.
        if info.dtype in _PACKED_DTYPES and len(info.shape) > 1 and info.shape[:2] != (1, 1)
    }


def weight_seed(seed: int, tensor: str, row: int | None) -> int:
    """Derive the seed of one weight from the seed of the run.

    Args:
        seed: The seed of the run.
        tensor: Name of the tensor that contains the weight.
        row: Index of an expert in a fused tensor; None if the tensor is the weight.

    Returns:
        An integer of at most 56 bits.
    """
    name = tensor if row is None else f"{tensor}[{row}]"
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _require_task_type(task_type: str | None, structure: ModelStructure) -> None:
    """Raise PlanError if PEFT could not load the adapter with this task type."""
    if task_type is None or task_type == structure.task_type or task_type in structure.task_types:
        return
    if task_type in _TASKS_WITH_HEAD:
        raise PlanError(
            f"task type {task_type}: PEFT expects the head's weights in the adapter, but milora-init writes none",
            hint="leave --task-type out; `A new head` in docs/trainers.md shows how to train a head with the pair",
        )
    reason = ": AutoModel gives its modules other names" if task_type == "FEATURE_EXTRACTION" else ""
    raise PlanError(
        f"task type {task_type} does not fit a {structure.architecture}{reason}", hint="leave --task-type out"
    )


def _ranks_and_alphas(selected: Sequence[Adaptable], options: InitOptions) -> dict[str, tuple[int, int]]:
    """Return (rank, alpha) by target: the value of the last pattern that matches it, else the value for all targets.

    Raises:
        PlanError: A pattern matches no selected weight.
    """
    ranks = _values_by_target("rank_pattern", options.rank_pattern, selected)
    alphas = _values_by_target("alpha_pattern", options.alpha_pattern, selected)
    result = {}
    for target in {weight.target: None for weight in selected}:
        rank = ranks.get(target, options.rank)
        default_alpha = rank if options.alpha is None else options.alpha
        result[target] = (rank, alphas.get(target, default_alpha))
    return result


def _values_by_target(option: str, patterns: Mapping[str, int], selected: Sequence[Adaptable]) -> dict[str, int]:
    """Resolve a rank_pattern or an alpha_pattern: the value of each target that a pattern matches.

    Raises:
        PlanError: A pattern matches no selected weight.
    """
    values: dict[str, int] = {}
    # A pattern may also match the module that owns a fused parameter.
    names = {name for w in selected for name in (w.target, w.target.rpartition(".")[0])}
    for pattern, value in patterns.items():
        matched_names = matching([pattern], names)
        targets = {w.target for w in selected if not w.expert and w.target in matched_names}
        targets |= {w.target for w in selected if w.expert and selects_experts(pattern, matched_names, w.target)}
        if not targets:
            raise PlanError(
                f"{option} names {pattern!r}, which matches no weight that is adapted",
                hint=f"remove this pattern, or add --target {pattern}",
            )
        values |= dict.fromkeys(targets, value)
    return values


def _plan_weight(
    weight: Adaptable,
    checkpoint: Checkpoint,
    options: InitOptions,
    rank_and_alpha: tuple[int, int],
    targets: PeftTargets,
) -> WeightPlan:
    """Plan one weight. Raises PlanError if its dtype is not one that the solver reads."""
    dtype = checkpoint.tensors[weight.tensor].dtype
    if dtype not in FLOATS:
        raise PlanError(
            f"{weight.tensor} is stored as {dtype} (packed): the singular components of these numbers are not those of "
            "the weight",
            hint="use the unquantised checkpoint, or dequantise this one and save it again",
        )
    rank, alpha = rank_and_alpha
    return WeightPlan(
        weight=weight,
        source_dtype=dtype,
        dtype=dtype if options.dtype == "auto" else safetensors_name(options.dtype),
        rank=rank,
        scale=lora_scale(rank, alpha, rslora=options.rslora),
        key=targets.keys[weight.target],
        seed=weight_seed(options.seed, weight.tensor, weight.row),
    )


def _require_possible_ranks(weights: Sequence[WeightPlan], rank: int) -> None:
    """Raise PlanError if a rank is above min(m, n) of its weight; `rank` is that of the weights without a pattern."""
    too_high = [w for w in weights if w.rank > min(w.weight.shape)]
    if too_high:
        w = min(too_high, key=lambda w: min(w.weight.shape))  # a rank that fits the smallest weight fits all others
        shape, limit = list(w.weight.shape), min(w.weight.shape)
        suffixes = dict.fromkeys(w.weight.target.rpartition(".")[2] for w in too_high)
        exclude = f", or --exclude {','.join(suffixes)}" if len(too_high) < len(weights) else ""
        what = f"rank {w.rank} is above the {limit} that {w.weight.module} allows: its shape is {shape}"
        if w.rank != rank:
            raise PlanError(what, hint=f"lower the rank in rank_pattern, to {limit} or less")
        raise PlanError(
            what,
            hint=f"--rank {limit}{exclude}, or a rank_pattern for them in a recipe",
        )


def _adapter_config(
    options: InitOptions,
    checkpoint: Checkpoint,
    structure: ModelStructure,
    targets: PeftTargets,
    weights: Sequence[WeightPlan],
    ranks_and_alphas: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    PEFT adapts a fused parameter with one pair of factors. Where each expert's gate and up projection are stacked in
    it, each has factors of its own, and the fused pair has the sum of their ranks.
    """
    parts = {w.weight.target: w.weight.expert.parts if w.weight.expert else 1 for w in weights}
    rslora = options.rslora
    return make_adapter_config(
        base=options.out if options.effective_method.writes_base else options.model,
        revision=None if options.effective_method.writes_base or not checkpoint.remote else checkpoint.remote.commit,
        rank=options.rank,
        alpha=options.lora_alpha,
        rslora=rslora,
        dropout=options.lora_dropout,
        init_lora_weights=options.effective_method.init_lora_weights,
        task_type=options.task_type or structure.task_type,
        targets=targets,
        fan_in_fan_out=all(w.weight.transposed for w in weights),
        ranks={targets.names[t]: rank * parts[t] for t, (rank, _) in ranks_and_alphas.items()},
        alphas={
            targets.names[t]: stacked_alpha(alpha, parts[t], rslora=rslora)
            for t, (_, alpha) in ranks_and_alphas.items()
        },
    )
