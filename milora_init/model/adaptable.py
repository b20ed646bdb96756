"""Find the weights of a model that PEFT can adapt.

An adapter names modules, and a checkpoint names tensors. These names differ, because transformers renames tensors while
it loads them: it adds or removes prefixes, fuses experts, and turns `embed_out` into `lm_head`. Therefore the model is
built on the meta device, and `meta_model` finds the tensors that fill each parameter.

PEFT can adapt a module only if a call of the module computes x @ W.T. Therefore each candidate is called once on the
meta device, and the model's own forward pass must call it too. A module that cannot be adapted gets a recorded reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_init.checkpoint.header import REFETCH
from milora_init.errors import CheckpointError
from milora_init.expert_slot import ExpertSlot
from milora_init.model import meta_model
from milora_init.model.meta_model import ParameterSource

EXPERTS = "experts"
# Names that expert layers had before transformers 5 fused them. PEFT maps a target with such a name to the fused
# parameter, even if the target is an ordinary module.
_LEGACY_EXPERT_NAMES = frozenset({"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"})
# PEFT refuses to adapt the out_proj of these model types.
_MAMBA_MODEL_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
# The operations with which transformers fuses experts and that can be undone, with the number of matrices that each
# expert has on disk: one, or two (gate and up).
_MATRICES_PER_EXPERT: Mapping[tuple[str, ...], int] = {
    ("MergeModulelist(0)",): 1,
    ("MergeModulelist(0)", "Concatenate(1)"): 2,
}
_TASK_HEADS = ("score", "classifier", "qa_outputs")
_NO_TENSOR = "filled by no tensor of the checkpoint"
_SEVERAL_TENSORS = "built from several tensors when transformers loads the model"
_ONE_MODEL_HINT = "config.json and the weights are of different models: use the files of one model"


@dataclass(frozen=True, slots=True)
class Adaptable:
    """A weight that an adapter can be added to.

    Attributes:
        module: The module's name in PEFT. One expert is no module; its name here is unique, but PEFT does not know it.
        tensor: The tensor's name on disk.
        shape: (out, in), also if the tensor is stored as (in, out).
        transposed: Whether the tensor is stored as (in, out), as in GPT-2's Conv1D.
        row: The index in the first dimension, if the tensor holds one matrix for each expert; else None.
        expert: The position in the fused parameter; None for the weight of a module.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool
    row: int | None = None
    expert: ExpertSlot | None = None

    @property
    def target(self) -> str:
        """The name that PEFT gets as a target: the module, or the fused parameter."""
        return self.expert.parameter if self.expert else self.module

    @property
    def suffix(self) -> str:
        """The end of the name, which is the same in all layers."""
        return self.expert.suffix if self.expert else self.module.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """The modules of a checkpoint's model, and which of them can be adapted.

    Attributes:
        architecture: The class that config.json names.
        task_type: PEFT's task type for this class; None if no type fits every use of the class.
        task_types: All task types with which PEFT can load an adapter for this class.
        modules: Every module name, in the model's order. PEFT matches targets against these names.
        adaptable: The module weights that can be adapted, by module name.
        experts: The expert weights that can be adapted, by the name of the fused parameter.
        refused: Reasons by the name of a module or parameter that cannot be adapted. Each completes "NAME is ...".
        heads: Adaptable modules that `all-linear` does not select: the task heads.
        towers: Vision and audio models inside the model. A target adapts their modules only if it names the tower.
        legacy_expert_names: Last parts of module names that PEFT, for this model type, maps to fused experts. Such a
            module can be adapted only as the parameter `<module>.weight`.
        other_class: A second class that can be built from the same config.json, and in which the adapted modules have
            other names. With `text_only` it is the class in config.json, else the class that AutoModelForCausalLM
            builds. Empty if there is none.
    """

    architecture: str
    task_type: str | None
    task_types: frozenset[str]
    modules: tuple[str, ...]
    adaptable: Mapping[str, Adaptable]
    experts: Mapping[str, tuple[Adaptable, ...]]
    refused: Mapping[str, str]
    heads: frozenset[str]
    towers: tuple[str, ...]
    legacy_expert_names: frozenset[str]
    other_class: str = ""


