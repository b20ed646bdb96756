"""Build a model without weights from its config.json, and find the tensors that fill each of its parameters.

The model is built on the meta device, where it needs no memory. transformers' own mapping from checkpoint names to
parameter names then gives the tensors of each parameter. A forward pass on the meta device, which computes shapes and
no values, shows the modules that are called. The mapping is private to transformers, but PEFT imports it too. Its
functions are called with positional arguments, because that works for every transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from milora_init.errors import CheckpointError, PlanError, out_of_memory

_TEXT_LENGTH = 8  # tokens of a forward pass on the meta device
_RANKING_OPERATIONS = frozenset({"topk", "argmax", "sort", "argsort"})
_MATRIX_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm"})
# Operations that do not change the values; transformers before 5.4 has this one.
_IDENTITIES = frozenset({"Force16BytesAlignment"})


@dataclass(slots=True)
class ParameterSource:
    """The tensors of a checkpoint that fill one parameter.

    Attributes:
        parts: The names of the tensors, one list for each part of the parameter. There is one part if transformers
            loads a tensor unchanged, and one part for each source pattern if it builds the parameter from several.
        operations: The operations with which transformers builds the parameter; empty if it loads a tensor unchanged.
    """

    parts: list[list[str]] = field(default_factory=list)
    operations: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[str]:
        """The names of the tensors of all parts."""
        return [name for part in self.parts for name in part]


def build_meta_model(
    folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool = False, text_only: bool = False
) -> nn.Module:
    """Build the model of a folder's config.json on the meta device, in bfloat16, and tie its weights.

    The class is the one that config.json names. With `text_only` it is the one that AutoModelForCausalLM chooses.

    Raises:
        CheckpointError: config.json names no class of transformers, or the class cannot be built from it.
        PlanError: `text_only` is set, but AutoModelForCausalLM has no text-only class for this config.json.
    """
    import transformers

    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            f"{folder}/config.json names no class under `architectures`",
            hint='add the class, e.g. "architectures": ["LlamaForCausalLM"]',
        )
    name = str(architectures[0])
    remote = _remote_class(config, name)
    if remote and not trust_remote_code and not _is_in_transformers(config, name):
        raise CheckpointError(
            f"{folder}/config.json names {name}, whose code is in the model's own repository ({remote})",
            hint="read that code; if you trust it, add --trust-remote-code",
        )
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with nullcontext() if trust_remote_code else _offline():
            if remote and trust_remote_code:
                from transformers.dynamic_module_utils import get_class_from_dynamic_module

                cls: Any = get_class_from_dynamic_module(remote, str(folder), local_files_only=True)
            else:
                cls = getattr(transformers, name, None)
            _require_model_class(folder, name, cls)
            parsed = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=bool(remote and trust_remote_code)
            )
            _remove_kernels_and_code(parsed, trusted=trust_remote_code)
            with torch.device("meta"):
                model: nn.Module = (_build_text_only_model(parsed) if text_only else cls(parsed)).eval()
                for parameter in model.parameters():  # the kernels of fused experts accept no wider dtype
                    parameter.data = parameter.data.bfloat16()
    except (CheckpointError, PlanError):
        raise
    except Exception as error:  # with a wrong config, a model class may raise any error
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        if type(error).__name__ == "OfflineModeIsEnabled":
            raise CheckpointError(
                f"{folder}/config.json refers to a file on the network, which is needed to build a {name}: {reason}",
                hint="copy the content of that file into config.json; if you trust the file, add --trust-remote-code",
            ) from error
        raise CheckpointError(f"a {name} cannot be built from {folder}/config.json: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.tie_weights()  # type: ignore[operator]
    return model


def causal_class(config: Any) -> type | None:
    """The class that AutoModelForCausalLM builds from a config; None if it has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def build_causal_model(config: Any) -> nn.Module:
    """Build the model that AutoModelForCausalLM chooses for a config, on the meta device.

    For some models with vision or audio towers this is only the language model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _build_text_only_model(config: Any) -> nn.Module:
    """The model that AutoModelForCausalLM builds. Raises PlanError unless it is only a part of the whole model."""
    cls = causal_class(config)
    model = build_causal_model(config) if cls else None
    if model is None or type(model.config) is type(config):
        name = type(config).__name__
        raise PlanError(
            f"AutoModelForCausalLM builds a {cls.__name__} for a {name}, which is not a text-only class"
            if cls
            else f"AutoModelForCausalLM has no class for a {name}",
            hint="remove --text-only",
        )
    return model


def parameter_sources(model: nn.Module, names: Iterable[str]) -> dict[str, ParameterSource]:
    """The tensors that fill each parameter, by parameter name, from transformers' own mapping.

    Args:
        model: The model on the meta device.
        names: The names of the checkpoint's tensors. Tensors that fill no parameter are not in the result.

    Raises:
        CheckpointError: The installed transformers does not have this mapping where transformers 5 has it.
    """
    from transformers import __version__

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        raise CheckpointError(
            f"transformers {__version__} does not have the weight name mapping of transformers 5 ({error})",
            hint="pip install 'transformers>=5', or a version that this milora-init supports",
        ) from error
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    parameters = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    found: dict[str, ParameterSource] = {}
    # transformers stacks the experts of a layer in this order, so that the index of an expert is its number.
    for name in sorted(names, key=_natural_sort_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter, pattern = rename_source_key(name, [], [], prefix, parameters)
        if parameter not in parameters:
            continue
        patterns = list(converter_of[pattern].source_patterns) if pattern else [None]
        source = found.setdefault(parameter, ParameterSource([[] for _ in patterns]))
        source.parts[patterns.index(pattern)].append(name)
        if pattern:
            operations = [_describe_operation(operation) for operation in converter_of[pattern].operations]
            source.operations = tuple(name for name in operations if name not in _IDENTITIES)
    return found


def needed_tensors(model: nn.Module, sources: Mapping[str, ParameterSource], missing: Iterable[str]) -> list[str]:
    """The missing tensors that the model needs.

    A tensor is needed if it is one of several that fill a parameter, or if no tensor in `sources` fills its parameter
    or one that is tied to it.

    Args:
        model: The model on the meta device.
        sources: The tensors that the checkpoint has, by the parameter that they fill.
        missing: The names of tensors that the checkpoint does not have.
    """
    parameters = model.state_dict(keep_vars=True)
    filled = {id(parameters[name]) for name in sources}
    return [
        tensor
        for name, source in parameter_sources(model, missing).items()
        if name in sources or id(parameters[name]) not in filled
        for tensor in source.tensors
    ]


def fuses_experts(model: nn.Module) -> bool:
    """Whether transformers fuses experts for this model type, even if this model has no experts.

    For such a model type, PEFT maps targets with the old names of experts to the fused parameters.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return any(
        "experts" in str(pattern)
        for entry in get_model_conversion_mapping(model)
        if hasattr(entry, "operations")
        for pattern in entry.target_patterns
    )


