"""Build the model of a config.json without weights, and ask transformers for its parameter names.

The model is built on the meta device, where it needs no memory. transformers' own mapping then says which tensors of
the checkpoint fill which parameter, and a forward pass without data shows which modules are called. That mapping is
private, but PEFT imports the same one; its parts are called by position, which works for every transformers 5.
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

_TEXT_LENGTH = 8
_CHOICES = frozenset({"topk", "argmax", "sort", "argsort"})
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm"})
_IDENTITIES = frozenset({"Force16BytesAlignment"})  # values stay; before transformers 5.4


@dataclass(slots=True)
class ParameterSource:
    """The tensors that fill one parameter.

    Attributes:
        parts: Their names, by the part of the parameter that they fill. There is one part where tensors are taken as
            they are, and one for each source pattern where transformers builds the parameter from several.
        operations: What transformers does to them on the way; empty where they are taken as they are.
    """

    parts: list[list[str]] = field(default_factory=list)
    operations: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[str]:
        return [name for part in self.parts for name in part]


def build_meta_model(
    folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool = False, text_only: bool = False
) -> nn.Module:
    """The model of a folder's config.json, on meta, in bfloat16, its tied weights tied.

    It is of the class that config.json names; with `text_only`, of the one that AutoModelForCausalLM builds of it.

    Raises:
        CheckpointError: config.json names no class that transformers has, or does not build it.
        PlanError: `text_only`, and AutoModelForCausalLM has no text-only class for it.
    """
    import transformers

    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            f"{folder}/config.json names no class under `architectures`",
            hint='add it, e.g. "architectures": ["LlamaForCausalLM"]',
        )
    name = str(architectures[0])
    remote = _remote_class(config, name)
    if remote and not trust_remote_code and not _known(config, name):
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
            _build_plainly(parsed, trusted=trust_remote_code)
            with torch.device("meta"):
                model: nn.Module = (_text_model(parsed) if text_only else cls(parsed)).eval()
                for parameter in model.parameters():  # the fused experts' kernels take nothing longer
                    parameter.data = parameter.data.bfloat16()
    except (CheckpointError, PlanError):
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are model classes
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        if type(error).__name__ == "OfflineModeIsEnabled":
            raise CheckpointError(
                f"{folder}/config.json asks for something from the network to build a {name}: {reason}",
                hint="put what it names into config.json itself; if you trust it, add --trust-remote-code",
            ) from error
        raise CheckpointError(f"{folder}/config.json does not build a {name}: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.tie_weights()  # type: ignore[operator]
    return model


def causal_class(config: Any) -> type | None:
    """The class that AutoModelForCausalLM builds of a config; None where it has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def causal_model(config: Any) -> nn.Module:
    """What AutoModelForCausalLM builds of a config: of some models with towers, their language model alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _text_model(config: Any) -> nn.Module:
    cls = causal_class(config)
    model = causal_model(config) if cls else None
    if model is None or type(model.config) is type(config):
        found = f"builds a {cls.__name__}, which is not" if cls else "builds nothing"
        raise PlanError(
            f"AutoModelForCausalLM {found} a text-only class of a {type(config).__name__}", hint="drop --text-only"
        )
    return model


def parameter_sources(model: nn.Module, names: Iterable[str]) -> dict[str, ParameterSource]:
    """Parameter name -> the tensors of a checkpoint that fill it, through transformers' own mapping.

    Raises:
        CheckpointError: A transformers that keeps this mapping elsewhere.
    """
    from transformers import __version__

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        raise CheckpointError(
            f"transformers {__version__} keeps its weight names elsewhere ({error})",
            hint="pip install 'transformers>=5', or one that this version of milora-init knows",
        ) from error
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    found: dict[str, ParameterSource] = {}
    # transformers collects the experts of a layer in this order, and their place is their number.
    for name in sorted(names, key=_natural):
        home, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if home not in known and name in known:
            home, pattern = rename_source_key(name, [], [], prefix, known)
        if home not in known:
            continue
        patterns = list(of_pattern[pattern].source_patterns) if pattern else [None]
        entry = found.setdefault(home, ParameterSource([[] for _ in patterns]))
        entry.parts[patterns.index(pattern)].append(name)
        if pattern:
            operations = [_described(operation) for operation in of_pattern[pattern].operations]
            entry.operations = tuple(name for name in operations if name not in _IDENTITIES)
    return found


def wanted(model: nn.Module, filled: Mapping[str, ParameterSource], names: Iterable[str]) -> list[str]:
    """Those of some further tensors that would fill a parameter which `filled` does not fill, tied ones included."""
    known = model.state_dict(keep_vars=True)
    by_tie = {id(known[home]) for home in filled}
    found = parameter_sources(model, names)
    return [name for home, entry in found.items() if home in filled or id(known[home]) not in by_tie
            for name in entry.tensors]  # fmt: skip


def fuses_experts(model: nn.Module) -> bool:
    """Whether transformers builds fused experts for this kind of model, even where this one has none.

    For these PEFT takes targets of the names that experts had before as meaning the fused ones.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return any("experts" in str(pattern) for entry in get_model_conversion_mapping(model)
               if hasattr(entry, "operations") for pattern in entry.target_patterns)  # fmt: skip


