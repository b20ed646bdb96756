"""The r smallest or largest singular triplets of X, sought in float32 and corrected in float64.

Why. What is wanted needs float64 accuracy, but most of the work towards it does not. float32 is twice as fast as
float64 on a CPU, and 32 or 64 times on most GPUs. The products of bfloat16 numbers are exact in it.

How. 1. An operator A in float32 whose largest eigenvalues are wanted. For the largest triplets it is the Gram matrix
G = X^T X, applied as X^T (X v). For the smallest it is M^-1, with M = G - shift I, from G and a Cholesky factor.
2. Block Lanczos (lanczos.py) or a filtered subspace (filtered_subspace.py) with A: the wanted right vectors, and some
beyond them, to three digits. 3. Rayleigh-Ritz with these vectors in float64, from X V and X^T X V. 4. While the error
estimate is too large: a correction t of each wanted vector v, with Ritz value theta and residual R = G v - theta v,
from

    (G - theta I) t = -R    on the complement of the basis,

the correction equation of the Jacobi-Davidson method. It is solved to a few digits, in float32, by Chebyshev's
iteration on (I - (theta - shift) M^-1) t = -M^-1 R, or on (I - G / theta) t = R / theta. The corrections join the
basis: back to step 3.

Precision. Step 3 alone decides the accuracy. Each correction multiplies the error by the relative error of A on the
complement, 1e-2 to 1e-4.

Cost. For the smallest p q^2 and q^3 / 3 operations in float32, for the largest 4 p q for each product; in float64
4 p q for each column of the basis, of which there are r to 4 r.

Failure. `NotConverged` where float32 does not resolve the wanted end: the first unwanted eigenvalue of G must be well
above eps * ||G||. That shows in the corrections, too, which then do not converge. The certificate (certificate.py) is
in float64, from X.

Sources: the correction equation: G. Sleijpen and H. van der Vorst (1996), https://doi.org/10.1137/S0036144599363084.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic
from milora_init.linalg.blocked_matrix import BlockedMatrix, Operator, gram_of_blocks
from milora_init.linalg.certificate import Certificate, Gaps, NotConverged, Solution, certify, is_accepted
from milora_init.linalg.cholesky import CholeskyFactor, cholesky
from milora_init.linalg.filtered_subspace import filtered_eigenpairs
from milora_init.linalg.lanczos import (
    RitzPairs,
    krylov_projection,
    largest_eigenpairs,
    largest_eigenvalues,
    outside,
    power_projection,
    round_down,
    spectral_norm,
)
from milora_init.linalg.shift_invert import SHIFT, SHIFT_BLOCK

EPS32 = torch.finfo(torch.float32).eps
_EXTRA = 32  # vectors beyond the wanted ones: the more, the better conditioned is the correction equation
_ANGLE = 1e-3  # of the float32 vectors, about as accurate as float32 leaves them
_NOISE = 0.1  # of eps * ||G||: four times and more what was measured on the eigenvectors of the smallest eigenvalues
_DEFLATED = 72  # large directions that are taken out of X before its Gram matrix is rounded
_BELOW_ZERO = 100  # times the noise: the shift where the spectrum reaches down to zero
_MOST_CHEBYSHEV_STEPS = 12
_BEST_REDUCTION = 1e-5  # of the error by one correction: the rounding of M leaves more
_MOST_CORRECTIONS = 5
_COLUMNS = 24  # corrections are computed in multiples of this


Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True, slots=True)
class _Estimate:
    """Of the errors of computed triplets.

    Attributes:
        errors: (r,), the part of each triplet in the relative error of the component.
        nearest: The nearest unwanted singular value.
    """

    errors: Tensor
    nearest: float


class _End(Protocol):
    """One end of the spectrum of G, by an operator A (q, q) in float32 whose largest eigenvalues belong to it."""

    @property
    def s_max(self) -> float | None:
        """An estimate of the largest singular value of X from below; None where it is among the wanted ones."""

    def apply(self, B: Tensor) -> Tensor:
        """A B (q, b) for B (q, b)."""

    def precondition(self, R: Tensor) -> Tensor:
        """The right-hand side (q, b) of the equation that A solves, for R (q, b), up to a factor for each column."""

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        """The eigenvalues of A that belong to eigenvalues of G."""

    def estimate(self, theta: Tensor, weights: Tensor) -> _Estimate:
        """For the Ritz values theta (r + 1,), the first unwanted one last, and weights = R^T precondition(R)."""

    def inverse(self, estimate: _Estimate) -> Operator | None:
        """The product with (X^T X - shift I)^-1 in float64, rather too large than too small; None if not known."""


@dataclass(frozen=True, slots=True)
class _SmallEnd:
    """A = M^-1 (q, q) in float32, with M = G - shift I to within `noise`, as an eigenvalue.

    Where large directions are deflated: with about k of the largest right singular vectors in the columns of Q, U
    orthonormal and F = Q R^-1 such that X F = U, Z = U^T X, and T = I - F Z,

        M^-1 = T S^-1 T^T + F F^T,    S = X^T (I - U U^T) X - shift I,

    by block elimination: S is the Schur complement. It has none of the large entries of G, whose rounding would hide
    the small eigenvalues. Along Q, S is zero; a multiple of Q Q^T makes it definite there, and T takes that out again.

    Attributes:
        S: The factor of S (q, q), or of M itself.
        deflated: F (q, k) and Z (k, q), or None.
        s_max: An estimate of the largest singular value of X, from below.
    """

    S: CholeskyFactor
    deflated: tuple[Tensor, Tensor] | None
    shift: float
    noise: float
    s_max: float | None

    def apply(self, B: Tensor) -> Tensor:
        """M^-1 B (q, b) for B (q, b), in float32."""
        if self.deflated is None:
            return self.S.solve(B)
        F, Z = self.deflated
        c = F.mT @ B
        x = self.S.solve(torch.addmm(B, Z.mT, c, alpha=-1))
        return torch.addmm(x, F, torch.addmm(c, Z, x, alpha=-1))

    def precondition(self, R: Tensor) -> Tensor:
        return self.apply(R)

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return 1 / (theta - self.shift)

    def estimate(self, theta: Tensor, weights: Tensor) -> _Estimate:
        """Raises NotConverged."""
        # An unwanted Ritz value lies above its eigenvalue, by about its own weight.
        following = float(theta[-1] - 2 * weights[-1])
        theta, weights = theta[:-1], weights[:-1].clamp_min(0)
        excess = self._excess(following)
        s, nearest = theta.clamp_min(0).sqrt(), math.sqrt(following)
        distance = (following - theta).clamp_min(1e-300)
        per_weight = nearest * (following + theta).clamp_min(0).sqrt() / distance  # as in `certify`
        errors = (excess * weights).sqrt() * per_weight / float(s.norm().clamp_min(1e-300))
        return _Estimate(errors, nearest)

    def inverse(self, estimate: _Estimate) -> Operator | None:
        excess = self._excess(estimate.nearest**2)
        return lambda B: excess * self.apply(B.to(torch.float32)).to(torch.float64)

    def _excess(self, next_eigenvalue: float) -> float:
        """The most by which an eigenvalue of M exceeds one of G that is at least `next_eigenvalue`, as a factor.

        Raises:
            NotConverged: It is not close to 1.
        """
        above = self.noise - self.shift
        if not above <= 0.5 * next_eigenvalue:
            raise NotConverged("float32 does not resolve the wanted end")
        return 1 + max(0.0, above / next_eigenvalue)


@dataclass(frozen=True, slots=True)
class _LargeEnd:
    """A = G in float32, as X^T (X B) with the blocks of rows of X (rows, q)."""

    blocks: list[Tensor]
    s_max: float | None = None

    def apply(self, B: Tensor) -> Tensor:
        """G B (q, b) for B (q, b), in float32."""
        return _transposed_times(self.blocks, [block @ B for block in self.blocks])

    def precondition(self, R: Tensor) -> Tensor:
        return R

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return theta

    def estimate(self, theta: Tensor, weights: Tensor) -> _Estimate:
        weights = weights.clamp_min(0)
        s = theta.clamp_min(0).sqrt()
        # An unwanted Ritz value lies below its eigenvalue, by its residual at most.
        nearest = math.sqrt(max(float(theta[-1] + weights[-1].sqrt()), 0.0))
        s, weights = s[:-1], weights[:-1]
        errors = weights.sqrt() / (s - nearest).clamp_min(1e-300) / float(s.norm().clamp_min(1e-300))
        return _Estimate(errors, nearest)

    def inverse(self, estimate: _Estimate) -> Operator | None:  # noqa: ARG002  the protocol's
        return None


def extreme_triplets(
    X: BlockedMatrix, r: int, tolerance: float, *, largest: bool = False
) -> tuple[Solution, Certificate]:
    """The r smallest or largest triplets of X (p, q), with a certified component error of at most `tolerance`.

    Raises:
        NotConverged: float32 does not resolve them, or the corrections do not converge.
    """
    q, arithmetic, device = X.shape[1], X.arithmetic, X.stored.device
    end: _End = _LargeEnd(list(X.float32_blocks())) if largest else _small_end(X)
    pairs, how = first_space(end, X, r)
    spare = 3 * (pairs.vectors.shape[1] - r) // 4  # beyond the wanted vectors, those of the basis that are as good
    V = pairs.vectors
    basis = V.to(torch.float32)
    image, gram_image = X.times_and_back(V)
    probe = pairs.probe.to(torch.float64)
    previous = math.inf
    for corrections in range(_MOST_CORRECTIONS + 1):
        projected = V.mT @ gram_image
        k = V.shape[1]
        on_host = torch.cat([projected.flatten(), probe.flatten()]).cpu()
        projected = on_host[: k * k].view(k, k)
        if not bool(on_host.isfinite().all()):
            raise NotConverged("the basis broke down in float64")
        theta, Y = torch.linalg.eigh((projected + projected.mT) / 2)
        if largest:
            theta, Y = theta.flip(0), Y.flip(1)
        if not spectral_norm(on_host[k * k :].view(probe.shape)) < float(end.eigenvalue_of(theta[r - 1])):
            raise NotConverged("an independent block found what the subspace had missed")
        scaled = torch.stack([Y[:, : r + 1], Y[:, : r + 1] * theta[: r + 1]]).to(device)
        residual = torch.addmm(gram_image @ scaled[0], V, scaled[1], alpha=-1).to(torch.float32)
        solved = outside(basis, end.precondition(residual))
        weights = (residual * solved).sum(dim=0).cpu().to(torch.float64)
        estimate = end.estimate(theta[: r + 1], weights)
        error = float(estimate.errors.norm())
        if error <= tolerance:
            wanted = scaled[0, :, :r]
            left, s, right, right_image = _rotate(image @ wanted, V @ wanted, arithmetic)
            solution = Solution(
                left,
                s,
                right,
                right_image,
                float(s[0]) if end.s_max is None else end.s_max,
                path="mixed",
                reason=f"r = {r} of q = {q}, {how}, {corrections} corrections",
                complete="an independent block found nothing beyond the cut",
                inverse=end.inverse(estimate),
            )
            nearest = torch.full_like(s, estimate.nearest)
            certificate = certify(X, solution, Gaps(nearest, (s - nearest).abs()))
            if is_accepted(solution, certificate, tolerance):
                return solution, certificate
        if not error > 0 or (corrections and not error < 0.5 * previous):
            break  # no correction helps: the estimate has nothing left to reduce, or does not fall
        previous = error
        if corrections == _MOST_CORRECTIONS:
            break
        worst = _worst(estimate.errors, tolerance)
        sigma = 1 / end.eigenvalue_of(theta[worst])
        reach = float(end.eigenvalue_of(theta[r + spare]))
        reduction = min(0.1, max(0.1 * tolerance / error, _BEST_REDUCTION))
        selection = torch.zeros(r + 1, worst.numel(), dtype=torch.float32)
        selection[worst, torch.arange(worst.numel())] = weights[worst].abs().clamp_min(1e-37).rsqrt().to(torch.float32)
        new = _corrections(end, basis, solved @ selection.to(device), sigma, reach, reduction)
        new, _ = arithmetic.orthonormalise(outside(V, new.to(torch.float64)), condition=1e7)
        new_image, new_gram_image = X.times_and_back(new)
        V, image = torch.cat([V, new], dim=1), torch.cat([image, new_image], dim=1)
        gram_image = torch.cat([gram_image, new_gram_image], dim=1)
        basis = V.to(torch.float32)
    raise NotConverged(f"corrections in float64 left an error of {error:.1e}")


def first_space(end: _End, X: BlockedMatrix, r: int) -> tuple[RitzPairs, str]:
    """The wanted right vectors and some more, by float32 work, and the algorithm in words. Raises NotConverged."""
    q, arithmetic, device = X.shape[1], X.arithmetic, X.stored.device
    if arithmetic.float32_space == "filtered":
        pairs = filtered_eigenpairs(end.apply, q, r, arithmetic=arithmetic, device=device)
        return pairs, f"{pairs.steps} float32 steps of {pairs.vectors.shape[1]}"
    block = min(arithmetic.float32_krylov_block, q // 96 * 8)  # a Krylov space needs a dozen steps at its disposal
    pairs = largest_eigenpairs(
        end.apply,
        q,
        r,
        extra=_EXTRA,
        block=block,
        max_basis=min(q - 2 * block, 16 * r + 768),
        tolerance=_ANGLE,
        arithmetic=arithmetic,
        device=device,
        dtype=torch.float32,
    )
    return pairs, f"{pairs.steps} float32 steps of {block}"


def _worst(errors: Tensor, tolerance: float) -> Tensor:
    """The indices, ascending, of the triplets to correct, of r with these errors."""
    r = errors.numel()
    count = int((errors > 0.1 * tolerance / math.sqrt(r)).sum())
    columns = min(r, -(-max(count, 1) // _COLUMNS) * _COLUMNS)
    return errors.topk(columns).indices.sort().values


def _small_end(X: BlockedMatrix) -> _SmallEnd:
    """M^-1 in float32: shifted for a clearly rectangular X, whose spectrum does not reach down to zero; else deflated.

    Raises:
        NotConverged: M is not positive definite.
    """
    p, q = X.shape
    return _shifted_inverse(X) if 2 * p >= 3 * q else _deflated_inverse(X)


def _shifted_inverse(X: BlockedMatrix) -> _SmallEnd:
    """(G - shift I)^-1, the shift just below the smallest eigenvalue of G. Raises NotConverged."""
    q, arithmetic, device = X.shape[1], X.arithmetic, X.stored.device
    G = X.float32_gram()
    norm = torch.linalg.matrix_norm(G)
    first = G.clone()
    first.diagonal().add_(_noise(norm))
    factor = _positive_definite(cholesky(first, arithmetic, may_wait=False))
    of_inverse = krylov_projection(factor.solve, q, block=SHIFT_BLOCK, arithmetic=arithmetic, device=device)
    of_matrix = power_projection(factor.times, q, arithmetic, device, torch.float32)
    inverse, largest, norm_on_host = largest_eigenvalues(of_inverse, of_matrix, norm.view(1, 1))
    if not (math.isfinite(inverse) and math.isfinite(largest)):
        raise NotConverged("the Gram matrix is not positive definite in float32")
    noise = _noise(norm_on_host)
    s_max = math.sqrt(max(largest, 0.0))
    shift = round_down(SHIFT * (1 / inverse - noise)) if inverse > 0 else 0.0
    if shift > 4 * noise:
        G.diagonal().sub_(shift)
        nearer = cholesky(G, arithmetic)
        if nearer is not None:
            return _SmallEnd(nearer, None, shift, noise, s_max)
    return _SmallEnd(factor, None, -noise, noise, s_max)


def _deflated_inverse(X: BlockedMatrix) -> _SmallEnd:
    """(G + noise I)^-1 by block elimination of the largest directions. Raises NotConverged."""
    q, arithmetic = X.shape[1], X.arithmetic
    start = torch.randn(q, _DEFLATED, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    blocks = list(X.float32_blocks())  # of rows; it is read five times
    starts = list(accumulate(block.shape[0] for block in blocks))[:-1]
    V = start.to(X.stored.device, torch.float32)
    Q = arithmetic.normalise(_transposed_times(blocks, [block @ V for block in blocks]))
    U, R = arithmetic.orthonormalise(torch.cat([block @ Q for block in blocks]), condition=1e4)
    F = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
    Z = _transposed_times(blocks, U.tensor_split(starts)).mT
    for block, rows in zip(blocks, U.tensor_split(starts), strict=True):
        block.addmm_(rows, Z, alpha=-1)
    S = gram_of_blocks(blocks, q, arithmetic)
    del blocks
    norm, trace, s_max = torch.stack(
        [torch.linalg.matrix_norm(S), S.diagonal().sum(), torch.linalg.matrix_norm(R, ord=2)]
    ).tolist()
    noise = _noise(norm)
    S.addmm_(Q, Q.mT, alpha=4 * trace / q)
    # An explicit inverse has an error of eps / shift, which must be small beside 1 / s_max^2.
    shift = -_BELOW_ZERO * noise
    S.diagonal().sub_(shift)
    factor = _positive_definite(cholesky(S, arithmetic, may_wait=False))
    if factor.inverse is None:
        return _SmallEnd(factor, (F, Z), shift, noise, s_max)
    # M^-1 as one matrix: a solve is then one product.
    SZ = factor.inverse @ Z.mT
    half = torch.addmm(F, F, Z @ SZ).mul_(0.5).sub_(SZ)
    whole = torch.addmm(factor.inverse, half, F.mT).addmm_(F, half.mT)
    return _SmallEnd(CholeskyFactor(factor.L, [], whole), None, shift, noise, s_max)


def _transposed_times(blocks: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """X^T U (q, k), for the blocks of rows of X (p, q) and of U (p, k)."""
    out = blocks[0].mT @ rows[0]
    for block, of_block in zip(blocks[1:], rows[1:], strict=True):
        out.addmm_(block.mT, of_block)
    return out


def _noise(norm: Number) -> Number:
    """The rounding error of an eigenvalue of a float32 Gram matrix whose lower triangle has this Frobenius norm."""
    return norm * (_NOISE * EPS32 * math.sqrt(2))


def _positive_definite(factor: CholeskyFactor | None) -> CholeskyFactor:
    if factor is None:
        raise NotConverged("the Gram matrix is not positive definite in float32")
    return factor


def _corrections(end: _End, basis: Tensor, solved: Tensor, sigma: Tensor, reach: float, reduction: float) -> Tensor:
    """t (q, b) with (I - K) t = solved, for K = sigma P A P, by Chebyshev's iteration in each column.

    P projects on the complement of the basis (q, k); solved (q, b) lies there; sigma (b,) are inverse eigenvalues. The
    eigenvalues of K lie between 0 and sigma * reach, where `reach` is the largest eigenvalue of A on the complement.
    The iteration ends when the error of t should be `reduction` of t.
    """
    center = (sigma * reach).clamp_max(0.99) / 2
    radius = center / (1 - center)  # of the spectrum of the iteration's matrix, once centered
    weights = [torch.ones_like(sigma)]
    slowest = float(radius.max())
    rate = slowest / (1 + math.sqrt(1 - slowest**2))
    steps = math.ceil(math.log(reduction) / math.log(rate)) if rate > 0 else 1
    for step in range(min(steps, _MOST_CHEBYSHEV_STEPS)):
        weights.append(1 / (1 - radius.square() * weights[-1] / (2 if step == 0 else 4)))
    # x <- w (K x + solved - c x) / (1 - c) + (1 - w) x_before
    table = torch.stack(
        [torch.stack([w / (1 - center), w * sigma / (1 - center), -w * center / (1 - center), 1 - w]) for w in weights]
    )
    (first, *_), *rest = table.to(solved.device, solved.dtype).unbind()
    before: Tensor | None = None
    t: Tensor = first * solved
    for of_solved, of_image, of_t, of_before in rest:
        image = outside(basis, end.apply(t))
        new = torch.addcmul(torch.addcmul(of_solved * solved, of_image, image), of_t, t)
        t, before = new if before is None else torch.addcmul(new, of_before, before), t
    return t


def _rotate(image: Tensor, vectors: Tensor, arithmetic: DeviceArithmetic) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triplets within orthonormal vectors (q, r), whose image under X (p, r) is given: left, s, right, X right."""
    Q, R = arithmetic.orthonormalise(image, condition=1e7)
    u, s, vh = torch.linalg.svd(R)
    return Q @ u, s, vectors @ vh.mT, image @ vh.mT
