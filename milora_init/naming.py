"""From a tensor on disk to the module that PEFT can adapt.

The names in a checkpoint are not the names of a model's modules: transformers renames while it loads (prefixes that
come and go, experts that are fused, `embed_out` that becomes `lm_head`). An adapter speaks of modules. So the class
that config.json names is built on the meta device, where it costs no memory, and transformers' own mapping is asked
where each tensor goes. That mapping is private but is the one that PEFT imports; its parts are called by position,
which holds for every transformers 5.

What cannot be adapted is known by its reason: PEFT can wrap a module only if calling it computes x @ W.T, so each
candidate is called once, on meta.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_init.errors import CheckpointError, PlanError

ALL_LINEAR = "all-linear"
REGEX = "re:"


@dataclass(frozen=True, slots=True)
class Adaptable:
    """A weight that an adapter can stand beside.

    Attributes:
        module: Its module, as PEFT names it.
        tensor: Its name on disk.
        shape: (out, in), whichever way it is stored.
        fan_in_fan_out: Stored as (in, out), as GPT-2's Conv1D does.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    fan_in_fan_out: bool


@dataclass(frozen=True, slots=True)
class Naming:
    """What a checkpoint's model is made of.

    Attributes:
        architecture: The class that config.json names.
        task_type: PEFT's task type for it, None where PEFT has none that fits every use.
        modules: Every module name, in the model's order: what PEFT will match targets against.
        adaptable: The weights that can be adapted, by module name.
        refused: Modules that look adaptable and are not, with the reason.
        heads: Adaptable modules that `all-linear` leaves out: the task heads.
    """

    architecture: str
    task_type: str | None
    modules: tuple[str, ...]
    adaptable: Mapping[str, Adaptable]
    refused: Mapping[str, str]
    heads: frozenset[str]


