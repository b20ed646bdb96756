"""Write the notices of a plan: one sentence for each fact that the user should know before the run.

A notice never stops the run. `--dry-run` and the run print the notices, and the manifest records them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from milora_init.checkpoint.folder import SAFETENSORS_INDEX, SAFETENSORS_SINGLE, Checkpoint, unloaded_weights
from milora_init.checkpoint.header import torch_name
from milora_init.lora.peft_versions import PEFT_FOR_EXPERTS
from milora_init.model.adaptable import ModelStructure
from milora_init.options import InitOptions
from milora_init.plan.output_files import config_dtypes
from milora_init.plan.weights import WeightPlan, lacking_default_targets, quantised_tensors

_MAX_NAMES = 8  # in one notice


def plan_notices(
    options: InitOptions,
    checkpoint: Checkpoint,
    structure: ModelStructure,
    weights: Sequence[WeightPlan],
    adapter_config: Mapping[str, Any],
) -> list[str]:
    """Return the notices of a plan with these weights and this adapter_config.json."""
    return [
        *_class_notices(options, checkpoint, structure),
        *_target_notices(options, structure, weights, adapter_config),
        *_file_notices(checkpoint, structure),
        *_rank_notices(options, weights),
        *_dropout_notices(options, adapter_config),
        *_dtype_notices(options, checkpoint, weights),
        *_quantisation_notices(options, checkpoint, weights),
    ]


def _class_notices(options: InitOptions, checkpoint: Checkpoint, structure: ModelStructure) -> list[str]:
    """Name the class that the model must be loaded as, if AutoModelForCausalLM builds another one."""
    if not structure.other_class:
        return []
    model = "base" if options.effective_method.writes_base else "model"
    if options.text_only:
        return [
            f"load the {model} with AutoModelForCausalLM, which builds a {structure.architecture}: in a "
            f"{structure.other_class} the modules have other names, and PEFT would not load the adapter's tensors"
        ]
    return [
        f"load the {model} as a {structure.architecture}: AutoModelForCausalLM builds a {structure.other_class}, in "
        f"which the modules have other names, and PEFT would not load the adapter's tensors"
        + ("; --text-only makes an adapter for that class" if "text_config" in checkpoint.config else "")
    ]


def _target_notices(
    options: InitOptions,
    structure: ModelStructure,
    weights: Sequence[WeightPlan],
    adapter_config: Mapping[str, Any],
) -> list[str]:
    """Name what adapted experts require, and the experts and towers that are not adapted."""
    notices = []
    if options.target is None and (lacking := lacking_default_targets(structure)):
        notices.append(
            f"{structure.architecture} lacks {', '.join(lacking)} of the default targets: all-linear is adapted instead"
        )
    if adapter_config.get("target_parameters"):
        notices.append(
            f"experts are adapted through target_parameters: training needs PEFT >= {PEFT_FOR_EXPERTS}"
            + (f", and lora_dropout is 0 instead of {options.lora_dropout}" if options.lora_dropout else "")
        )
    if structure.experts and not any(w.weight.expert for w in weights):
        count = sum(len(group) for group in structure.experts.values())
        notices.append(f"the {count} matrices of the experts are left as they are; --target experts adapts them too")
    skipped = [t for t in structure.towers if not any(w.weight.module.startswith(f"{t}.") for w in weights)]
    if skipped:
        notices.append(f"not adapted: {' and '.join(skipped)}; a --target that contains the name adapts it too")
    return notices


def _file_notices(checkpoint: Checkpoint, structure: ModelStructure) -> list[str]:
    """Name what is ignored in the model's folder, and tensors that look quantised."""
    notices = []
    if (checkpoint.folder / SAFETENSORS_INDEX).is_file() and checkpoint.index is None:
        notices.append(
            f"the source has both {SAFETENSORS_SINGLE} and an index; as in transformers, the index is ignored"
        )
    if checkpoint.missing_tensors:
        notices.append(
            f"the index names {_join(checkpoint.missing_tensors)}, which no file has and {structure.architecture} "
            "does not need: the output's index does not name them"
        )
    if unloaded := unloaded_weights(checkpoint):
        notices.append(f"not copied, because transformers does not load them: {_join(unloaded)}")
    if quantised := quantised_tensors(checkpoint):
        notices.append(
            f"{len(quantised)} tensors look quantised (packed), the first is {next(iter(quantised))}, but "
            "config.json has no quantization_config: they are copied unchanged, and transformers would load them "
            "without their scales"
        )
    return notices


def _rank_notices(options: InitOptions, weights: Sequence[WeightPlan]) -> list[str]:
    """Name a weight all of whose components are taken out."""
    if not options.effective_method.writes_base:
        return []
    full_rank = [w for w in weights if w.rank == min(w.weight.shape)]
    if not full_rank:
        return []
    return [
        f"rank {full_rank[0].rank} is the full rank of {full_rank[0].weight.module}: the adapter takes all components "
        f"of {len(full_rank)} weights, and none stays in the base"
    ]


def _dropout_notices(options: InitOptions, adapter_config: Mapping[str, Any]) -> list[str]:
    """Say what a dropout that was asked for does."""
    method, dropout = options.effective_method, adapter_config["lora_dropout"]
    if not dropout:
        return []
    if method.writes_base:
        why = (
            "in training mode it removes a part of the component that was taken out of the base, so the training "
            "starts from another function than the model's, with a higher loss"
        )
    elif method.factors == "right":
        why = "in reinforcement learning the policy that samples and the policy that is trained would differ"
    else:
        why = "it removes a part of what A reads"
    return [f"lora_dropout is {dropout}, from the recipe or --dropout: {why}; --dropout 0 switches it off"]


def _dtype_notices(options: InitOptions, checkpoint: Checkpoint, weights: Sequence[WeightPlan]) -> list[str]:
    """Warn if transformers would cast the residuals on load, which rounds them a second time."""
    if options.dtype != "auto" or not options.effective_method.writes_base:
        return []
    stored = sorted({torch_name(w.dtype) for w in weights})
    return [
        f"residuals are stored as {' and '.join(stored)}, but config.json says {dtype}, and transformers will cast "
        f"them on load; `--dtype {stored[0]}` writes that dtype into config.json"
        for dtype in config_dtypes(checkpoint.config)
        if stored != [dtype]
    ]


def _quantisation_notices(options: InitOptions, checkpoint: Checkpoint, weights: Sequence[WeightPlan]) -> list[str]:
    """Say what the components of weights with few bits are, and how to load a base of NF4's numbers."""
    if options.nf4:
        return [
            "the base holds numbers of NF4: load it with BitsAndBytesConfig(load_in_4bit=True, "
            'bnb_4bit_quant_type="nf4") and without double quantisation, which would change them'
        ]
    tensors = checkpoint.quantised.tensors
    rules = [tensors[w.weight.tensor].rule for w in weights if w.weight.tensor in tensors]
    few = [rule for rule in rules if rule.bits <= 4]
    if not few or options.effective_method.mode == "max":
        return []
    formats = _join(list(dict.fromkeys(rule.format for rule in few)))
    return [
        f"{len(few)} of {len(weights)} adapted weights are stored in {few[0].bits} bits ({formats}): their minor "
        "directions are those of the stored weights, and may differ from those of the weights before quantisation"
    ]


def _join(names: Sequence[str]) -> str:
    """Join names for a sentence, at most `_MAX_NAMES` of them."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