def choosing(model: nn.Module) -> set[str]:
    """Modules whose outputs compete with each other in a forward pass: a topk, argmax or sort chooses among them.

    The pass is over a few tokens without data. It can end early, in the first layer whose experts need values: what is
    true of a module is true of the module of that name in every layer.
    """
    flow = _Choices({id(module.weight): name for name, module in model.named_modules() if _is_matrix(module)})
    _run(model, flow)
    layer = re.compile(r"\d+")
    kinds = {layer.sub("", name) for name in flow.choosing}
    return {name for name, _ in model.named_modules() if layer.sub("", name) in kinds}


def uncalled_modules(model: nn.Module) -> set[str]:
    """Modules that a forward pass does not call although it runs the module that holds them.

    Such a module's weight is read by its parent, past any adapter around it. The pass is over a few tokens without
    data. Where it does not reach a module's parent (a vision tower without an image), nothing is said of it.
    """
    names = {module: name for name, module in model.named_modules()}
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: called.add(names[module])) for module in names if names[module]
    ]
    _run(model, _AnswerEveryValueWithOne())  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    missed = set()
    for module, name in names.items():
        if name in called or any(True for _ in module.children()):
            continue
        holder = _holder(model, name)
        # A whole model decides by its inputs which of its parts run; what is in it says nothing.
        if holder in called and not hasattr(model.get_submodule(holder), "config_class"):
            missed.add(name)
    return missed


class _AnswerEveryValueWithOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A pass on meta may ask for values: is all of the mask set, is nothing packed? Yes is the usual answer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


