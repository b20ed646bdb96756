"""The r largest eigenpairs of a symmetric positive semi-definite operator, by block Lanczos.

The operator is a function of a block (q, b). The smallest singular values of a weight are the largest eigenvalues of
the inverse of its Gram matrix, so this one loop serves both ends of the spectrum.

Orthogonality. Each new block is orthogonalised against the whole basis K, twice, and the projected operator
T = K^T A K is computed in full, not as the band that it is in exact arithmetic. Both are cheap beside the operator, and
no eigenvalue is found twice.

Stopping. The residual of a Ritz pair, divided by the distance to the nearest unwanted Ritz value, bounds the angle by
which its vector is wrong. The loop ends when these angles are small, and not after a number of steps: where the wanted
and the unwanted eigenvalues are close, a small residual says little.

Completeness. A Krylov space lacks an eigenvector if its start does, or if an eigenvalue has more copies than the block
has columns. So a second, independent random block, the probe, is iterated in the complement of the basis, where a
missed eigenvector would dominate at once: its largest Ritz value must be below the wanted ones.

Cost. The operator for each column, and 8 q k operations for a block of the basis at k columns. A convergence test
costs an eigenproblem of the size of the basis, so there are few: the angle falls about geometrically, and two tests say
when the next is worth while. On a GPU nothing between two tests waits for the host.

Failure. `NotConverged`, with the reason.

Sources: G. H. Golub and R. Underwood (1977), https://doi.org/10.1016/B978-0-12-587260-7.50018-2; R. Grimes,
J. Lewis and H. Simon (1994), https://doi.org/10.1137/S0895479888151111.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic, plus_product, read_together
from milora_init.linalg.blocked_matrix import Operator
from milora_init.linalg.certificate import NotConverged

PROBE_COLUMNS = 24
_MOST_STEPS_UNTESTED = 8
_ESTIMATE_STEPS = 4
_FLOAT32_CONDITION = 1e4  # of a block: beyond it a few digits of orthogonality are lost, which float32 work survives


@dataclass(frozen=True, slots=True)
class RitzPairs:
    """Approximate eigenpairs of an operator (q, q).

    Attributes:
        values: (r + extra,), descending, on the CPU in float64.
        vectors: (q, r + extra), an orthonormal basis of their eigenvectors, in float64.
        next_value: The largest Ritz value below the r wanted ones.
        probe: The operator projected on the probe (b, b), on the device: its norm is the probe's largest Ritz value.
        steps: Blocks in the basis.
    """

    values: Tensor
    vectors: Tensor
    next_value: float
    probe: Tensor
    steps: int


def largest_eigenpairs(  # noqa: PLR0913  the parameters of the method
    apply: Operator,
    q: int,
    r: int,
    *,
    extra: int = 0,
    block: int,
    max_basis: int,
    tolerance: float,
    arithmetic: DeviceArithmetic,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> RitzPairs:
    """The r largest eigenpairs of the operator `apply` (q, q).

    Args:
        apply: On a block (q, b) of `dtype` on `device`.
        q: The size of the operator.
        r: How many eigenpairs.
        extra: How many more are returned, as they are. The tolerance is then that of the wanted space within the
            returned one.
        block: Columns of a block.
        max_basis: Columns of the basis at which the search ends.
        tolerance: Of the estimated angle between the wanted space and the computed one, in radians, to first order.
        arithmetic: Orthonormalises the blocks.
        device: Of the basis. The start block is drawn on the CPU, the same for every device.
        dtype: Of the basis, float64 or float32.

    Raises:
        NotConverged: The basis is full, or has entries that are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(q, block + PROBE_COLUMNS, generator=generator, dtype=torch.float64).to(device, dtype)
    newest, _ = arithmetic.orthonormalise(start[:, :block])
    columns = max_basis + 2 * block
    basis = torch.empty(columns, q, dtype=dtype, device=device).mT  # column-major: columns are appended
    T = torch.zeros(columns, columns, dtype=dtype, device=device)
    k, step, next_test = 0, 0, -(-3 * r // (2 * block)) + 4
    previous = (0, math.inf)
    condition = math.inf if dtype == torch.float64 else _FLOAT32_CONDITION
    while True:
        basis[:, k : k + block] = newest
        k, step = k + block, step + 1
        K = basis[:, :k]
        image = apply(newest)
        first = K.mT @ image
        image = torch.addmm(image, K, first, alpha=-1)
        second = K.mT @ image
        image.addmm_(K, second, alpha=-1)
        T[:k, k - block : k] = first + second
        newest, factor = arithmetic.orthonormalise(image, condition=condition)
        T[k : k + block, k - block : k] = factor
        if k > r + extra and (step >= next_test or k >= max_basis):
            on_host = T[: k + block, :k].cpu().to(torch.float64)
            projected = on_host[:k].triu()
            projected += projected.triu(1).mT
            if not bool(projected.isfinite().all()):
                raise NotConverged(f"the Krylov space broke down after {step} steps")
            values, vectors = (x.flip(-1) for x in torch.linalg.eigh(projected))
            residual = (on_host[k:, -block:] @ vectors[-block:, :r]).norm(dim=0)
            angle = float((residual / (values[:r] - values[r + extra]).clamp_min(1e-300)).norm())
            if angle <= tolerance:
                break
            if k >= max_basis:
                raise NotConverged(f"no convergence with {k} Krylov vectors")
            next_test = step + _steps_to_convergence(previous, (step, angle), tolerance)
            previous = (step, angle)

    # One more application of the operator costs nothing: A (K y) = K y value + newest (factor y).
    # In float64, because a float32 sum over the basis would leave ten times the rounding error of its vectors.
    y = vectors[:, : r + extra].to(device)
    largest = values[: r + extra].to(device)
    improved = K.to(y.dtype) @ y + newest.to(y.dtype) @ (factor.to(y.dtype) @ y[-block:]) / largest
    improved, _ = arithmetic.orthonormalise(improved, condition=math.inf if dtype == y.dtype else 10)
    probe = complement_projection(apply, K, start[:, block:], arithmetic)
    return RitzPairs(values[: r + extra], improved, float(values[r]), probe, step)


def krylov_projection(
    apply: Operator,
    q: int,
    *,
    block: int,
    arithmetic: DeviceArithmetic,
    device: torch.device,
    batch: Sequence[int] = (),
) -> Tensor:
    """A float32 operator (..., q, q) projected on a small Krylov space: its largest eigenvalue, to a few percent."""
    generator = torch.Generator().manual_seed(1)
    newest = torch.randn(q, block, generator=generator, dtype=torch.float32).to(device)
    basis = newest = arithmetic.normalise(newest).expand(*batch, q, block)
    for _ in range(_ESTIMATE_STEPS - 1):
        newest = arithmetic.normalise(outside(basis, apply(newest)))
        basis = torch.cat([basis, newest], dim=-1)
    projected: Tensor = basis.mT @ apply(basis)
    return projected


def power_projection(
    apply: Operator,
    q: int,
    *,
    arithmetic: DeviceArithmetic,
    device: torch.device,
    dtype: torch.dtype,
    batch: Sequence[int] = (),
) -> Tensor:
    """An operator (..., q, q) projected on a block that was applied twice: its largest eigenvalue, to a tenth or so."""
    block = torch.randn(q, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = block.to(device, dtype).expand(*batch, q, 24)
    for _ in range(2):
        block = arithmetic.normalise(apply(block))
    projected: Tensor = block.mT @ apply(block)
    return projected


def largest_eigenvalues(*projections: Tensor) -> list[Tensor]:
    """The largest eigenvalues (...) of small matrices (..., b, b), or nan, on the CPU. All are read at once."""
    return [_largest_eigenvalue(x) for x in read_together(*projections)]


def _largest_eigenvalue(x: Tensor) -> Tensor:
    finite = x.isfinite().flatten(-2).all(dim=-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], x, 0.0))[..., -1]
    return torch.where(finite, values, math.nan)


