"""Where a trained update lies in a weight's singular directions, and which of its new directions are intruders.

W (m, n) = U diag(s) V^T is the original weight and D (m, n) the update. For a group of directions, such as the r
largest or the r smallest, the share of the update in it is the mean of both sides,

    (|U_g^T D|^2 + |D V_g|^2) / (2 |D|^2),

so the shares of the largest, the smallest and the other directions sum to 1. A random update has about r / m and r / n
of its square in r directions of either side.

An intruder dimension is one of the k largest left singular vectors of W + D that is similar to none of W: no cosine is
above 0.5 (arXiv 2410.21228, section 3, with k = 10). Only the directions at both ends of W are known here. What is
outside their space is similar to another direction by its length there at most. Where that does not decide, all of W's
directions are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.svd import singular_triplets

INTRUDER_VECTORS = 10
INTRUDER_COSINE = 0.5


@dataclass(frozen=True, slots=True)
class Movement:
    """What the training did to one weight.

    Attributes:
        norm: |D|, the Frobenius norm of the update.
        relative: |D| / |W|.
        minor: The share of the update in the r smallest directions of the original weight.
        middle: The share in the directions between.
        principal: The share in the r largest directions.
        intruders: How many of the largest singular vectors of the trained weight are similar to none of the original.
        vectors: How many of those vectors were compared.
    """

    norm: float
    relative: float
    minor: float
    middle: float
    principal: float
    intruders: int
    vectors: int


def movement(W: Tensor, B: Tensor, A: Tensor, rank: int, *, seed: int = 0) -> Movement:
    """Measure the update B @ A of a weight W.

    Args:
        W: The original weight (m, n).
        B, A: The update as factors (m, q) and (q, n).
        rank: How many directions of either end are counted as minor and as principal: at most min(m, n) / 2.
        seed: Of the search for the directions.

    Raises:
        ValueError: W or the update has entries that are not finite, or no algorithm converges.
    """
    W, B, A = W.double(), B.double(), A.double()
    D = B @ A
    norm, whole = float(D.norm()), float(W.norm())
    rank = max(1, min(rank, min(W.shape) // 2))
    ends = [singular_triplets(W, rank, mode=mode, seed=seed) for mode in ("min", "max")]
    if not norm:
        return Movement(0.0, 0.0, 0.0, 0.0, 0.0, 0, 0)
    shares = [float((end.U.mT @ D).square().sum() + (D @ end.V).square().sum()) / (2 * norm**2) for end in ends]
    vectors = min(INTRUDER_VECTORS, min(W.shape))
    found = singular_triplets(W + D, vectors, mode="max", seed=seed).U
    return Movement(
        norm=norm,
        relative=norm / whole if whole else float("inf"),
        minor=shares[0],
        middle=max(0.0, 1 - sum(shares)),
        principal=shares[1],
        intruders=intruders(W, found, torch.cat([end.U for end in ends], dim=1)),
        vectors=vectors,
    )


def intruders(W: Tensor, vectors: Tensor, known: Tensor) -> int:
    """How many columns of `vectors` (m, k) are similar to no left singular vector of W (m, n).

    Args:
        W: The weight, in float64.
        vectors: Orthonormal columns.
        known: Some of W's left singular vectors (m, j).
    """
    cosines = known.mT @ vectors
    similar = cosines.abs().amax(dim=0) > INTRUDER_COSINE
    outside = (1 - cosines.square().sum(dim=0)).clamp(min=0).sqrt()  # the most that another direction can have
    undecided = ~similar & (outside > INTRUDER_COSINE)
    certain = int((~similar & ~undecided).sum())
    if not bool(undecided.any()):
        return certain
    m, n = W.shape
    U = torch.linalg.eigh(W @ W.mT).eigenvectors if m <= n else torch.linalg.svd(W, full_matrices=False).U
    rest = (U.mT @ vectors[:, undecided]).abs().amax(dim=0)
    return certain + int((rest <= INTRUDER_COSINE).sum())
