"""The Cholesky factor G = L L^T of a Gram matrix, and products with G^-1.

Two algorithms, chosen by `DeviceArithmetic.inverse`:

"triangular". The factorisation is blocked here, in place, with nearly all of its work in matrix products. With MKL, on
one thread, it takes three quarters to nine tenths of the time of LAPACK's at q = 2048 and 4096, and no second (q, q)
matrix is held. A solve is two triangular solves of the library.

"explicit". The library's factorisation, then its inverse of G, in a second (q, q) matrix: a solve is one product.

Cost: q^3 / 3 operations for the factor, 2 q^3 / 3 for the explicit inverse, 2 q^2 for each column of a solve.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic

_BLOCK = 192


@dataclass(frozen=True, slots=True)
class CholeskyFactor:
    """G = L L^T (q, q).

    Attributes:
        L: (q, q), lower triangular.
        inverse: G^-1 (q, q), or None.
    """

    L: Tensor
    inverse: Tensor | None = None

    def solve(self, B: Tensor) -> Tensor:
        """G^-1 B (q, b) for B (q, b)."""
        if self.inverse is not None:
            return self.inverse @ B
        Y = torch.linalg.solve_triangular(self.L, B, upper=False)
        X: Tensor = torch.linalg.solve_triangular(self.L.mT, Y, upper=True)
        return X

    def times(self, B: Tensor) -> Tensor:
        """G B (q, b) for B (q, b), from the factor."""
        return self.L @ (self.L.mT @ B)


def cholesky(G: Tensor, arithmetic: DeviceArithmetic) -> CholeskyFactor | None:
    """Factor G (q, q), given by its lower triangle and overwritten. None if G is not positive definite."""
    if arithmetic.inverse == "explicit":
        L, failed = torch.linalg.cholesky_ex(G)
        if int(failed):
            return None
        return CholeskyFactor(L, torch.cholesky_inverse(L))
    for block in _blocks(G.shape[0]):
        start, below = block.start, slice(block.stop, None)
        G[:start, block] = 0
        G[start:, block].addmm_(G[start:, :start], G[block, :start].mT, alpha=-1)
        L, failed = torch.linalg.cholesky_ex(G[block, block])
        if int(failed):
            return None
        identity = torch.eye(L.shape[0], dtype=L.dtype, device=L.device)
        G[block, block] = L
        G[below, block] = G[below, block] @ torch.linalg.solve_triangular(L, identity, upper=False).mT
    return CholeskyFactor(G)


def _blocks(q: int) -> Iterator[slice]:
    for start in range(0, q, _BLOCK):
        yield slice(start, min(q, start + _BLOCK))
