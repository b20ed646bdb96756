"""Convert between the factors of single weights and the adapter tensors that PEFT reads.

A module has one pair of factors, A (r, n) and B (m, r), which are stored unchanged. The experts of a layer are one
parameter (experts, m, n), and PEFT's ParamWrapper expects their factors stacked. A is (experts * r, n), and its row
e * r + j is row j of expert e. B is (m, r * experts), and its column j * experts + e is column j of expert e. If the
parameter stacks two matrices of each expert along m (gate and up), its rank is the sum of both ranks, A has the rows of
both, and B is block-diagonal.
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
_MAGNITUDE_KEY = re.compile(r"base_model\.model\.(.+)\.lora_magnitude_vector(?:\.weight)?")


def lora_key(key: str, factor: str) -> str:
    """The name of an adapter tensor in PEFT.

    Args:
        key: The module's name. For a fused parameter it is the name of the module that owns the parameter, followed by
            `.base_layer` for each parameter of the same module that PEFT wraps later.
        factor: `A` or `B`.
    """
    return f"base_model.model.{key}.lora_{factor}.weight"


def parse_lora_key(name: str) -> tuple[str, str] | None:
    """The arguments (key, factor) for which `lora_key` returns this name; None if the tensor is not a factor."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2]) if match else None


def magnitude_key(key: str) -> str:
    """The name of the tensor with DoRA's magnitudes of a module."""
    return f"base_model.model.{key}.lora_magnitude_vector"


def parse_magnitude_key(name: str) -> str | None:
    """The module of a tensor with DoRA's magnitudes; None for another tensor."""
    match = _MAGNITUDE_KEY.fullmatch(name)
    return match[1] if match else None


def stacked_shapes(rank: int, shape: tuple[int, int], experts: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the tensors A and B for `experts` matrices (m, n) of one rank. For a module, `experts` is 1."""
    m, n = shape
    return (experts * rank, n), (m, rank * experts)


def stack_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The adapter tensors A (experts * r, n) and B (m, r * experts), from A (experts, r, n) and B (experts, m, r)."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1, 2)


def unstack_factors(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Views A (experts, r, n) and B (experts, m, r) of the adapter tensors; the inverse of `stack_factors`."""
    return A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)


def factor_shapes(
    rank: int, shape: tuple[int, int], expert: ExpertSlot | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the tensors A and B that contain the factors of a weight (m, n) of this rank."""
    if expert is None:
        return stacked_shapes(rank, shape, 1)
    m, n = shape
    return stacked_shapes(rank * expert.parts, (m * expert.parts, n), expert.count)


def weight_factors(A: Tensor, B: Tensor, rows: int, expert: ExpertSlot | None) -> tuple[Tensor, Tensor]:
    """Views B (rows, R) and A (R, n) of the adapter tensors: the factors of one weight (rows, n).

    R is the weight's rank. If matrices are stacked along m, R is the sum of their ranks, because training changes B
    outside the diagonal blocks too.
    """
    if expert is None:
        return B, A
    A_experts, B_experts = unstack_factors(A, B, expert.count)
    first = expert.part * rows
    return B_experts[expert.index, first : first + rows], A_experts[expert.index]


def store_expert_factors(A: Tensor, B: Tensor, own_A: Tensor, own_B: Tensor, expert: ExpertSlot) -> None:
    """Write the factors own_A (r, n) and own_B (m, r) of one expert's weight into the layer's tensors A and B."""
    rank, rows = own_A.shape[0], own_B.shape[0]
    expert_B, expert_A = weight_factors(A, B, rows, expert)
    first = expert.part * rank
    expert_A[first : first + rank] = own_A
    expert_B[:, first : first + rank] = own_B


def initial_block(B: Tensor, A: Tensor, rank: int, expert: ExpertSlot | None) -> tuple[Tensor, Tensor]:
    """The part of the result of `weight_factors` that was not zero before training: B (m, rank) and A (rank, n)."""
    first = expert.part * rank if expert else 0
    return B[:, first : first + rank], A[first : first + rank]


def adapter_header(weights: Iterable[tuple[str, int, Adaptable]]) -> Header:
    """The header of the adapter's file, in float32, from (key, rank, weight). The experts of a layer share one key."""
    tensors: dict[str, tuple[int, int]] = {}
    for key, rank, weight in weights:
        A, B = factor_shapes(rank, weight.shape, weight.expert)
        tensors |= {lora_key(key, "A"): A, lora_key(key, "B"): B}
    return plan_header(((name, "F32", shape) for name, shape in tensors.items()), metadata={"format": "pt"})
