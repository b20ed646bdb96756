"""Assemble the adapter file from the parts of the shards.

Each part holds the factors of one shard's weights. The experts of one layer may come from several shards, so their
factors are stacked in PEFT's layout only when all parts exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from milora_init.checkpoint.header import Header, plan_header
from milora_init.checkpoint.tensor_file import SafetensorsShard, TensorSource
from milora_init.checkpoint.writer import SafetensorsWriter, extended
from milora_init.lora.tensor_layout import factor_shapes, lora_key, store_expert_factors
from milora_init.manifest import WORK_FOLDER
from milora_init.plan.weights import WeightPlan


def part_name(shard: str) -> str:
    """The path of a shard's part of the adapter, relative to the output folder."""
    return f"{WORK_FOLDER}/{extended(shard, '.adapter')}"


def part_key(module: str, factor: str) -> str:
    """The name of factor `A` or `B` of a weight in a part."""
    return f"{module}.{factor}"


def part_header(weights: Iterable[WeightPlan]) -> Header:
    """Header of the part with these weights' factors: A (rank, n) and B (m, rank) in float32."""
    return plan_header(
        (
            (part_key(w.weight.module, factor), "F32", shape)
            for w in weights
            for factor, shape in zip("AB", factor_shapes(w.rank, w.weight.shape, None), strict=True)
        ),
        metadata={},
    )


def assemble_adapter(parts: Iterable[Path], weights: Sequence[WeightPlan], header: Header, target: Path) -> None:
    """Write the adapter's file from its parts. The experts of one layer are in memory at a time.

    Args:
        parts: The part of every shard that has one.
        weights: Every weight that was split, in the model's order.
        header: Of the adapter's file.
        target: The adapter's file.

    Raises:
        CheckpointError: A part that cannot be read.
        OutputError: The file cannot be written.
    """
    sources: dict[str, TensorSource] = {}
    for path in parts:
        with SafetensorsShard(path) as part:
            sources |= {name: part.locate(name) for name in part.header.tensors}
    with SafetensorsWriter(target, header) as writer:
        for key, group in groupby(weights, key=lambda w: w.key):
            names = [lora_key(key, factor) for factor in "AB"]
            A, B = (torch.zeros(header.tensors[name].shape) for name in names)
            for w in group:
                own_A, own_B = (sources[part_key(w.weight.module, factor)].read() for factor in "AB")
                if w.weight.expert is None:
                    A, B = own_A, own_B
                else:
                    store_expert_factors(A, B, own_A, own_B, w.weight.expert)
            for name, tensor in zip(names, (A, B), strict=True):
                writer.write(name, tensor)
        writer.finish()
