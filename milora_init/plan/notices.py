"""Notices of a plan: what the user should know before and after the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from milora_init.checkpoint.folder import SAFETENSORS_INDEX, SAFETENSORS_SINGLE, Checkpoint, left_out
from milora_init.checkpoint.header import torch_name
from milora_init.lora.peft_versions import PEFT_FOR_EXPERTS
from milora_init.model.adaptable import ModelStructure
from milora_init.options import InitOptions
from milora_init.plan.output_files import config_dtypes
from milora_init.plan.weights import WeightPlan, lacking_default_targets, quantised

_LISTED = 8  # names in a notice


def plan_notices(
    options: InitOptions,
    checkpoint: Checkpoint,
    structure: ModelStructure,
    weights: Sequence[WeightPlan],
    adapter_config: Mapping[str, Any],
) -> list[str]:
    """One sentence for each thing that the user should know about a plan."""
    notices = _about_targets(options, structure)
    notices += _about_class(options, checkpoint, structure)
    if adapter_config.get("target_parameters"):
        notices.append(
            f"experts are adapted through target_parameters: training needs PEFT >= {PEFT_FOR_EXPERTS}"
            + (f", and lora_dropout is 0 instead of {options.dropout}" if options.dropout else "")
        )
    if structure.experts and not any(w.weight.expert for w in weights):
        count = sum(len(group) for group in structure.experts.values())
        notices.append(f"the {count} matrices of the experts are left as they are; --target experts adapts them too")
    if left := [t for t in structure.towers if not any(w.weight.module.startswith(f"{t}.") for w in weights)]:
        notices.append(f"{' and '.join(left)} left as it is; a target that names it adapts it too")
    notices += _about_files(checkpoint, structure)
    if whole := [w for w in weights if w.rank == min(w.weight.shape)]:
        first = f"rank {whole[0].rank} is all that {whole[0].weight.module} has"
        notices.append(f"{first}: nothing of {len(whole)} weights stays in the base")
    stored = {torch_name(w.dtype) for w in weights}
    for dtype in config_dtypes(checkpoint.config) if options.dtype == "auto" else ():
        if stored != {dtype}:
            notices.append(
                f"residuals are stored as {' and '.join(sorted(stored))}, but config.json says {dtype} and transformers"
                f" will cast them on load; `--dtype {sorted(stored)[0]}` makes config.json agree"
            )
    return notices


def _about_targets(options: InitOptions, structure: ModelStructure) -> list[str]:
    """Whether the default targets were replaced."""
    lacking = lacking_default_targets(structure) if options.target is None else []
    if not lacking:
        return []
    return [
        f"a {structure.architecture} has no {', '.join(lacking)}: all-linear is adapted instead of the default targets"
    ]


def _about_class(options: InitOptions, checkpoint: Checkpoint, structure: ModelStructure) -> list[str]:
    """Which class loads the pair, where AutoModelForCausalLM builds another one."""
    notices = []
    if structure.other_class and options.text_only:
        notices.append(
            f"the adapter is for AutoModelForCausalLM, which builds a {structure.architecture}; in a "
            f"{structure.other_class} its modules have other names, and PEFT would not load them"
        )
    elif structure.other_class:
        notices.append(
            f"load the base as a {structure.architecture}: AutoModelForCausalLM builds a {structure.other_class}, in "
            f"which the adapter's modules have other names, and PEFT would not load them"
            + ("; --text-only makes an adapter for that one" if "text_config" in checkpoint.config else "")
        )
    return notices


def _about_files(checkpoint: Checkpoint, structure: ModelStructure) -> list[str]:
    """What of the model's folder is ignored or looks quantised."""
    notices = []
    if (checkpoint.folder / SAFETENSORS_INDEX).is_file() and checkpoint.index is None:
        notices.append(
            f"the source has both {SAFETENSORS_SINGLE} and an index; as transformers does, the index is ignored"
        )
    if checkpoint.unfilled:
        notices.append(
            f"the index names {_listed(checkpoint.unfilled)}, which no file has and {structure.architecture} does not "
            "need: the output's index leaves this out"
        )
    if left := left_out(checkpoint):
        notices.append(f"left out: {_listed(left)}")
    if packed := quantised(checkpoint):
        what = " and ".join(sorted(set(packed.values())))
        notices.append(
            f"{len(packed)} tensors are {what}, {next(iter(packed))} first, although config.json has no "
            "quantization_config: they are copied as they are, and transformers would load them without their scales"
        )
    return notices


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