def routing_modules(model: nn.Module) -> set[str]:
    """The modules whose outputs are ranked in a forward pass: a topk, argmax or sort selects some of them.

    The forward pass runs on the meta device with a few tokens. It may stop in the first layer whose experts need real
    values. Therefore a result for one layer is applied to the modules of the same name in all layers.
    """
    tracker = _RankingTracker({id(module.weight): name for name, module in model.named_modules() if _is_matrix(module)})
    _run_forward_pass(model, tracker)
    layer_number = re.compile(r"\d+")
    routers = {layer_number.sub("", name) for name in tracker.ranked}
    return {name for name, _ in model.named_modules() if layer_number.sub("", name) in routers}


def uncalled_modules(model: nn.Module) -> set[str]:
    """The modules that a forward pass does not call, although it calls their parent.

    The parent reads the weight of such a module directly, so an adapter around the module has no effect. The forward
    pass runs on the meta device with a few tokens. If it does not reach a parent (a vision tower without an image),
    the modules of that parent are not in the result.
    """
    names = {module: name for name, module in model.named_modules()}
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: called.add(names[module])) for module in names if names[module]
    ]
    _run_forward_pass(model, _ReadValuesAsOne())  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    uncalled = set()
    for module, name in names.items():
        if name in called or any(True for _ in module.children()):
            continue
        parent = _calling_parent(model, name)
        # A whole transformers model calls only the parts that its inputs need, so an uncalled part proves nothing.
        if parent in called and not hasattr(model.get_submodule(parent), "config_class"):
            uncalled.add(name)
    return uncalled


class _ReadValuesAsOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Returns 1 when a forward pass reads a value of a meta tensor, which has none.

    Models read values to test, for example, whether the attention mask is set everywhere. 1 answers such a test with
    true, the common case, and the pass can go on.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


