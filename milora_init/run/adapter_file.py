"""Assemble the adapter file from the parts that the shards left.

Each part holds the factors of the weights of one shard. The experts of one layer may come from several shards, so they
are stacked in PEFT's layout only when all parts exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from milora_init.checkpoint.header import Header, plan_header
from milora_init.checkpoint.tensor_file import SafetensorsShard, TensorSource
from milora_init.checkpoint.writer import SafetensorsWriter
from milora_init.lora.tensor_layout import factor_shapes, lora_key, store_expert_factors
from milora_init.plan.weights import WeightPlan


def part_key(module: str, factor: str) -> str:
    """The name of factor `A` or `B` of a weight in a piece."""
    return f"{module}.{factor}"


def part_header(weights: Iterable[WeightPlan]) -> Header:
    """Header of the piece that holds these weights' factors: A (rank, n) and B (m, rank) in float32."""
    return plan_header(
        (
            (part_key(w.weight.module, factor), "F32", shape)
            for w in weights
            for factor, shape in zip("AB", factor_shapes(w.rank, w.weight.shape, None), strict=True)
        ),
        metadata={},
    )


def assemble_adapter(
    adapter_parts: Iterable[Path], weights: Sequence[WeightPlan], header: Header, target: Path
) -> None:
    """Write the adapter's file from the pieces. One layer's experts are held in memory at a time.

    Raises:
        CheckpointError: A piece that cannot be read.
        OutputError: The file cannot be written.
    """
    where: dict[str, TensorSource] = {}
    for path in adapter_parts:
        part = SafetensorsShard(path)
        where |= {name: part.locate(name) for name in part.header.tensors}
        part.close()
    with SafetensorsWriter(target, header) as writer:
        for key, group in groupby(weights, key=lambda w: w.key):
            names = [lora_key(key, factor) for factor in "AB"]
            A, B = (torch.zeros(header.tensors[name].shape) for name in names)
            for w in group:
                own_A, own_B = (where[part_key(w.weight.module, factor)].read() for factor in "AB")
                if w.weight.expert is None:
                    A, B = own_A, own_B
                else:
                    store_expert_factors(A, B, own_A, own_B, w.weight.expert)
            for name, tensor in zip(names, (A, B), strict=True):
                writer.write(name, tensor)
        writer.finish()
