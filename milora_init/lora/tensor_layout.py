"""PEFT's layout of adapter tensors: one pair of factors per module, one stacked pair for all experts of a layer.

A module has A (r, n) and B (m, r). The experts of a layer are one parameter (experts, m, n), and their factors are
stacked as PEFT's ParamWrapper expects: A is (experts * r, n), expert after expert; B is (m, r * experts), and column
j * experts + e is column j of expert e. Where a parameter stacks two matrices along m (gate and up), its rank is the
sum of both ranks, A has the rows of both, and B is block-diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from milora_init.checkpoint.header import Header, plan_header
from milora_init.expert_slot import ExpertSlot
from milora_init.model.adaptable import Adaptable

if TYPE_CHECKING:
    from torch import Tensor
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def lora_key(key: str, factor: str) -> str:
    """PEFT's name for the tensor of factor `A` or `B`.

    `key` is the module's name. For a parameter of experts it is the name of its owner, with `.base_layer` for each
    parameter of the same owner that PEFT wraps later.
    """
    return f"base_model.model.{key}.lora_{factor}.weight"


def parse_lora_key(name: str) -> tuple[str, str] | None:
    """The arguments of `lora_key` that give this name; None for a tensor that is not a factor."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2]) if match else None


def stacked_shapes(rank: int, shape: tuple[int, int], experts: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the tensors A and B for `experts` matrices (m, n) of one rank; of a plain module `experts` is 1."""
    m, n = shape
    return (experts * rank, n), (m, rank * experts)


def stack_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors A (experts * r, n) and B (m, r * experts) out of A (experts, r, n) and B (experts, m, r)."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1, 2)


def unstack_factors(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The factors A (experts, r, n) and B (experts, m, r) out of an adapter's tensors, as views."""
    return A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)


def factor_shapes(
    rank: int, shape: tuple[int, int], expert: ExpertSlot | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the tensors A and B that hold the factors of a weight (m, n) at its rank."""
    if expert is None:
        return stacked_shapes(rank, shape, 1)
    m, n = shape
    return stacked_shapes(rank * expert.parts, (m * expert.parts, n), expert.count)


def weight_factors(A: Tensor, B: Tensor, rows: int, expert: ExpertSlot | None) -> tuple[Tensor, Tensor]:
    """The factors of one weight (rows, n) out of an adapter's tensors: B (rows, R) and A (R, n), as views.

    R is the weight's rank; for stacked matrices it is the sum of their ranks, because training fills B outside its
    diagonal blocks.
    """
    if expert is None:
        return B, A
    A_experts, B_experts = unstack_factors(A, B, expert.count)
    top = expert.part * rows
    return B_experts[expert.index, top : top + rows], A_experts[expert.index]


def store_expert_factors(A: Tensor, B: Tensor, own_A: Tensor, own_B: Tensor, expert: ExpertSlot) -> None:
    """Write the factors of one expert's weight, own_A (r, n) and own_B (m, r), into its layer's A and B."""
    rank, rows = own_A.shape[0], own_B.shape[0]
    expert_B, expert_A = weight_factors(A, B, rows, expert)
    first = expert.part * rank
    expert_A[first : first + rank] = own_A
    expert_B[:, first : first + rank] = own_B


def initial_block(B: Tensor, A: Tensor, rank: int, expert: ExpertSlot | None) -> tuple[Tensor, Tensor]:
    """The block of `weight_factors` that was not zero before training: B (m, rank) and A (rank, n)."""
    first = expert.part * rank if expert else 0
    return B[:, first : first + rank], A[first : first + rank]


def adapter_header(weights: Iterable[tuple[str, int, Adaptable]]) -> Header:
    """Header of the adapter's file, in float32, for each (key, rank, weight); the experts of a layer share a key."""
    tensors: dict[str, tuple[int, int]] = {}
    for key, rank, weight in weights:
        A, B = factor_shapes(rank, weight.shape, weight.expert)
        tensors |= {lora_key(key, "A"): A, lora_key(key, "B"): B}
    return plan_header(((name, "F32", shape) for name, shape in tensors.items()), metadata={"format": "pt"})