class _RankingTracker(_ReadValuesAsOne):
    """Finds the weights whose outputs are ranked: it records which tensors were computed from which weight.

    A tensor is tracked as the output of a weight as long as its last dimension has the weight's number of outputs.
    Tensors are identified by `id`. They are kept alive, because Python may give the id of a deleted tensor to a new
    one.

    Attributes:
        ranked: The modules whose outputs an operation in `_RANKING_OPERATIONS` received.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ranked: set[str] = set()
        # The module names behind a tensor, by its id: the modules of a weight, and those of an output.
        self._weights: dict[int, frozenset[str]] = {key: frozenset({name}) for key, name in weights.items()}
        self._outputs: dict[int, frozenset[str]] = {}
        self._kept_alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        operation = func.overloadpacket.__name__
        if operation in _RANKING_OPERATIONS:
            self.ranked.update(*(self._outputs.get(id(t), ()) for t in inputs))
        for tensor in (t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.dim()):
            if operation in _MATRIX_PRODUCTS:
                self._record(tensor, self._outputs, [self._weights.get(id(t)) for t in inputs])
                continue
            same_width = [self._outputs.get(id(t)) for t in inputs if t.shape[-1] == tensor.shape[-1]]
            self._record(tensor, self._outputs, same_width)
            if tensor.dim() == 2:  # a weight that was transposed or cast is still a weight
                self._record(tensor, self._weights, [self._weights.get(id(t)) for t in inputs])
        return result

    def _record(
        self, tensor: torch.Tensor, table: dict[int, frozenset[str]], sources: Iterable[frozenset[str] | None]
    ) -> None:
        """Enter a tensor into a table with the modules of all its sources, if there are any."""
        if modules := frozenset().union(*filter(None, sources)):
            table[id(tensor)] = modules
            self._kept_alive.append(tensor)


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2


def _run_forward_pass(model: nn.Module, mode: TorchDispatchMode) -> None:
    """Run a forward pass on the meta device under `mode`, until it ends or raises an error."""
    with suppress(Exception), _offline(), torch.no_grad(), torch.device("meta"), mode:
        model(**_meta_inputs(model))


def find_towers(model: nn.Module) -> list[str]:
    """The names of the vision and audio models inside a model: `model.vision_tower`, `model.visual`, ..."""
    config_types = tuple({type(config) for config in _tower_configs(getattr(model, "config", None))})
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{tower}.") for tower in found)
        if name and not inside and config_types and isinstance(getattr(module, "config", None), config_types):
            found.append(name)
    return found


def _tower_configs(config: Any) -> Iterator[Any]:
    """The configs of vision and audio models inside a config."""
    for key, value in vars(config).items() if config is not None else ():
        if hasattr(value, "to_dict") and key.endswith("_config"):
            if any(word in key for word in ("vision", "audio", "speech")):
                yield value
            else:
                yield from _tower_configs(value)


def _meta_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs for a forward pass on the meta device: a few tokens, and an image or sound if the model requires one."""
    ids = torch.ones(1, _TEXT_LENGTH, dtype=torch.long, device="meta")
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {"input_ids": ids}
    if main == "input_features":
        config: Any = model.config
        frames = 2 * int(getattr(config, "max_source_positions", 1500))
        inputs = {main: torch.ones(1, int(getattr(config, "num_mel_bins", 80)), frames, device="meta")}
        inputs[main] = inputs[main].to(torch.bfloat16)
    elif main == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.ones(1, int(getattr(config, "num_channels", 3)), height, width, device="meta")
        inputs |= {main: pixels.to(torch.bfloat16)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    known = signature(model.forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    return {name: value for name, value in inputs.items() if name in known}


def _calling_parent(model: nn.Module, name: str) -> str:
    """The nearest parent of a module that has its own forward method; lists and dicts of modules have none."""
    parent = name.rpartition(".")[0]
    while parent and isinstance(model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict)):
        parent = parent.rpartition(".")[0]
    return parent


def _require_model_class(folder: Path, name: str, cls: Any) -> None:
    """Raise CheckpointError unless `cls` is one model class of transformers, and not an Auto class."""
    import transformers
    from transformers.utils import DummyObject

    version = transformers.__version__
    if not isinstance(cls, type):
        problem, hint = f"which transformers {version} does not have", "upgrade transformers, or name a class it has"
    elif name.startswith("AutoModel"):
        problem, hint = "which can build many classes", "name the class that the weights were saved from"
    # A DummyObject replaces a class whose library is not installed. A call of it raises an error with that library.
    elif not issubclass(cls, transformers.PreTrainedModel) and not isinstance(cls, DummyObject):
        problem, hint = f"which is not a model class of transformers {version}", "name the class of the model"
    else:
        return
    raise CheckpointError(f"{folder}/config.json names {name}, {problem}", hint=f"{hint} under `architectures`")


def _remove_kernels_and_code(config: Any, *, trusted: bool) -> None:
    """Remove the settings for kernels and remote code from a parsed config and the configs inside it.

    No weight depends on them. With them, transformers may require a flash attention that is not installed, look for a
    kernel in another repository, or ask in the terminal whether it may run the code of an inner config.
    """
    config._attn_implementation_internal = "eager"
    config._experts_implementation_internal = None
    if not trusted:
        vars(config).pop("auto_map", None)
    for value in vars(config).values():
        for inner in (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        ):
            if hasattr(inner, "_attn_implementation_internal"):
                _remove_kernels_and_code(inner, trusted=trusted)


@contextmanager
def _offline() -> Iterator[None]:
    """Stop transformers from downloading what a config refers to, such as another repository's config or a kernel."""
    from transformers.utils.hub import constants  # the module huggingface_hub.constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _remote_class(config: Mapping[str, Any], name: str) -> str:
    """The reference in config.json to the code of this class; empty if there is none."""
    auto_map = config.get("auto_map")
    references = auto_map.values() if isinstance(auto_map, dict) else ()
    return next((str(r) for r in references if isinstance(r, str) and r.rpartition(".")[2] == name), "")


def _is_in_transformers(config: Mapping[str, Any], name: str) -> bool:
    """Whether transformers itself has this class and this model type."""
    import transformers

    return (
        isinstance(getattr(transformers, name, None), type) and config.get("model_type") in transformers.CONFIG_MAPPING
    )


def _describe_operation(operation: Any) -> str:
    """An operation of transformers' mapping as text, such as `Concatenate(1)`."""
    dim = getattr(operation, "dim", None)
    return type(operation).__name__ + (f"({dim})" if dim is not None else "")


def _natural_sort_key(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers in names by value: `experts.2` before `experts.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