class _Choices(_AnswerEveryValueWithOne):
    """Follows what each weight computes, as long as its outputs stay apart in the last dimension, to a choice.

    Tensors that are followed are kept, so that no later one gets the id of one that is gone.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.choosing: set[str] = set()
        self._weights: dict[int, frozenset[str]] = {key: frozenset({name}) for key, name in weights.items()}
        self._computed: dict[int, frozenset[str]] = {}
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        kind = func.overloadpacket.__name__
        if kind in _CHOICES:
            self.choosing.update(*(self._computed.get(id(t), ()) for t in given))
        for made in (t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.dim()):
            if kind in _PRODUCTS:
                self._note(made, self._computed, [self._weights.get(id(t)) for t in given])
                continue
            same = [self._computed.get(id(t)) for t in given if t.shape[-1] == made.shape[-1]]
            self._note(made, self._computed, same)
            if made.dim() == 2:  # a weight that was transposed or cast is still that weight
                self._note(made, self._weights, [self._weights.get(id(t)) for t in given])
        return result

    def _note(
        self, made: torch.Tensor, names: dict[int, frozenset[str]], sources: Iterable[frozenset[str] | None]
    ) -> None:
        if found := frozenset().union(*filter(None, sources)):
            names[id(made)] = found
            self._kept.append(made)


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2


def _run(model: nn.Module, mode: TorchDispatchMode) -> None:
    """A forward pass without data, under `mode`, as far as it goes."""
    with suppress(Exception), _offline(), torch.no_grad(), torch.device("meta"), mode:
        model(**_tokens(model))


def towers(model: nn.Module) -> list[str]:
    """The models inside a model that see images or hear sound: `model.vision_tower`, `model.visual`, ..."""
    kinds = tuple({type(config) for config in _sensory_configs(getattr(model, "config", None))})
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{tower}.") for tower in found)
        if name and not inside and kinds and isinstance(getattr(module, "config", None), kinds):
            found.append(name)
    return found


def _sensory_configs(config: Any) -> Iterator[Any]:
    for key, value in vars(config).items() if config is not None else ():
        if hasattr(value, "to_dict") and key.endswith("_config"):
            if any(word in key for word in ("vision", "audio", "speech")):
                yield value
            else:
                yield from _sensory_configs(value)


def _tokens(model: nn.Module) -> dict[str, Any]:
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


def _holder(model: nn.Module, name: str) -> str:
    """The nearest module around `name` that has a forward of its own."""
    holder = name.rpartition(".")[0]
    while holder and isinstance(model.get_submodule(holder), (nn.ModuleList, nn.ModuleDict)):
        holder = holder.rpartition(".")[0]
    return holder


def _require_model_class(folder: Path, name: str, cls: Any) -> None:
    import transformers
    from transformers.utils import DummyObject

    version, fits = transformers.__version__, isinstance(cls, type)
    if not fits:
        what, hint = f"which transformers {version} has not", "upgrade transformers, or name the class it has"
    elif name.startswith("AutoModel"):
        what, hint = "which stands for many classes", "name the one that the weights are of"
    # A dummy stands for a class whose library is not installed, and says so when it is called.
    elif not issubclass(cls, transformers.PreTrainedModel) and not isinstance(cls, DummyObject):
        what, hint = f"which is no model class of transformers {version}", "name the class of the model"
    else:
        return
    raise CheckpointError(f"{folder}/config.json names {name}, {what}", hint=f"{hint} under `architectures`")


def _build_plainly(config: Any, *, trusted: bool) -> None:
    """Take out of a parsed config, and of those in it, what asks for kernels or for code and changes no weight.

    Else transformers looks for a flash attention that is not installed, or for a kernel in somebody's repository, or
    asks at the terminal whether a part's code may run.
    """
    config._attn_implementation_internal = "eager"
    config._experts_implementation_internal = None
    if not trusted:
        vars(config).pop("auto_map", None)
    for part in vars(config).values():
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else [part]:
            if hasattr(inner, "_attn_implementation_internal"):
                _build_plainly(inner, trusted=trusted)


@contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from fetching what a config names: another repository's config, a kernel."""
    from transformers.utils.hub import constants  # huggingface_hub's own

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _remote_class(config: Mapping[str, Any], name: str) -> str:
    """Where config.json says that this class's code lies, empty where it says nothing."""
    auto_map = config.get("auto_map")
    references = auto_map.values() if isinstance(auto_map, dict) else ()
    return next((str(r) for r in references if isinstance(r, str) and r.rpartition(".")[2] == name), "")


def _known(config: Mapping[str, Any], name: str) -> bool:
    import transformers

    return (
        isinstance(getattr(transformers, name, None), type) and config.get("model_type") in transformers.CONFIG_MAPPING
    )


def _described(operation: Any) -> str:
    dim = getattr(operation, "dim", None)
    return type(operation).__name__ + (f"({dim})" if dim is not None else "")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
