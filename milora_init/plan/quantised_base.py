"""Decide which quantised tensors of a model become dense in the base, and what the base's files then hold.

In a dense base all become dense. In a mixed base only those do that are adapted, and those that have to follow: servers
fuse some layers into one, which must be quantised as a whole or not at all, and transformers reads a block that is cut
short with the wrong size. All others keep their bytes, and config.json lists the modules that are not quantised.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.header import Header, plan_header, safetensors_name
from milora_init.checkpoint.quantisation import HF_QUANT_CONFIG
from milora_init.checkpoint.quantised_tensors import ACTIVATIONS, QuantisedTensor
from milora_init.errors import PlanError
from milora_init.options import BASES, InitOptions
from milora_init.plan.weights import WeightPlan

# Layers of one parent that vLLM fuses into one matrix; it refuses a fused layer of which a part is quantised.
_FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}), frozenset({"w1", "w3"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}), frozenset({"wq_a", "wkv"}),
)  # fmt: skip
_SKIP_LISTS = {"fp8": "modules_to_not_convert", "mxfp4": "modules_to_not_convert", "compressed-tensors": "ignore"}


@dataclass(frozen=True)
class BaseLayout:
    """Which tensors of a quantised model are dense in the base.

    Attributes:
        dense: The names of the quantised tensors that become dense.
        removed: The stored tensors that the base does not have: parts of those, and scales of their activations.
        by_codes: Every quantised tensor, by the stored name of its codes.
        mixed: Whether the base keeps the others quantised.
    """

    dense: frozenset[str]
    removed: frozenset[str]
    by_codes: Mapping[str, QuantisedTensor]
    mixed: bool = False

    def entries(
        self, source: Header, weights: Mapping[str, tuple[WeightPlan, ...]] = {}, dtype: str = "auto"
    ) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor that the base has of one file of the model.

        Args:
            source: Header of the model's file.
            weights: The weights to split, by the name of the tensor that contains them.
            dtype: Of the options: that of all that becomes dense; `auto` is the dtype of the model.
        """
        for info in source.tensors.values():
            tensor = self.by_codes.get(info.name)
            if tensor is not None and tensor.name in self.dense:
                yield tensor.name, tensor.dtype if dtype == "auto" else safetensors_name(dtype), tensor.shape
            elif info.name not in self.removed:
                yield info.name, weights[info.name][0].dtype if info.name in weights else info.dtype, info.shape


def plan_layout(checkpoint: Checkpoint, options: InitOptions, weights: Iterable[WeightPlan]) -> BaseLayout:
    """Plan which tensors are dense.

    Raises:
        PlanError: A mixed base of a model that is not quantised, or of a format that has none.
    """
    if options.base == "mixed":
        _require_mixed_possible(checkpoint)
        tensors = checkpoint.quantised.tensors
        dense = _closed({w.weight.tensor for w in weights} & tensors.keys(), checkpoint)
        if dense != tensors.keys():
            return BaseLayout(dense, removed_parts(checkpoint, dense), _by_codes(checkpoint), mixed=True)
    return dense_layout(checkpoint) if options.effective_method.writes_base else stored_layout(checkpoint)


def dense_layout(checkpoint: Checkpoint) -> BaseLayout:
    """Return the layout in which every quantised tensor is dense."""
    return BaseLayout(frozenset(checkpoint.quantised.tensors), checkpoint.quantised.part_names, _by_codes(checkpoint))


def stored_layout(checkpoint: Checkpoint) -> BaseLayout:
    """Return the layout in which every tensor is as it is stored."""
    return BaseLayout(frozenset(), frozenset(), _by_codes(checkpoint))


def _by_codes(checkpoint: Checkpoint) -> dict[str, QuantisedTensor]:
    return {tensor.codes.name: tensor for tensor in checkpoint.quantised.tensors.values()}


def base_sizes(
    checkpoint: Checkpoint, options: InitOptions, by_tensor: Mapping[str, tuple[WeightPlan, ...]]
) -> dict[str, int]:
    """Return the size in bytes of all shards for each base that a quantised model can have; empty if it is not one."""
    sizes: dict[str, int] = {}
    weights = [w for group in by_tensor.values() for w in group]
    for base in BASES if checkpoint.quantised.tensors else ():
        with suppress(PlanError):  # this format has no mixed base
            layout = plan_layout(checkpoint, replace(options, base=base), weights)
            headers = (
                plan_header(layout.entries(source, by_tensor, options.dtype), metadata=source.metadata)
                for source in checkpoint.headers.values()
            )
            sizes[base] = sum(header.file_bytes for header in headers if header.tensors)
    return sizes


