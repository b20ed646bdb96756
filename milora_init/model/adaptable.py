"""Find the weights of a model that PEFT can adapt.

Tensor names in a checkpoint are not the module names of the model: transformers renames while it loads (prefixes are
added or removed, experts are fused, `embed_out` becomes `lm_head`). An adapter names modules. So the model is built on
the meta device, and `meta_model` says which tensors fill which parameter.

Every module that cannot be adapted has a recorded reason. PEFT can wrap a module only if calling the module computes x
@ W.T, so each candidate is called once on the meta device, and the model itself must call it too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
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
# What PEFT takes for the names that experts had before transformers 5 fused them, and turns into the fused ones.
_FORMER_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"})
_MAMBAS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})  # whose out_proj PEFT refuses
_FUSIONS: Mapping[tuple[str, ...], int] = {("MergeModulelist(0)",): 1, ("MergeModulelist(0)", "Concatenate(1)"): 2}


@dataclass(frozen=True, slots=True)
class Adaptable:
    """A weight that an adapter can stand beside.

    Attributes:
        module: Its module, as PEFT names it; for an expert's, a name of its own.
        tensor: Its name on disk.
        shape: (out, in), whichever way it is stored.
        transposed: Stored as (in, out), as GPT-2's Conv1D does.
        row: Its place in the first dimension of a tensor that holds one for every expert; None for a tensor of its own.
        expert: Its place in the fused parameter, None for a module's weight.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool
    row: int | None = None
    expert: ExpertSlot | None = None

    @property
    def target(self) -> str:
        """What PEFT is told to adapt: the module, or the fused parameter."""
        return self.expert.parameter if self.expert else self.module

    @property
    def suffix(self) -> str:
        """The part of its name that all layers share."""
        return self.expert.suffix if self.expert else self.module.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """What a checkpoint's model is made of.

    Attributes:
        architecture: The class that config.json names.
        task_type: PEFT's task type for it, None where PEFT has none that fits every use.
        task_types: Those with which PEFT takes an adapter of this class.
        modules: Every module name, in the model's order: what PEFT will match targets against.
        adaptable: The modules' weights that can be adapted, by module name.
        experts: The experts' weights that can be adapted, by the name of the fused parameter.
        refused: Modules and parameters that look adaptable and are not, with the reason.
        heads: Adaptable modules that `all-linear` leaves out: the task heads.
        towers: Models inside the model that see or hear, which a target must name to adapt them.
        as_parameters: Last parts of module names that PEFT, on this kind of model, takes for experts'. Such a module
            can be adapted only as the parameter `<module>.weight`.
        other_class: A class that is built of the same config.json by AutoModelForCausalLM, or without it, and lacks
            modules of these names; empty where there is none.
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
    as_parameters: frozenset[str]
    other_class: str = ""


def read_structure(  # noqa: PLR0913  what is known of a checkpoint
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    packed: Mapping[str, str] = {},
    unfilled: Collection[str] = (),
    trust_remote_code: bool = False,
    text_only: bool = False,
) -> ModelStructure:
    """Build the model on the meta device and find the module of every tensor.

    Args:
        folder: A folder that holds config.json.
        config: The content of config.json.
        shapes: Shape of every tensor of the checkpoint, by its name on disk.
        packed: Tensors that look quantised, and how they do.
        unfilled: Names of tensors that an index promises and no file has.
        trust_remote_code: Run the code in the folder if config.json names it.
        text_only: Take the class that AutoModelForCausalLM builds, not the one that config.json names.

    Raises:
        CheckpointError: config.json names no class that transformers has, or is quantised, or the tensors are not
            this class's, or the model wants one that is unfilled.
        PlanError: `text_only`, and AutoModelForCausalLM has no text-only class for it.
    """
    _refuse_quantised(config)
    _refuse_more_layers_than_tensors(folder, config, len(shapes))
    model = meta_model.build_meta_model(folder, config, trust_remote_code=trust_remote_code, text_only=text_only)
    homes = meta_model.parameter_sources(model, shapes)
    if not homes:
        raise CheckpointError(
            f"{folder}: no tensor belongs to {type(model).__name__}, which config.json names; "
            f"the first is {next(iter(shapes), None)}",
            hint="config.json and the weights are of different models",
        )
    _refuse_packed(model, homes, shapes, packed)
    if wanted := meta_model.wanted(model, homes, unfilled):
        raise CheckpointError(
            f"{folder}: the index names {wanted[0]}, which its file lacks and {type(model).__name__} needs",
            hint=REFETCH,
        )
    modules = dict(model.named_modules())
    why_not = _Objections(model)
    packed_as = {tensor.rpartition(".")[0]: f"{what}: it is stored as {tensor}" for tensor, what in packed.items()}
    adaptable: dict[str, Adaptable] = {}
    refused: dict[str, str] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if not name or not isinstance(weight, nn.Parameter):
            continue
        if weight.dim() > 2:
            refused[name] = f"a {type(module).__name__}, not a linear layer"
            continue
        home = homes.get(f"{name}.weight", ParameterSource())
        if reason := why_not(name, module) or _not_one_tensor(home, packed_as.get(name, "")):
            refused[name] = reason
        else:
            _require_shape(home.tensors[0], shapes, tuple(weight.shape))
            adaptable[name] = Adaptable(name, home.tensors[0], _out_in(module), _is_conv1d(module))
    experts: dict[str, tuple[Adaptable, ...]] = {}
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if parameter.dim() != 3 or not _holds_experts(name, owner):
            continue
        found = _experts(name, parameter, owner, homes.get(name, ParameterSource()), shapes)
        if isinstance(found, str):
            refused[name] = found
        else:
            experts[name] = found
    towers = tuple(meta_model.towers(model))
    other = _by_class_of_config(folder, config, trust_remote_code) if text_only else _by_auto_class(model)
    names = [*adaptable, *(name.rpartition(".")[0] for name in experts)]
    return ModelStructure(
        architecture=type(model).__name__,
        task_type=_task_type(model),
        task_types=_task_types(model),
        modules=tuple(name for name in modules if name),
        adaptable=adaptable,
        experts=experts,
        refused=refused,
        heads=frozenset(name for name in adaptable if name in ("score", "classifier", "qa_outputs")),
        towers=towers,
        as_parameters=_FORMER_EXPERTS if meta_model.fuses_experts(model) else frozenset(),
        other_class="" if other is None or _has(other, names, towers) else type(other).__name__,
    )


def _by_class_of_config(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> nn.Module | None:
    with suppress(CheckpointError):  # what cannot be built cannot be loaded either, and says so
        return meta_model.build_meta_model(folder, config, trust_remote_code=trust_remote_code)
    return None


def _by_auto_class(model: nn.Module) -> nn.Module | None:
    """What AutoModelForCausalLM builds of a model's config, where somebody may load it so and get another class."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config: Any = model.config
    cls = meta_model.causal_class(config)
    never_so_loaded = getattr(config, "is_encoder_decoder", False) or type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if cls is not None and cls is not type(model) and not never_so_loaded:
        with suppress(Exception):  # as above
            return meta_model.causal_model(config)
    return None


