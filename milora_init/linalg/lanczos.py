"""Block Lanczos: the r largest eigenpairs of a symmetric positive semi-definite operator.

The operator is a function of a (q, b) block.  The minor end of a weight is the top of the inverse of its Gram
matrix, so this one loop serves both ends of the spectrum.

The basis K is kept orthonormal to working precision (every new block is projected against all of it, twice),
and the projected operator T = K^T A K is taken whole, not as the band that theory promises.  Both cost little
beside the operator, and with them a Ritz value is never a ghost of one already found.

Stopping.  A Ritz pair's residual over its distance to the nearest unwanted Ritz value bounds the angle by
which it is wrong; the loop ends when these angles are small, not after a number of steps, because a residual
alone says little where the cut is narrow.

Evidence.  A Krylov space can be blind to an eigenvector, if its start is, or if an eigenvalue is repeated
more often than the block is wide.  A second, independent random block is therefore iterated in the complement
of the basis, where a missed eigenvector would dominate at once: its largest Ritz value must stay below the
cut.

Looks at convergence cost an eigenproblem of the size of the basis, so their number is kept small: the angle
falls about geometrically, and two looks say when the next is worth while.  On a GPU nothing between two looks
returns to the host: QR is Cholesky-QR, and T is copied over only for the look.

Sources: G. H. Golub and R. Underwood (1977), https://doi.org/10.1016/B978-0-12-587260-7.50018-2; R. Grimes,
J. Lewis and H. Simon (1994), https://doi.org/10.1137/S0895479888151111; Cholesky-QR twice: Y. Yamamoto et al.
(2015), https://etna.math.kent.edu/volumes/2011-2020/vol44/abstract.php?vol=44&pages=306-326.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.cholesky import Operator

LONGEST_WAIT = 8  # steps between two looks at convergence
ROUGH_STEPS = 4
PROBE_WIDTH = 24
PROBE_STEPS = 2


@dataclass(frozen=True, slots=True)
class Ritz:
    """The result of `largest`: values (r,) descending, and an orthonormal basis (q, r) of their eigenvectors.

    nearest is the largest Ritz value below the wanted ones; probe that of the independent block in the
    complement of the basis.
    """

    values: Tensor
    basis: Tensor
    nearest: float
    probe: float
    steps: int


def largest(
    apply: Operator, q: int, r: int, *, block: int, max_basis: int, tolerance: float, device: torch.device
) -> Ritz | str:
    """The r largest eigenpairs of the (q, q) operator `apply`, or in words why they could not be had.

    tolerance bounds the estimated angle, in radians, between the wanted space and the one returned, to first
    order.  The start is a fixed pseudo-random block, drawn on the CPU so that every device starts alike.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(q, block + PROBE_WIDTH, generator=generator, dtype=torch.float64).to(device)
    newest, _ = orthonormalise(start[:, :block])
    columns = max_basis + 2 * block
    basis = torch.empty(columns, q, dtype=torch.float64, device=device).mT  # column-major: columns are appended
    T = torch.zeros(columns, columns, dtype=torch.float64, device=device)
    k, step, look = 0, 0, -(-3 * r // (2 * block)) + 4
    previous = (0, math.inf)
    while True:
        basis[:, k : k + block] = newest
        k, step = k + block, step + 1
        K = basis[:, :k]
        image = apply(newest)
        first = K.mT @ image
        image = image - K @ first
        second = K.mT @ image
        image -= K @ second
        T[:k, k - block : k] = first + second
        newest, factor = orthonormalise(image)
        if k > r and (step >= look or k >= max_basis):
            small = T[:k, :k].triu()
            small = (small + small.triu(1).mT).cpu()
            if not bool(small.isfinite().all()):
                return f"the Krylov space broke down after {step} steps"
            values, vectors = (x.flip(-1) for x in torch.linalg.eigh(small))
            residual = (factor.cpu() @ vectors[-block:, :r]).norm(dim=0)
            angle = (residual / (values[:r] - values[r]).clamp_min(1e-300)).norm()
            if float(angle) <= tolerance:
                break
            if k >= max_basis:
                return f"no convergence with {k} Krylov vectors"
            look = step + _wait(previous, (step, float(angle)), tolerance)
            previous = (step, float(angle))

    # One more application of the operator is at hand for nothing: A (K y) = K y value + newest (factor y).
    y = vectors[:, :r].to(device)
    top = values[:r].to(device)
    improved, _ = orthonormalise(K @ y + newest @ (factor @ y[-block:]) / top)
    probe = _probe(apply, K, start[:, block:])
    return Ritz(top, improved, float(values[r]), probe, step)


def rough_largest(apply: Operator, q: int, *, block: int, device: torch.device) -> float:
    """The largest eigenvalue of a float32 operator, from below, to a few percent."""
    generator = torch.Generator().manual_seed(1)
    newest = torch.randn(q, block, generator=generator, dtype=torch.float32).to(device)
    basis, _ = orthonormalise(newest)
    newest = basis
    for _ in range(ROUGH_STEPS - 1):
        image = apply(newest)
        newest, _ = orthonormalise(image - basis @ (basis.mT @ image))
        basis = torch.cat([basis, newest], dim=1)
    projected = (basis.mT @ apply(basis)).cpu()
    return float(torch.linalg.eigh(projected)[0][-1])


def _wait(previous: tuple[int, float], now: tuple[int, float], tolerance: float) -> int:
    """Steps until the angle, falling as it did between two looks (step, angle), meets the tolerance."""
    if not (math.isfinite(previous[1]) and now[1] < previous[1]):
        return 2
    fall = math.log(previous[1] / now[1]) / (now[0] - previous[0])
    return max(1, min(LONGEST_WAIT, math.ceil(math.log(now[1] / tolerance) / fall)))


def orthonormalise(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Q (q, b) with orthonormal columns and R (b, b) with Y = Q R; NaN on a GPU where Y is rank-deficient."""
    if not Y.is_cuda:
        Q, R = torch.linalg.qr(Y)
        return Q, R
    # Householder QR of a thin block is launch-bound there; Cholesky-QR, twice, is a few matrix products.
    total = torch.eye(Y.shape[1], dtype=Y.dtype, device=Y.device)
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(Y.mT @ Y)
        factor = torch.where(failed == 0, factor, torch.nan)
        Y = torch.linalg.solve_triangular(factor.mT, Y, upper=True, left=False)
        total = factor.mT @ total
    return Y, total


def _probe(apply: Operator, K: Tensor, start: Tensor) -> float:
    """The largest Ritz value of the operator on the complement of K (q, k), from an independent start."""
    block = start
    value = torch.zeros((), dtype=start.dtype, device=start.device)
    for _ in range(PROBE_STEPS):
        for _ in range(2):
            block, _ = orthonormalise(block - K @ (K.mT @ block))
        image = apply(block)
        value = torch.linalg.matrix_norm(block.mT @ image, ord=2)
        block = image
    return float(value)
