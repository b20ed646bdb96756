"""Dense factorisations whose bits do not depend on the number of threads.

A LAPACK routine splits its work by the number of threads, and the order of its sums with it: factor the
same matrix with one thread and with two, and the last bits differ.  So does, on some processors, a product with
a long inner dimension.  MKL, torch's library on x86, promises the same bits for any number of threads in its
strict reproducible mode, for matrix products and at no measurable cost; the package asks for it when it is
imported (__init__.py).  So:

- the large factorisation, Cholesky, is blocked in Python, with all but a small part of its work in matrix
  products, and its triangular solves are products with the inverses of the diagonal blocks;
- what is left for LAPACK (diagonal blocks, thin QR, small eigenproblems) runs on one thread.

On a GPU none of this applies: the library's own factorisation is used, and an explicit inverse, because a
thin triangular solve is bound by latency there and a matrix product is not.

Cost: q^3 / 3 for Cholesky, as in LAPACK and as fast; the eigenvectors and the full SVD, which only the
fallbacks and the interior modes need, lose what further threads would have given them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]

BLOCK = 192


@contextmanager
def one_thread() -> Iterator[None]:
    """Run what is inside on one CPU thread, then restore the number that this thread had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def qr(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Y (q, k) = Q (q, k) R (k, k)."""
    with one_thread():
        Q, R = torch.linalg.qr(Y)
    return Q, R


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors of a symmetric matrix, read from its lower triangle."""
    with one_thread():
        values, vectors = torch.linalg.eigh(A)
    return values, vectors


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD: U, descending s, V^T."""
    with one_thread():
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, s, Vh


@dataclass(frozen=True, slots=True)
class Cholesky:
    """G = L L^T (q, q), with the inverses of L's diagonal blocks, or of the whole of G (on a GPU)."""

    L: Tensor
    inverses: list[Tensor]
    inverse: Tensor | None = None

    def solve(self, B: Tensor) -> Tensor:
        """G^-1 B for B (q, b)."""
        if self.inverse is not None:
            return self.inverse @ B
        X = torch.empty_like(B)
        blocks = list(zip(_blocks(self.L.shape[0]), self.inverses, strict=True))
        for rows, inverse in blocks:
            X[rows] = inverse @ torch.addmm(B[rows], self.L[rows, : rows.start], X[: rows.start], alpha=-1)
        Y = torch.empty_like(B)
        for rows, inverse in reversed(blocks):
            below = slice(rows.stop, None)
            Y[rows] = inverse.mT @ torch.addmm(X[rows], self.L[below, rows].mT, Y[below], alpha=-1)
        return Y

    def times(self, B: Tensor) -> Tensor:
        """G B, from its factor."""
        return self.L @ (self.L.mT @ B)


def cholesky(G: Tensor) -> Cholesky | None:
    """Factor G (q, q), given by its lower triangle and overwritten; None where it is not definite."""
    if G.is_cuda:
        L, failed = torch.linalg.cholesky_ex(G)
        return None if int(failed) else Cholesky(L, [], torch.cholesky_inverse(L))
    inverses = []
    for block in _blocks(G.shape[0]):
        start, below = block.start, slice(block.stop, None)
        G[:start, block] = 0
        G[start:, block].addmm_(G[start:, :start], G[block, :start].mT, alpha=-1)
        with one_thread():
            L, failed = torch.linalg.cholesky_ex(G[block, block])
            if int(failed):
                return None
            inverses.append(torch.linalg.solve_triangular(L, torch.eye(L.shape[0], dtype=L.dtype), upper=False))
        G[block, block] = L
        G[below, block] = G[below, block] @ inverses[-1].mT
    return Cholesky(G, inverses)


def _blocks(q: int) -> Iterator[slice]:
    for start in range(0, q, BLOCK):
        yield slice(start, min(q, start + BLOCK))
