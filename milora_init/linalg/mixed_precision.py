"""The r smallest or largest singular triplets of X, sought in float32 and corrected in float64.

Why. What is wanted needs float64 accuracy, but most of the work towards it does not. float32 is twice as fast as
float64 on a CPU, and 32 or 64 times on most GPUs. The products of bfloat16 numbers are exact in it.

How. 1. An operator A in float32 whose largest eigenvalues are wanted. For the largest triplets it is the Gram matrix
G = X^T X. For the smallest it is M^-1, with M = G - shift I, from G and a Cholesky factor. 2. Block Lanczos
(lanczos.py) or a filtered subspace (filtered_subspace.py) with A: the wanted right vectors, and some beyond them, to
three or four digits. 3. Rayleigh-Ritz with them in float64, in X itself. 4. The residual of the wanted triplets in
float64, and from it the certificate. 5. While that is not accepted: a correction t of each wanted vector v, with
eigenvalue theta and residual R = G v - theta v, from

    (G - theta I) t = -R    on the complement of the wanted vectors,

in float32, to as many digits as the triplet needs: t is added to v. Back to steps 3 and 4, with the wanted vectors
alone.

The correction equation is solved as (I - sigma A) t = b, where 1 / sigma is the eigenvalue of A that belongs to theta.
The vectors beyond the wanted ones, where I - sigma A is nearly singular, are eliminated exactly; what is left takes
Chebyshev's iteration a few steps.

Precision. Steps 3 and 4 alone decide the accuracy. Each correction multiplies the error by the relative error of A on
the complement, 1e-2 to 1e-4.

Cost. For the smallest p q^2 and q^3 / 3 operations in float32, for the largest 4 p q for each product. In float64
2 p q for each vector of step 2, and 4 p q r for each round of steps 3 and 4, of which there are two mostly.

Failure. `NotConverged` where float32 does not resolve the wanted end: the first unwanted eigenvalue of G must be well
above eps * ||G||. That shows in the corrections, too, which then do not converge. The certificate (certificate.py) is
in float64, from X.

Sources: the correction equation: G. Sleijpen and H. van der Vorst (1996), https://doi.org/10.1137/S0036144599363084.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic
from milora_init.linalg.blocked_matrix import BlockedMatrix, Operator, gram_of_blocks, times_and_back
from milora_init.linalg.certificate import (
    Certificate,
    Gaps,
    NotConverged,
    Solution,
    is_accepted,
    measure,
    residual_of,
)
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

EPS32 = torch.finfo(torch.float32).eps
_EXTRA = 48  # vectors beyond the wanted ones: the more, the better conditioned is the correction equation
_ANGLE = 3e-4  # of the float32 vectors, about as accurate as float32 leaves them
_PRODUCTS = 12  # vectors that A is applied to, for each wanted one
_NOISE = 0.1  # of eps * ||G||: four times and more what was measured on the eigenvectors of the smallest eigenvalues
_DEFLATED = 48  # large directions that are taken out of X before its Gram matrix is rounded
_BELOW_ZERO = 100  # times the noise: the shift where the spectrum reaches down to zero
_SHIFT_BLOCK = 48
_SHIFT = 0.95  # of the smallest eigenvalue
_MOST_CHEBYSHEV_STEPS = 12
_BEST_REDUCTION = 1e-4  # of the error by one correction: the rounding of A leaves about as much
_MOST_CORRECTIONS = 5
_MARGIN = 0.5  # of the tolerated error of a triplet: what its correction aims at


Number = TypeVar("Number", float, Tensor)


class _End(Protocol):
    """One end of the spectrum of G, by an operator A (q, q) in float32 whose largest eigenvalues belong to it."""

    @property
    def s_max(self) -> float | None:
        """An estimate of the largest singular value of X from below; None where it is among the wanted ones."""

    def apply(self, B: Tensor) -> Tensor:
        """A B (q, b) for B (q, b)."""

    def right_side(self, R: Tensor, theta: Tensor) -> Tensor:
        """b (q, b) in the correction equation (I - sigma A) t = b, for residuals R (q, b) and eigenvalues theta (b,)."""

    def weights(self, b: Tensor, R: Tensor, nearest: Tensor) -> Tensor | None:
        """R^T (X^T X - shift I)^-1 R (b,), rather too large than too small; None if not known.

        b is right_side(R), in float32 as R (q, b); `nearest` (1,) is the first unwanted eigenvalue of G.
        """

    def resolves(self, nearest: float) -> bool:
        """Whether float32 resolves the wanted end, if `nearest` is the first unwanted eigenvalue of G."""


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

    def right_side(self, R: Tensor, theta: Tensor) -> Tensor:  # noqa: ARG002  the protocol's
        return self.apply(R).neg_()

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return 1 / (theta - self.shift)

    def nearest_unwanted(self, theta: Tensor, R: Tensor) -> Tensor:
        # An unwanted Ritz value lies above its eigenvalue, by about R^T M^-1 R.
        size = R.norm(dim=0)
        unit = (R / size.clamp_min(1e-300)).to(torch.float32)
        return theta - 2 * size.square() * (unit * self.apply(unit)).sum(dim=0)

    def weights(self, b: Tensor, R: Tensor, nearest: Tensor) -> Tensor | None:
        # An eigenvalue of M that is at least `nearest` exceeds that of G by at most this factor.
        excess = 1 + (max(0.0, self.noise - self.shift) / nearest).to(torch.float32)
        return (R * b).sum(dim=0).mul_(-excess)

    def resolves(self, nearest: float) -> bool:
        return self.noise - self.shift <= 0.5 * nearest


@dataclass(frozen=True, slots=True)
class _LargeEnd:
    """A = G in float32."""

    apply: Operator
    s_max: float | None = None

    def right_side(self, R: Tensor, theta: Tensor) -> Tensor:
        return R / theta

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return theta

    def nearest_unwanted(self, theta: Tensor, R: Tensor) -> Tensor:
        # An unwanted Ritz value lies below its eigenvalue, by its residual at most.
        return theta + R.norm(dim=0)

    def weights(self, b: Tensor, R: Tensor, nearest: Tensor) -> Tensor | None:  # noqa: ARG002  the protocol's
        return None

    def resolves(self, nearest: float) -> bool:
        return nearest > 0


def extreme_triplets(
    X: BlockedMatrix, r: int, tolerance: float, *, largest: bool = False
) -> tuple[Solution, Certificate]:
    """The r smallest or largest triplets of X (p, q), with a certified component error of at most `tolerance`.

    Raises:
        NotConverged: float32 does not resolve them, or the corrections do not converge.
    """
    end: _End = _LargeEnd(X.float32_gram_operator(_PRODUCTS * r)) if largest else _small_end(X)
    pairs, how = first_space(end, X, r)
    vectors, image, theta = _ritz_vectors(end, X, pairs, r, largest=largest)
    # s descends: the first unwanted triplet is the first or the last one of r + 1.
    wanted, following = (slice(r), slice(r, None)) if largest else (slice(1, None), slice(1))
    s_max = math.sqrt(max(float(theta[0]), 0.0)) if end.s_max is None else end.s_max
    of_wanted = theta[:r] if largest else theta[:r].flip(0)
    beyond: _Beyond | None = None
    left, s, right, image = _rotate(image, vectors[:, : r + 1], X.arithmetic)
    previous = math.inf
    for corrections in range(_MOST_CORRECTIONS + 1):
        residual = residual_of(X, left, s, right)
        if corrections == 0:
            nearest = end.nearest_unwanted(s[following].square(), residual[:, following] * s[following])
            nearest_s = nearest.clamp_min(0).sqrt().expand(r)
            left, s, right, image, residual = (x[..., wanted] for x in (left, s, right, image, residual))
        size = residual.norm(dim=0).clamp_min(1e-300)
        direction = outside(right, residual / size).to(torch.float32)
        b = end.right_side(direction, s.square().to(torch.float32))
        weights = end.weights(b, direction, nearest)
        solution = Solution(
            left,
            s,
            right,
            image,
            s_max,
            path="mixed",
            reason=f"r = {r} of q = {X.shape[1]}, {how}, {corrections} corrections",
            complete="an independent block found nothing beyond the cut",
        )
        gaps = Gaps(nearest_s, (s - nearest_s).abs())
        certificate, errors = measure(solution, gaps, residual, None if weights is None else weights * size.square())
        if not end.resolves(errors.nearest**2):
            raise NotConverged("float32 does not resolve the wanted end")
        if is_accepted(solution, certificate, tolerance):
            return solution, certificate
        error = math.inf if certificate.component_error is None else certificate.component_error
        if corrections == _MOST_CORRECTIONS or not error < 0.5 * previous:
            break  # the corrections do not converge
        previous = error
        if beyond is None:
            beyond = _Beyond.of(end, right, vectors[:, r:], theta[r:])
        excess = errors.parts * (math.sqrt(r) / tolerance)
        t = _corrections(end, beyond, right, b, 1 / end.eigenvalue_of(of_wanted), excess, largest=largest)
        right, _ = X.arithmetic.orthonormalise(torch.addcmul(right, t, size * s), condition=10)
        left, s, right, image = _rotate(X.times(right), right, X.arithmetic)
    raise NotConverged(f"corrections in float64 left an error of {error:.1e}")


def _ritz_vectors(
    end: _End, X: BlockedMatrix, pairs: RitzPairs, r: int, *, largest: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz in float64 with the vectors of `pairs` (q, k).

    Returns:
        The Ritz vectors (q, k), from the wanted end of the spectrum; the images under X of r + 1 of them (p, r + 1);
        the Ritz values of G (k,), on the CPU.

    Raises:
        NotConverged: They are not finite, or the probe shows that a wanted vector was missed.
    """
    image = X.times(pairs.vectors)
    projected = image.mT @ image
    k = projected.shape[0]
    on_host = torch.cat([projected.flatten(), pairs.probe.to(torch.float64).flatten()]).cpu()
    if not bool(on_host.isfinite().all()):
        raise NotConverged("the basis broke down in float64")
    theta, Y = torch.linalg.eigh(on_host[: k * k].view(k, k))
    if largest:
        theta, Y = theta.flip(0), Y.flip(1)
    if not spectral_norm(on_host[k * k :].view(pairs.probe.shape)) < float(end.eigenvalue_of(theta[r - 1])):
        raise NotConverged("an independent block found what the subspace had missed")
    Y = Y.to(image.device)
    return pairs.vectors @ Y, image @ Y[:, : r + 1], theta


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
    of_inverse = krylov_projection(factor.solve, q, block=_SHIFT_BLOCK, arithmetic=arithmetic, device=device)
    of_matrix = power_projection(factor.times, q, arithmetic, device, torch.float32)
    inverse, largest, norm_on_host = largest_eigenvalues(of_inverse, of_matrix, norm.view(1, 1))
    if not (math.isfinite(inverse) and math.isfinite(largest)):
        raise NotConverged("the Gram matrix is not positive definite in float32")
    noise = _noise(norm_on_host)
    s_max = math.sqrt(max(largest, 0.0))
    shift = round_down(_SHIFT * (1 / inverse - noise)) if inverse > 0 else 0.0
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
    V = start.to(X.stored.device, torch.float32)
    Q = arithmetic.normalise(times_and_back((block for _, block in X.float32_blocks()), V))
    U, R = arithmetic.orthonormalise(torch.cat([block @ Q for _, block in X.float32_blocks()]), condition=1e4)
    F = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
    Z = torch.zeros(U.shape[1], q, dtype=U.dtype, device=U.device)
    for rows, block in X.float32_blocks():
        Z.addmm_(U[rows].mT, block)
    S = gram_of_blocks((block.addmm_(U[rows], Z, alpha=-1) for rows, block in X.float32_blocks()), q, arithmetic)
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