def mixed_config(checkpoint: Checkpoint, layout: BaseLayout, weights: Iterable[WeightPlan]) -> dict[str, Any]:
    """Return config.json of a mixed base: the model's, with the dense modules listed as not quantised.

    The names are those of the checkpoint, which servers use, and those of the model where they differ.
    """
    assert checkpoint.quantisation is not None
    config = deepcopy(checkpoint.config)
    if not layout.dense:
        return config
    settings: Any = config
    for key in checkpoint.quantisation.path:
        settings = settings[key]
    key = _SKIP_LISTS[checkpoint.quantisation.rules]
    if settings.get(key) is None and settings.get("ignored_layers") is not None:
        key = "ignored_layers"
    listed = settings.get(key)
    if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
        raise PlanError(
            f"--base mixed: {key} in config.json is {str(listed)[:80]}, expected a list of names",
            hint="correct it, or use --base dense, which does not need it",
        )
    if listed is None:
        # Without a list transformers leaves the output head alone; with one it leaves alone what the list names.
        plain = (name for name, info in checkpoint.stored.items() if len(info.shape) > 1)
        listed = [n.removesuffix(".weight") for n in plain if n.endswith(".weight") and n not in layout.by_codes]
    in_model = [w.weight.module for w in weights if w.weight.tensor in layout.dense and w.weight.expert is None]
    names = [*(_module(name) for name in sorted(layout.dense)), *in_model]
    if checkpoint.quantisation.rules == "compressed-tensors":  # it compares whole names
        names = [*(name.removesuffix(".weight") for name in sorted(layout.dense)), *names]
    settings[key] = list(dict.fromkeys([*listed, *names]))
    return config


def _require_mixed_possible(checkpoint: Checkpoint) -> None:
    if checkpoint.quantisation is None:
        raise PlanError("--base mixed: the model is not quantised, so there is nothing to keep", hint="drop --base")
    if checkpoint.quantisation.rules not in _SKIP_LISTS:
        why = f"--base mixed: no library trains a base that is partly {checkpoint.quantisation.method}"
        raise PlanError(why, hint="use --base dense, the default")
    if not checkpoint.quantisation.path:
        raise PlanError(
            f"--base mixed: the quantisation is described in {HF_QUANT_CONFIG}, which transformers does not read",
            hint="use --base dense, the default",
        )


def _closed(adapted: Iterable[str], checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors that become dense if these do: with each one all of its group."""
    tensors = checkpoint.quantised.tensors
    assert checkpoint.quantisation is not None
    cut = {name for name, t in tensors.items() if checkpoint.quantisation.rules == "fp8" and _is_cut(t)}
    groups = {_group(name) for name in {*adapted, *cut}}
    return frozenset(name for name in tensors if _group(name) in groups)


def _group(name: str) -> tuple[str, frozenset[str]]:
    """What is quantised together: the experts of a layer, or the layers of one parent that are fused."""
    module = name.removesuffix(".weight")
    parent, _, last = module.rpartition(".")
    experts, found, _ = f"{module}.".partition(".experts.")
    if found:
        return experts, frozenset({"experts"})
    return parent, next((fused for fused in _FUSED if last in fused), frozenset({last}))


def _module(name: str) -> str:
    """The module that is listed for a tensor: for an expert, all experts of its layer."""
    experts, found, _ = f"{name}.".partition(".experts.")
    return f"{experts}.experts" if found else name.removesuffix(".weight")


def _is_cut(tensor: QuantisedTensor) -> bool:
    """Whether the last block of a row or column is shorter than the others."""
    return any(size % block for size, block in zip(tensor.matrix, tensor.rule.block, strict=True))


def removed_parts(checkpoint: Checkpoint, dense: Collection[str]) -> frozenset[str]:
    """Return the parts of the tensors that become dense, and the scales of their activations, by their stored names."""
    tensors = checkpoint.quantised.tensors
    parts = {info.name for name in dense for info in tensors[name].parts.values()}
    modules = {name.removesuffix(".weight") for name in dense}
    scales = {
        name
        for name in checkpoint.quantised.dropped
        if any(name.endswith(end) and name.removesuffix(end) in modules for end in ACTIVATIONS)
    }
    return frozenset(parts | scales)
