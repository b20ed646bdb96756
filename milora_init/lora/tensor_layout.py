"""PEFT's layout of adapter tensors: one pair of factors per module, one stacked pair for all experts of a layer.

A module has A (r, n) and B (m, r). The experts of a layer are one parameter (experts, m, n), and their factors are
stacked as PEFT's ParamWrapper expects: A is (experts * r, n), expert after expert; B is (m, r * experts), and column j
* experts + e is column j of expert e. Where a parameter stacks two matrices along m (gate and up), its rank is the sum
of both ranks, A has the rows of both, and B is block-diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from milora_init.checkpoint.header import Header, plan_header
from milora_init.experts import ExpertSlot
from milora_init.model.adaptable import Adaptable

if TYPE_CHECKING:
    from torch import Tensor
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def lora_key(key: str, factor: str) -> str:
    """PEFT's name for factor `A` or `B` of a module, or of what stands in a module's place."""
    return f"base_model.model.{key}.lora_{factor}.weight"


def parse_lora_key(name: str) -> tuple[str, str] | None:
    """What `lora_key` was given for a tensor of an adapter file; None for any other tensor."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2]) if match else None


def factor_shapes(
    rank: int, shape: tuple[int, int], expert: ExpertSlot | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the tensors A and B that hold the factors of a weight (m, n) at its rank."""
    m, n = shape
    if expert is None:
        return (rank, n), (m, rank)
    stacked = rank * expert.parts * expert.count
    return (stacked, n), (m * expert.parts, stacked)


def weight_factors(A: Tensor, B: Tensor, rows: int, expert: ExpertSlot | None) -> tuple[Tensor, Tensor]:
    """The factors of one weight (rows, n) out of an adapter's tensors: B' (rows, R) and A' (R, n), as views.

    R is the weight's rank, or that of all parts together: training mixes what began as blocks.
    """
    if expert is None:
        return B, A
    top = expert.part * rows
    by_expert = B.reshape(B.shape[0], -1, expert.count)
    return by_expert[top : top + rows, :, expert.index], A.reshape(expert.count, -1, A.shape[1])[expert.index]


def store_expert_factors(A: Tensor, B: Tensor, own_A: Tensor, own_B: Tensor, expert: ExpertSlot) -> None:
    """Write the factors of one expert's weight, own_A (r, n) and own_B (m, r), into its layer's A and B."""
    (rank, rows), part = (own_A.shape[0], own_B.shape[0]), expert.part
    its_B, its_A = weight_factors(A, B, rows, expert)
    block = slice(part * rank, (part + 1) * rank)
    its_A[block] = own_A
    its_B[:, block] = own_B


def initial_block(B: Tensor, A: Tensor, rank: int, expert: ExpertSlot | None) -> tuple[Tensor, Tensor]:
    """Of what `cut` gives, the block that the weight began with: B (m, rank) and A (rank, n)."""
    first = expert.part * rank if expert else 0
    return B[:, first : first + rank], A[first : first + rank]


def adapter_header(weights: Iterable[tuple[str, int, Adaptable]]) -> Header:
    """Header of the adapter's file, in float32, for each (key, rank, weight); the experts of a layer share a key."""
    tensors: dict[str, tuple[int, int]] = {}
    for key, rank, weight in weights:
        A, B = factor_shapes(rank, weight.shape, weight.expert)
        tensors |= {lora_key(key, "A"): A, lora_key(key, "B"): B}
    return plan_header(((name, "F32", shape) for name, shape in tensors.items()), metadata={"format": "pt"})
