"""A weight as the solver reads it: scaled by a power of two, in float64, a block of rows at a time.

No float64 copy of the whole is held, so memory is bounded whatever the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.cholesky import Operator

BLOCK_BYTES = 8 * 2**20  # of X, upcast at a time: twice as fast as blocks that leave the cache
COLUMNS = 24  # MKL multiplies so many at a time: 72 columns take half the time of 64
SMALL_GRAM = 256  # columns; below, halving a triangle further costs more than it saves


@dataclass(frozen=True, slots=True)
class BlockedMatrix:
    """X * 2^-exponent (p, q) in float64, read a block of rows at a time and never held whole."""

    X: Tensor
    exponent: int

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        p, q = self.X.shape
        step = max(1, BLOCK_BYTES // (8 * q))
        for start in range(0, p, step):
            rows = slice(start, min(p, start + step))
            block = self._upcast(rows)
            if self.exponent:
                # Two factors, for 2^1074 is no float64.
                half = self.exponent // 2
                block.mul_(math.ldexp(1.0, -half)).mul_(math.ldexp(1.0, half - self.exponent))
            yield rows, block

    def _upcast(self, rows: slice) -> Tensor:
        block = self.X[rows]
        if block.stride(0) < block.stride(1):  # a wide W, seen transposed: convert along its own rows
            return block.mT.to(torch.float64, copy=True).mT
        return block.to(torch.float64, copy=True)

    def times(self, V: Tensor) -> Tensor:
        """X V (p, k) for V (q, k)."""
        padded = _pad(V)
        out = V.new_empty(self.X.shape[0], V.shape[1])
        for rows, block in self.blocks():
            out[rows] = (block @ padded)[:, : V.shape[1]]
        return out

    def transposed_times(self, U: Tensor) -> Tensor:
        """X^T U (q, k) for U (p, k)."""
        padded = _pad(U)
        out = U.new_zeros(self.X.shape[1], padded.shape[1])
        for rows, block in self.blocks():
            out.addmm_(block.mT, padded[rows])
        return out[:, : U.shape[1]].contiguous()

    def whole(self) -> Tensor:
        """X itself, in float64."""
        out = torch.empty(self.X.shape, dtype=torch.float64, device=self.X.device)
        for rows, block in self.blocks():
            out[rows] = block
        return out

    def normal_operator(self) -> Operator:
        """V -> X^T X V.  X is kept in float64 where that takes no more than 3 q^2 numbers."""
        p, q = self.X.shape
        if p <= 3 * q:
            full = self.whole()
            return lambda V: full.mT @ (full @ V)

        def apply(V: Tensor) -> Tensor:
            out = torch.zeros_like(V)
            for _, block in self.blocks():
                out.addmm_(block.mT, block @ V)
            return out

        return apply

    def gram(self) -> Tensor:
        """X^T X (q, q), its lower triangle only: what lies above is not filled in."""
        q = self.X.shape[1]
        G = torch.zeros(q, q, dtype=torch.float64, device=self.X.device)
        for _, block in self.blocks():
            _add_gram(G, block)
        return G


def _add_gram(G: Tensor, block: Tensor) -> None:
    """Add block^T block to the lower triangle of G, by halves: nearly all of it is large square products."""
    q = G.shape[0]
    if q <= SMALL_GRAM:
        G.addmm_(block.mT, block)
        return
    half = -(-q // (2 * COLUMNS)) * COLUMNS
    left, right = block[:, :half], block[:, half:]
    _add_gram(G[:half, :half], left)
    _add_gram(G[half:, half:], right)
    G[half:, :half].addmm_(right.mT, left)


def _pad(V: Tensor) -> Tensor:
    """V with zero columns up to a multiple of `COLUMNS`."""
    return torch.nn.functional.pad(V, (0, -V.shape[1] % COLUMNS))