def read_structure(  # noqa: PLR0913  each parameter is one fact about the checkpoint
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    packed: Mapping[str, str] = {},
    missing_tensors: Collection[str] = (),
    trust_remote_code: bool = False,
    text_only: bool = False,
) -> ModelStructure:
    """Build the model on the meta device and find the module of every tensor.

    Args:
        folder: A folder that contains config.json.
        config: The content of config.json.
        shapes: The shape of every tensor of the checkpoint, by its name on disk.
        packed: Tensors that look quantised, with a description of each.
        missing_tensors: Tensors that the index lists and no file contains.
        trust_remote_code: Run the code in the folder if config.json refers to it.
        text_only: Build the class that AutoModelForCausalLM chooses, not the class in config.json.

    Raises:
        CheckpointError: config.json names no class of transformers; or the tensors do not fit this class; or the class
            needs a missing tensor.
        PlanError: `text_only` is set, but AutoModelForCausalLM has no text-only class for this config.json.
    """
    _refuse_more_layers_than_tensors(folder, config, len(shapes))
    model = meta_model.build_meta_model(folder, config, trust_remote_code=trust_remote_code, text_only=text_only)
    architecture = type(model).__name__
    sources = meta_model.parameter_sources(model, shapes)
    if not sources:
        raise CheckpointError(
            f"{folder}: no tensor belongs to {architecture}, the class in config.json; "
            f"the first tensor is {next(iter(shapes), None)}",
            hint=_ONE_MODEL_HINT,
        )
    _refuse_packed(model, sources, shapes, packed)
    if needed := meta_model.needed_tensors(model, sources, missing_tensors):
        raise CheckpointError(
            f"{folder}: the index names {needed[0]}, which {architecture} needs, but its file does not contain it",
            hint=REFETCH,
        )
    adaptable, refused_modules = _find_modules(model, sources, shapes, packed)
    experts, refused_experts = _find_experts(model, sources, shapes)
    towers = tuple(meta_model.find_towers(model))
    other = _build_class_in_config(folder, config, trust_remote_code) if text_only else _build_auto_class(model)
    adaptable_names = [*adaptable, *(name.rpartition(".")[0] for name in experts)]
    return ModelStructure(
        architecture=architecture,
        task_type=_certain_task_type(model),
        task_types=_loadable_task_types(model),
        modules=tuple(name for name, _ in model.named_modules() if name),
        adaptable=adaptable,
        experts=experts,
        refused=refused_modules | refused_experts,
        heads=frozenset(name for name in adaptable if name in _TASK_HEADS),
        towers=towers,
        legacy_expert_names=_LEGACY_EXPERT_NAMES if meta_model.fuses_experts(model) else frozenset(),
        other_class="" if other is None or _has_modules(other, adaptable_names, towers) else type(other).__name__,
    )


def _find_modules(
    model: nn.Module,
    sources: Mapping[str, ParameterSource],
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, str],
) -> tuple[dict[str, Adaptable], dict[str, str]]:
    """The modules whose weights can be adapted, and the reasons for those that cannot.

    Raises:
        CheckpointError: A tensor has another shape than the module's weight.
    """
    refusals = _Refusals(model)
    packed_modules = {tensor.rpartition(".")[0]: f"{what}: it is stored as {tensor}" for tensor, what in packed.items()}
    adaptable: dict[str, Adaptable] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not name or not isinstance(weight, nn.Parameter):
            continue
        if weight.dim() > 2:
            refused[name] = f"{_with_article(module)}, not a linear layer"
            continue
        source = sources.get(f"{name}.weight", ParameterSource())
        if reason := refusals.reason(name, module) or _reason_not_one_tensor(source, packed_modules.get(name, "")):
            refused[name] = reason
        else:
            _require_shape(source.tensors[0], shapes, tuple(weight.shape))
            adaptable[name] = Adaptable(name, source.tensors[0], _out_in(module), _is_conv1d(module))
    return adaptable, refused


