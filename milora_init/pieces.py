"""The adapter in the making: each shard's factors in a piece beside the journal, put together at the end.

A piece holds the factors of each weight under names of its own. The experts of one layer may come from several shards;
only when all pieces stand are they stacked the way PEFT wants them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from milora_init.checkpoint import SafetensorsShard, TensorSource
from milora_init.layout import factor_shapes, lora_key, put
from milora_init.safetensors_format import Header, plan_header
from milora_init.safetensors_writer import SafetensorsWriter
from milora_init.weight_plan import WeightPlan


def piece_key(module: str, factor: str) -> str:
    """The name of factor `A` or `B` of a weight in a piece."""
    return f"{module}.{factor}"


def plan_piece(weights: Iterable[WeightPlan]) -> Header:
    """Header of the piece that holds these weights' factors: A (rank, n) and B (m, rank) in float32."""
    return plan_header(
        (
            (piece_key(w.weight.module, factor), "F32", shape)
            for w in weights
            for factor, shape in zip("AB", factor_shapes(w.rank, w.weight.shape, None), strict=True)
        ),
        metadata={},
    )


def assemble(pieces: Iterable[Path], weights: Sequence[WeightPlan], header: Header, target: Path) -> None:
    """Write the adapter's file from the pieces. One layer's experts are held in memory at a time.

    Raises:
        CheckpointError: A piece that cannot be read.
        OutputError: The file cannot be written.
    """
    where: dict[str, TensorSource] = {}
    for path in pieces:
        piece = SafetensorsShard(path)
        where |= {name: piece.locate(name) for name in piece.header.tensors}
        piece.close()
    with SafetensorsWriter(target, header) as writer:
        for key, group in groupby(weights, key=lambda w: w.key):
            names = [lora_key(key, factor) for factor in "AB"]
            A, B = (torch.zeros(header.tensors[name].shape) for name in names)
            for w in group:
                own_A, own_B = (where[piece_key(w.weight.module, factor)].read() for factor in "AB")
                if w.weight.expert is None:
                    A, B = own_A, own_B
                else:
                    put(A, B, own_A, own_B, w.weight.expert)
            for name, tensor in zip(names, (A, B), strict=True):
                writer.write(name, tensor)
        writer.finish()
