"""Decide which quantised tensors of a model become dense in the base, and what the base's files then hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.header import Header, safetensors_name
from milora_init.checkpoint.quantised_tensors import QuantisedTensor
from milora_init.plan.weights import WeightPlan


@dataclass(frozen=True)
class BaseLayout:
    """Which tensors of a quantised model are dense in the base.

    Attributes:
        dense: The names of the quantised tensors that become dense.
        removed: The stored tensors that the base does not have: parts of those, and scales of their activations.
        by_codes: Every quantised tensor, by the stored name of its codes.
    """

    dense: frozenset[str]
    removed: frozenset[str]
    by_codes: Mapping[str, QuantisedTensor]

    def entries(
        self, source: Header, weights: Mapping[str, tuple[WeightPlan, ...]], dtype: str
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


def plan_layout(checkpoint: Checkpoint, *, writes_base: bool) -> BaseLayout:
    """Plan the layout of a dense base, or of no base."""
    quantised = checkpoint.quantised
    by_codes = {tensor.codes.name: tensor for tensor in quantised.tensors.values()}
    if not writes_base:
        return BaseLayout(frozenset(), frozenset(), by_codes)
    return BaseLayout(frozenset(quantised.tensors), quantised.part_names, by_codes)