def resolve(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Naming:
    """Build the model on the meta device and find the module of every tensor.

    Args:
        folder: A folder that holds config.json.
        config: The content of config.json.
        shapes: Shape of every tensor of the checkpoint, by its name on disk.

    Raises:
        CheckpointError: config.json names no class that transformers has, or is quantised, or the tensors are not
            this class's.
    """
    _refuse_quantised(config)
    model = _build_on_meta(folder, config)
    homes = _homes(model, shapes)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    head = _output_head(model)
    adaptable: dict[str, Adaptable] = {}
    refused: dict[str, str] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if not name or not isinstance(weight, nn.Parameter):
            continue
        key = f"{name}.weight"
        tensors, plain = homes.get(key, ([], True))
        if reason := _why_not(module, modules[name.rpartition(".")[0]]):
            refused[name] = reason
        elif module is head:
            refused[name] = "the output head"
        elif len(owners[id(weight)]) > 1:
            refused[name] = f"tied to {next(o for o in owners[id(weight)] if o != key)}"
        elif not tensors:
            refused[name] = "no tensor of the checkpoint fills it"
        elif not plain or len(tensors) > 1:
            refused[name] = "transformers builds it from several tensors while loading"
        elif shapes[tensors[0]] != tuple(weight.shape):
            raise CheckpointError(
                f"{tensors[0]} is {list(shapes[tensors[0]])} on disk, config.json makes it {list(weight.shape)}",
                hint="config.json and the weights are of different models",
            )
        else:
            adaptable[name] = Adaptable(name, tensors[0], _out_in(module), _is_conv1d(module))
    if not any(tensors for tensors, _ in homes.values()):
        raise CheckpointError(
            f"{folder}: no tensor belongs to {type(model).__name__}, which config.json names; "
            f"the first is {next(iter(shapes), None)}",
            hint="config.json and the weights are of different models",
        )
    return Naming(
        architecture=type(model).__name__,
        task_type=_task_type(model),
        modules=tuple(name for name in modules if name),
        adaptable=adaptable,
        refused=refused,
        heads=frozenset(name for name in adaptable if name in ("score", "classifier", "qa_outputs")),
    )


def select(naming: Naming, targets: Sequence[str], exclude: Sequence[str] = ()) -> list[Adaptable]:
    """The adaptable weights that `targets` names and `exclude` does not, in the model's order.

    PEFT's meaning: a target is a module's full name or its end after a dot, or `all-linear`; `re:PATTERN` matches a
    full name from end to end.

    Raises:
        PlanError: A target or an exclusion that names nothing, or only what cannot be adapted.
    """
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            chosen |= naming.adaptable.keys() - naming.heads
            continue
        matches = matcher([target])
        hits = {name for name in naming.adaptable if matches(name)}
        if not hits:
            refused = next((name for name in naming.refused if matches(name)), None)
            raise PlanError(
                f"target {target!r} matches no module of {naming.architecture}"
                + (f" that can be adapted: {refused} is {naming.refused[refused]}" if refused else ""),
                hint=f"modules that can be adapted: {', '.join(suffixes(naming))}",
            )
        chosen |= hits
    for target in exclude:
        matches = matcher([target])
        if not any(matches(name) for name in naming.modules):
            raise PlanError(f"exclude {target!r} matches no module of {naming.architecture}")
        chosen = {name for name in chosen if not matches(name)}
    if not chosen:
        raise PlanError("every target is excluded", hint="drop an --exclude")
    return [weight for name, weight in naming.adaptable.items() if name in chosen]


def matcher(targets: Iterable[str]) -> Callable[[str], bool]:
    """PEFT's test of a module name against a list of targets, with `re:PATTERN` beside it."""
    names = {target for target in targets if not target.startswith(REGEX)}
    patterns = []
    for target in targets:
        if target.startswith(REGEX):
            try:
                patterns.append(re.compile(target.removeprefix(REGEX)))
            except re.error as error:
                raise PlanError(f"target {target!r} is not a regular expression: {error}") from None

    def matches(module: str) -> bool:
        return (
            module in names
            or any(module.endswith(f".{name}") for name in names)
            or any(pattern.fullmatch(module) for pattern in patterns)
        )

    return matches


def suffixes(naming: Naming) -> list[str]:
    """Last parts of the adaptable modules' names, in the model's order: what a person would pass as targets."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in naming.adaptable))


def _build_on_meta(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    import transformers

    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            f"{folder}/config.json names no class under `architectures`",
            hint='add it, e.g. "architectures": ["LlamaForCausalLM"]',
        )
    cls = getattr(transformers, str(architectures[0]), None)
    if not isinstance(cls, type):
        raise CheckpointError(
            f"{folder}/config.json names {architectures[0]}, which transformers {transformers.__version__} has not",
            hint="models that bring their own code are not supported; for a new architecture, upgrade transformers",
        )
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        parsed = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = cls(parsed)
    except Exception as error:  # a config can be wrong in as many ways as there are model classes
        raise CheckpointError(
            f"{folder}/config.json does not build a {architectures[0]}: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.tie_weights()  # type: ignore[operator]
    return model


def _homes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[list[str], bool]]:
    """Parameter name -> (tensors that fill it, whether each is copied as it is)."""
    from transformers import __version__

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        raise CheckpointError(
            f"transformers {__version__} keeps its weight names elsewhere ({error})",
            hint="pip install 'transformers>=5'",
        ) from error
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    homes: dict[str, tuple[list[str], bool]] = {}
    for name in names:
        home, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if home not in known and name in known:
            home, pattern = rename_source_key(name, [], [], prefix, known)
        if home in known:
            tensors, plain = homes.get(home, ([], True))
            homes[home] = ([*tensors, name], plain and pattern is None)
    return homes


def _why_not(module: nn.Module, parent: nn.Module) -> str:
    """The reason why PEFT's LoRA cannot wrap this module, empty if it can."""
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        return f"a {type(module).__name__}, not a linear layer"
    if isinstance(parent, nn.MultiheadAttention):
        return "read by its parent, nn.MultiheadAttention, and never called"
    out_features, in_features = _out_in(module)
    try:
        with torch.no_grad():
            result = module(torch.empty(2, in_features, device="meta"))
        linear = isinstance(result, torch.Tensor) and result.shape == (2, out_features)
    except Exception:  # a router may raise anything when called as a linear layer
        linear = False
    return "" if linear else f"a {type(module).__name__}, which does not compute x @ W.T"


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


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        quantisation = part.get("quantization_config")
        if quantisation:
            method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
            raise CheckpointError(
                f"the checkpoint is quantised ({method}): its singular components are not those of the model",
                hint="start from the unquantised checkpoint, or dequantise it and save it again",
            )