def _has(model: nn.Module, names: Iterable[str], towers: tuple[str, ...]) -> bool:
    """Whether a model has all modules of these names, those inside `towers` left aside."""
    own = {name for name, _ in model.named_modules()}
    return all(name in own or name.startswith(tuple(f"{tower}." for tower in towers)) for name in names)


class _Objections:
    """Why a module of a model cannot be adapted, empty if it can; see what each looks at."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._owners.setdefault(id(parameter), []).append(name)
        self._head = _output_head(model)
        self._never_called = meta_model.uncalled_modules(model)
        holds_experts = any(_are_experts(name, module) for name, module in model.named_modules())
        self._choosing = meta_model.choosing(model) if holds_experts else set()
        self._mamba = getattr(getattr(model, "config", None), "model_type", None) in _MAMBAS

    def __call__(self, name: str, module: nn.Module) -> str:
        parent = self._model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Linear) and not _is_conv1d(module):
            return f"a {type(module).__name__}, not a linear layer"
        if isinstance(parent, nn.MultiheadAttention) or name in self._never_called:
            return f"read by its parent, a {type(parent).__name__}, and never called"
        if not _computes_a_product(module):
            return f"a {type(module).__name__}, which does not compute x @ W.T"
        if module is self._head:
            return "the output head"
        if others := [o for o in self._owners[id(module.weight)] if o != f"{name}.weight"]:
            return f"tied to {others[0]}"
        if name in self._choosing or self._routes(name, module):
            return "a router: it chooses experts"
        if any("router" in f"{own} {type(inner).__name__}".lower() for own, inner in self._around(name)):
            return "a part of a router"
        if self._mamba and name.rpartition(".")[2] == "out_proj":
            return "the out_proj of a Mamba mixer, whose weight is read past an adapter"
        return ""

    def _around(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """A module and those around it, outward to the next whole model."""
        while name and not hasattr(module := self._model.get_submodule(name), "config_class"):
            yield name.rpartition(".")[2], module
            name = name.rpartition(".")[0]

    def _routes(self, name: str, module: nn.Module) -> bool:
        """Whether a linear layer of a block with experts has one output for each of them, or one for all.

        As many outputs as there are experts mean something only where no module of the block was seen to choose, and
        farther from the experts than beside them only in a gate.
        """
        rows, beside, gate = _out_in(module)[0], True, False
        for own, inner in self._around(name):
            if own.isdigit() and not beside:  # a layer: what is around it holds other layers' experts
                return False
            words = own.split("_")  # a gate_proj is half of a gated MLP
            named = "gate" in words and "proj" not in words
            gate = gate or named or type(inner).__name__.endswith(("Gate", "Gating"))
            name = name.rpartition(".")[0]
            children = self._model.get_submodule(name).named_children()
            experts = [child for child_name, child in children if _are_experts(child_name, child)]
            if experts and rows == 1:
                return True
            if experts and (beside or gate) and rows in _counts(experts):
                return not any(chooser.startswith(f"{name}.") for chooser in self._choosing)
            beside = False
        return False


def _refuse_packed(
    model: nn.Module,
    homes: Mapping[str, ParameterSource],
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, str],
) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in homes.keys() & parameters.keys():
        for tensor in homes[name].tensors:
            if tensor in packed and not homes[name].operations and shapes[tensor] != tuple(parameters[name].shape):
                raise CheckpointError(
                    f"{tensor} is {packed[tensor]}: {list(shapes[tensor])} on disk, {list(parameters[name].shape)} in "
                    "the model, and config.json has no quantization_config",
                    hint="start from the unquantised checkpoint, or dequantise it and save it again",
                )


def _not_one_tensor(home: ParameterSource, packed_as: str) -> str:
    if not home.tensors:
        return packed_as or "no tensor of the checkpoint fills it"
    if home.operations or len(home.tensors) > 1:
        return "transformers builds it from several tensors while loading"
    return ""


def _require_shape(tensor: str, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
    if shapes[tensor] != shape:
        raise CheckpointError(
            f"{tensor} is {list(shapes[tensor])} on disk, config.json makes it {list(shape)}",
            hint="config.json and the weights are of different models",
        )


def _holds_experts(parameter: str, owner: nn.Module) -> bool:
    return _called_experts(parameter) or type(owner).__name__.endswith("Experts")


def _called_experts(parameter: str) -> bool:
    return EXPERTS in parameter.split(".")[-2:]


def _experts(
    name: str, parameter: nn.Parameter, owner: nn.Module, home: ParameterSource, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Adaptable, ...] | str:
    """The matrices of a fused parameter, or why they cannot be adapted."""
    count, *matrix = parameter.shape
    # PEFT takes (count, out, in), unless the module says that it holds (count, in, out).
    transposed = bool(getattr(owner, "is_transposed", False))
    rows, columns = reversed(matrix) if transposed else matrix
    if not _called_experts(name):
        return f"of a {type(owner).__name__} that is not called `{EXPERTS}`"
    if count < 2:
        return "a single expert, which PEFT takes for a plain layer"
    if not home.tensors:
        return "no tensor of the checkpoint fills it"
    if not home.operations:
        if len(home.tensors) > 1:
            return "transformers builds it from several tensors while loading"
        (tensor,) = home.tensors
        _require_shape(tensor, shapes, tuple(parameter.shape))
        return tuple(
            Adaptable(f"{name}[{e}]", tensor, (rows, columns), transposed, e, ExpertSlot(name, e, count, 0, 1))
            for e in range(count)
        )
    if _FUSIONS.get(home.operations) != len(home.parts) or transposed:
        return f"fused by {', '.join(home.operations)}, which milora-init does not know"
    found = []
    for part, tensors in enumerate(home.parts):
        numbers = [re.findall(r"\d+", tensor) for tensor in tensors]
        running = [place for place in zip(*numbers, strict=True) if len(set(place)) > 1] if tensors else []
        if len(tensors) != count or running != [tuple(str(e) for e in range(count))]:
            return f"the checkpoint has not all of its {count} experts, or numbers them in another way"
        for e, tensor in enumerate(tensors):
            shape = (rows // len(home.parts), columns)
            _require_shape(tensor, shapes, shape)
            place = ExpertSlot(name, e, count, part, len(home.parts))
            found.append(Adaptable(tensor.removesuffix(".weight"), tensor, shape, False, None, place))
    return tuple(found)


def _computes_a_product(module: nn.Module) -> bool:
    out_features, in_features = _out_in(module)
    try:
        with torch.no_grad():
            result = module(torch.empty(2, in_features, device="meta", dtype=torch.bfloat16))
        return isinstance(result, torch.Tensor) and result.shape == (2, out_features)
    except Exception:  # a router may raise anything when called as a linear layer
        return False


def _are_experts(name: str, module: nn.Module) -> bool:
    return EXPERTS in name.rpartition(".")[2].split("_") or type(module).__name__.endswith("Experts")


def _counts(groups: Iterable[nn.Module]) -> set[int]:
    """How many experts each group holds."""
    counts = {len(group) for group in groups if isinstance(group, (nn.ModuleList, nn.ModuleDict))}
    return counts | {p.shape[0] for group in groups for p in group.parameters(recurse=False) if p.dim() == 3}


def _out_in(module: nn.Module) -> tuple[int, int]:
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


def _task_type(model: nn.Module) -> str | None:
    # Only where the task follows from the class alone; PEFT's model without a task type serves all the others.
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if encoder_decoder and name.endswith("ForConditionalGeneration") and model.main_input_name == "input_ids":
        return "SEQ_2_SEQ_LM"
    return None


def _task_types(model: nn.Module) -> frozenset[str]:
    """Those whose PeftModel can wrap this class, and whose Auto class gives its modules the same names.

    A task with a head of its own is none of them: PEFT wants the head's weights in the adapter's file.
    """
    found = set()
    if hasattr(model, "prepare_inputs_for_generation"):
        found.add("SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM")
    if getattr(model, "base_model", None) is model:
        found.add("FEATURE_EXTRACTION")
    return frozenset(found)


def _refuse_more_layers_than_tensors(folder: Path, config: Mapping[str, Any], count: int) -> None:
    """Raise CheckpointError if config.json asks for more layers than there are tensors: building may take hours."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_more_layers_than_tensors(folder, value, count)
        elif "layers" in key and isinstance(value, int) and value > max(count, 1000):
            raise CheckpointError(
                f"{folder}/config.json: {key} is {value}, and the checkpoint has {count} tensors",
                hint="config.json and the weights are of different models",
            )


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if quantisation := config.get(key):
            method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
            raise CheckpointError(
                f"the checkpoint is quantised ({method}): its singular components are not those of the model",
                hint="start from the unquantised checkpoint, or dequantise it and save it again",
            )
    for part in config.values():
        if isinstance(part, dict):
            _refuse_quantised(part)