def _noise(norm: Number) -> Number:
    """The rounding error of an eigenvalue of a float32 Gram matrix whose lower triangle has this Frobenius norm."""
    return norm * (_NOISE * EPS32 * math.sqrt(2))


def _positive_definite(factor: CholeskyFactor | None) -> CholeskyFactor:
    if factor is None:
        raise NotConverged("the Gram matrix is not positive definite in float32")
    return factor


@dataclass(frozen=True, slots=True)
class _Beyond:
    """The vectors beyond the wanted ones, in float32: E (q, e) with A E = E diag(values) + rest.

    `rest` (q, e) is orthogonal to E and the wanted vectors; `reach` is the largest eigenvalue of A outside both.
    """

    E: Tensor
    values: Tensor
    rest: Tensor
    reach: float

    @classmethod
    def of(cls, end: _End, wanted: Tensor, vectors: Tensor, theta: Tensor) -> _Beyond:
        """For the wanted vectors (q, r), Ritz vectors beyond them (q, e), and their Ritz values of G (e,)."""
        V, E = wanted.to(torch.float32), vectors.to(torch.float32)
        values = end.eigenvalue_of(theta)
        # The last ones are too rough to count as eigenvectors.
        return cls(E, values, outside(E, outside(V, end.apply(E))), float(values[3 * len(values) // 4]))


def _corrections(  # noqa: PLR0913  the parameters of the equation
    end: _End, beyond: _Beyond, right: Tensor, b: Tensor, sigma: Tensor, excess: Tensor, *, largest: bool
) -> Tensor:
    """t (q, r) with (I - sigma A) t = b on the complement of the wanted vectors.

    Args:
        end: Has the operator A.
        beyond: The vectors beyond the wanted ones.
        right: The wanted vectors (q, r).
        b: (q, r) in float32.
        sigma: (r,) on the CPU.
        excess: (r,) on the CPU, by how much the error of each triplet is too large.
        largest: Which end.
    """
    V = right.to(torch.float32)
    E = outside(V, beyond.E)
    b = outside(V, b)
    # In the span of E: (I - sigma diag(values)) c = E^T b + sigma rest^T t.
    coarse = 1 / (1 - beyond.values.unsqueeze(1) * sigma)
    coarse, coupling = torch.stack([coarse, coarse * sigma]).to(b.device, torch.float32)
    of_b = E.mT @ b
    fine = torch.addmm(b, E, of_b, alpha=-1).addmm_(beyond.rest, coupling * of_b)
    t = _chebyshev(end, torch.cat([V, E], dim=1), fine, sigma, beyond.reach, excess, largest=largest)
    return torch.addmm(t, E, (coarse * of_b).addcmul_(coupling, beyond.rest.mT @ t))


def _chebyshev(  # noqa: PLR0913  the parameters of the iteration
    end: _End, basis: Tensor, b: Tensor, sigma: Tensor, reach: float, excess: Tensor, *, largest: bool
) -> Tensor:
    """t (q, r) with (I - K) t = b, for K = sigma P A P, by Chebyshev's iteration in each column; b is overwritten.

    P projects on the complement of the basis (q, k); b (q, r) lies there. The eigenvalues of K lie between 0 and sigma *
    reach. sigma (r,) and excess (r,), on the CPU, decide how many steps a column gets: most for those next to the
    unwanted eigenvalues, the last ones of the largest triplets and the first ones of the smallest.

    Source: Y. Saad (2003), Iterative Methods for Sparse Linear Systems, algorithm 12.1.
    """
    half = (sigma * reach).clamp(1e-6, 0.99) / 2  # of the interval of eigenvalues of I - K, around 1 - half
    ratio = (1 - half) / half
    rate = ratio - (ratio.square() - 1).sqrt()
    reduction = (_MARGIN / excess).clamp(_BEST_REDUCTION, 1.0)
    steps = (torch.log(reduction) / torch.log(rate)).ceil().clamp(0, _MOST_CHEBYSHEV_STEPS)
    rho, table = 1 / ratio, [torch.stack([sigma, 1 / (1 - half)])]
    for _ in range(int(steps.max())):
        rho, before = 1 / (2 * ratio - rho), rho
        table.append(torch.stack([rho * before, 2 * rho / half]))
    (of_image, first), *factors = torch.stack(table).to(b.device, b.dtype)
    residual, change = b, first * b
    t = change.clone()
    for step, (of_change, of_residual) in enumerate(factors, start=1):
        going_on = (steps >= step).nonzero().flatten()
        active = slice(int(going_on[0]), None) if largest else slice(int(going_on[-1]) + 1)
        r, d = residual[:, active], change[:, active]
        r.sub_(d).addcmul_(of_image[active], outside(basis, end.apply(d)))
        d.mul_(of_change[active]).addcmul_(of_residual[active], r)
        t[:, active].add_(d)
    return t


def _rotate(image: Tensor, vectors: Tensor, arithmetic: DeviceArithmetic) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triplets within orthonormal vectors (q, r), whose image under X (p, r) is given: left, s, right, X right."""
    Q, R = arithmetic.orthonormalise(image, condition=1e7)
    u, s, vh = torch.linalg.svd(R)
    return Q @ u, s, vectors @ vh.mT, image @ vh.mT