def spectral_norm(x: Tensor) -> float:
    """The largest singular value of a small matrix on the CPU."""
    return float(torch.linalg.matrix_norm(x, ord=2))


def round_down(x: float) -> float:
    """A number down to five bits, so that it does not depend on the last bits of a float32."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.floor(32 * mantissa) / 32, exponent)


def _steps_to_convergence(previous: tuple[int, float], now: tuple[int, float], tolerance: float) -> int:
    """Steps until the angle meets the tolerance, if it falls as it did between two tests (step, angle)."""
    if not (math.isfinite(previous[1]) and now[1] < previous[1]):
        return 2
    fall = math.log(previous[1] / now[1]) / (now[0] - previous[0])
    return max(1, min(_MOST_STEPS_UNTESTED, math.ceil(math.log(now[1] / tolerance) / fall)))


def complement_projection(apply: Operator, K: Tensor, start: Tensor, arithmetic: DeviceArithmetic) -> Tensor:
    """The operator on the complement of an orthonormal K (..., q, k), projected on a block that it was applied to.

    The block starts as `start` (..., q, b); the result is (..., b, b).
    """
    block = apply(outside(K, start))
    block = arithmetic.normalise(outside(K, outside(K, block)))
    projection: Tensor = block.mT @ apply(block)
    return projection


def outside(K: Tensor, Y: Tensor) -> Tensor:
    """Y (..., q, b) without its part in the span of an orthonormal K (..., q, k)."""
    return plus_product(Y, K, K.mT @ Y, -1)