def _find_experts(
    model: nn.Module, sources: Mapping[str, ParameterSource], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[Adaptable, ...]], dict[str, str]]:
    """The fused parameters whose experts can be adapted, and the reasons for those that cannot.

    Raises:
        CheckpointError: A tensor has another shape than its part of the parameter.
    """
    modules = dict(model.named_modules())
    experts: dict[str, tuple[Adaptable, ...]] = {}
    refused: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if parameter.dim() != 3 or not _is_expert_parameter(name, owner):
            continue
        found = _expert_weights(name, parameter, owner, sources.get(name, ParameterSource()), shapes)
        if isinstance(found, str):
            refused[name] = found
        else:
            experts[name] = found
    return experts, refused


def _build_class_in_config(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> nn.Module | None:
    """The model of the class in config.json; None if it cannot be built, because then nobody can load it by mistake."""
    with suppress(CheckpointError):
        return meta_model.build_meta_model(folder, config, trust_remote_code=trust_remote_code)
    return None


def _build_auto_class(model: nn.Module) -> nn.Module | None:
    """The model that AutoModelForCausalLM builds from the model's config, if it is of another class; else None.

    Encoder-decoder models and masked language models are excluded: they are not loaded with AutoModelForCausalLM.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config: Any = model.config
    cls = meta_model.causal_class(config)
    is_not_causal = getattr(config, "is_encoder_decoder", False) or type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if cls is not None and cls is not type(model) and not is_not_causal:
        with suppress(Exception):  # nobody can load by mistake what cannot be built
            return meta_model.build_causal_model(config)
    return None


def _has_modules(model: nn.Module, names: Iterable[str], towers: tuple[str, ...]) -> bool:
    """Whether the model has all modules of these names, not counting those inside `towers`."""
    own = {name for name, _ in model.named_modules()}
    return all(name in own or name.startswith(tuple(f"{tower}." for tower in towers)) for name in names)


class _Refusals:
    """Finds the reason why a module of a model cannot be adapted."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names_by_parameter: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names_by_parameter.setdefault(id(parameter), []).append(name)
        self._output_head = _output_head(model)
        self._uncalled = meta_model.uncalled_modules(model)
        has_experts = any(_is_expert_module(name, module) for name, module in model.named_modules())
        self._routers = meta_model.routing_modules(model) if has_experts else set()
        self._is_mamba = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_MODEL_TYPES

    def reason(self, name: str, module: nn.Module) -> str:
        """The reason, as a text that completes "NAME is ..."; empty if the module can be adapted."""
        parent = self._model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Linear) and not _is_conv1d(module):
            return f"{_with_article(module)}, not a linear layer"
        if isinstance(parent, nn.MultiheadAttention) or name in self._uncalled:
            return f"never called: its parent, {_with_article(parent)}, reads the weight directly"
        if not _computes_linear_product(module):
            return f"{_with_article(module)}, which does not compute x @ W.T"
        if module is self._output_head:
            return "the output head"
        if tied := [other for other in self._names_by_parameter[id(module.weight)] if other != f"{name}.weight"]:
            return f"tied to {tied[0]}"
        if name in self._routers or self._has_router_shape(name, module):
            return "a router: it chooses experts"
        if any("router" in f"{part} {type(outer).__name__}".lower() for part, outer in self._with_parents(name)):
            return "a part of a router"
        if self._is_mamba and name.rpartition(".")[2] == "out_proj":
            return "the out_proj of a Mamba mixer, which reads the weight directly and would ignore an adapter"
        return ""

    def _with_parents(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """The last part of the name, and the module, of a module and of each of its parents, the module first.

        Stops before the first module that is a whole transformers model.
        """
        while name and not hasattr(module := self._model.get_submodule(name), "config_class"):
            yield name.rpartition(".")[2], module
            name = name.rpartition(".")[0]

    def _has_router_shape(self, name: str, module: nn.Module) -> bool:
        """Whether the number of outputs of a linear layer, and its place near experts, are those of a router.

        For example `mlp.gate` with 8 outputs beside `mlp.experts` with 8 experts. With one output it is the gate of a
        shared expert. With one output for each expert it is a router, unless the forward pass showed that another
        module of the block is the router. If the layer is not a sibling of the experts, it must also be called a gate,
        or be inside one.
        """
        outputs, is_sibling, is_gate = _out_in(module)[0], True, False
        for part, outer in self._with_parents(name):
            if part.isdigit() and not is_sibling:  # a whole layer: outside it are the experts of other layers
                return False
            words = part.split("_")
            has_gate_name = "gate" in words and "proj" not in words  # gate_proj belongs to a gated MLP
            is_gate = is_gate or has_gate_name or type(outer).__name__.endswith(("Gate", "Gating"))
            name = name.rpartition(".")[0]
            children = self._model.get_submodule(name).named_children()
            experts = [child for child_name, child in children if _is_expert_module(child_name, child)]
            if experts and outputs == 1:
                return True
            if experts and (is_sibling or is_gate) and outputs in _expert_counts(experts):
                is_known = any(router.startswith(f"{name}.") for router in self._routers)  # by the forward pass
                return not is_known
            is_sibling = False
        return False


def _refuse_packed(
    model: nn.Module,
    sources: Mapping[str, ParameterSource],
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, str],
) -> None:
    """Raise CheckpointError if a tensor looks quantised and has another shape than the parameter that it fills."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in sources.keys() & parameters.keys():
        for tensor in sources[name].tensors:
            shape = tuple(parameters[name].shape)
            if tensor in packed and not sources[name].operations and shapes[tensor] != shape:
                raise CheckpointError(
                    f"{tensor} is {packed[tensor]}: its shape is {list(shapes[tensor])} on disk and {list(shape)} in "
                    "the model, and config.json has no quantization_config",
                    hint="start from the unquantised checkpoint, or dequantise it and save it again",
                )


def _reason_not_one_tensor(source: ParameterSource, packed_reason: str) -> str:
    """The reason if a weight is not exactly one tensor on disk, else empty."""
    if not source.tensors:
        return packed_reason or _NO_TENSOR
    return _SEVERAL_TENSORS if source.operations or len(source.tensors) > 1 else ""


def _require_shape(tensor: str, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
    if shapes[tensor] != shape:
        raise CheckpointError(
            f"{tensor} has shape {list(shapes[tensor])} on disk, but {list(shape)} by config.json",
            hint=_ONE_MODEL_HINT,
        )


def _is_expert_parameter(parameter: str, owner: nn.Module) -> bool:
    """Whether a fused parameter belongs to experts: by its name, or by the class of its module."""
    return _is_named_experts(parameter) or type(owner).__name__.endswith("Experts")


def _is_named_experts(parameter: str) -> bool:
    """Whether PEFT takes it for a parameter of experts: `mlp.experts.gate_up_proj`, `mlp.experts`."""
    return EXPERTS in parameter.split(".")[-2:]


def _expert_weights(
    name: str, parameter: nn.Parameter, owner: nn.Module, source: ParameterSource, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Adaptable, ...] | str:
    """The matrices of a fused parameter, or the reason why they cannot be adapted."""
    count, *matrix = parameter.shape
    # PEFT expects (count, out, in), unless the module declares that it stores (count, in, out).
    transposed = bool(getattr(owner, "is_transposed", False))
    rows, columns = reversed(matrix) if transposed else matrix
    if not _is_named_experts(name):
        return f"a parameter of {_with_article(owner)} whose name is not `{EXPERTS}`"
    if count < 2:
        return "a single expert, which PEFT treats as an ordinary layer"
    if not source.tensors:
        return _NO_TENSOR
    if not source.operations:
        if len(source.tensors) > 1:
            return _SEVERAL_TENSORS
        (tensor,) = source.tensors
        _require_shape(tensor, shapes, tuple(parameter.shape))
        return tuple(
            Adaptable(f"{name}[{e}]", tensor, (rows, columns), transposed, e, ExpertSlot(name, e, count, 0, 1))
            for e in range(count)
        )
    if _MATRICES_PER_EXPERT.get(source.operations) != len(source.parts) or transposed:
        return f"fused by {', '.join(source.operations)}, which milora-init does not support"
    found = []
    for part, tensors in enumerate(source.parts):
        if len(tensors) != count or not _are_numbered_from_0(tensors):
            return f"incomplete: the checkpoint does not have all of its {count} experts, numbered from 0"
        for e, tensor in enumerate(tensors):
            shape = (rows // len(source.parts), columns)
            _require_shape(tensor, shapes, shape)
            slot = ExpertSlot(name, e, count, part, len(source.parts))
            found.append(Adaptable(tensor.removesuffix(".weight"), tensor, shape, False, None, slot))
    return tuple(found)


def _are_numbered_from_0(tensors: Sequence[str]) -> bool:
    """Whether exactly one number differs between these names, and it counts 0, 1, 2, ... in their order."""
    numbers = [re.findall(r"\d+", tensor) for tensor in tensors]
    differing = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
    return differing == [tuple(str(e) for e in range(len(tensors)))]


def _computes_linear_product(module: nn.Module) -> bool:
    """Whether the module, called with (2, in) on the meta device, returns one tensor (2, out)."""
    out_features, in_features = _out_in(module)
    try:
        with torch.no_grad():
            result = module(torch.empty(2, in_features, device="meta", dtype=torch.bfloat16))
        return isinstance(result, torch.Tensor) and result.shape == (2, out_features)
    except Exception:  # a router may raise any error when it is called as a linear layer
        return False


def _is_expert_module(name: str, module: nn.Module) -> bool:
    """Whether a module holds experts, fused or as a list: `mlp.experts`, `mlp.shared_experts`."""
    return EXPERTS in name.rpartition(".")[2].split("_") or type(module).__name__.endswith("Experts")


def _expert_counts(modules: Iterable[nn.Module]) -> set[int]:
    """The numbers of experts that these modules contain, as lists of modules or as fused parameters."""
    counts = {len(module) for module in modules if isinstance(module, (nn.ModuleList, nn.ModuleDict))}
    return counts | {p.shape[0] for module in modules for p in module.parameters(recurse=False) if p.dim() == 3}


def _out_in(module: nn.Module) -> tuple[int, int]:
    """The shape (out, in) of a module's weight, also if it is stored as (in, out)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if _is_conv1d(module) else (rows, columns)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _output_head(model: nn.Module) -> nn.Module | None:
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _certain_task_type(model: nn.Module) -> str | None:
    """PEFT's task type, if it follows from the class alone; else None, with which PEFT can load every class."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if encoder_decoder and name.endswith("ForConditionalGeneration") and model.main_input_name == "input_ids":
        return "SEQ_2_SEQ_LM"
    return None


def _loadable_task_types(model: nn.Module) -> frozenset[str]:
    """The task types whose PeftModel can wrap this class, and whose Auto class gives the modules the same names.

    Task types with their own head, such as SEQ_CLS, are not included: PEFT expects the head's weights in the adapter's
    file.
    """
    found = set()
    if hasattr(model, "prepare_inputs_for_generation"):
        found.add("SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM")
    if getattr(model, "base_model", None) is model:
        found.add("FEATURE_EXTRACTION")
    return frozenset(found)


def _refuse_more_layers_than_tensors(folder: Path, config: Mapping[str, Any], count: int) -> None:
    """Raise CheckpointError if config.json asks for more layers than there are tensors, and for more than 1000.

    Building such a model may take hours.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_more_layers_than_tensors(folder, value, count)
        elif "layers" in key and isinstance(value, int) and value > max(count, 1000):
            raise CheckpointError(
                f"{folder}/config.json: {key} is {value}, but the checkpoint has only {count} tensors",
                hint=_ONE_MODEL_HINT,
            )


def _with_article(module: object) -> str:
    """The name of a module's class, for a sentence: `a Conv2d`, `an Embedding`."""
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
