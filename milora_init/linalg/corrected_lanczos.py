"""The r smallest or largest singular triplets of X on a CPU, sought in float32 and corrected in float64.

Why. Most of the work towards them does not need float64, and float32 is twice as fast. A GPU takes mixed_precision.py,
which makes fewer calls; this file multiplies fewer columns.

How. 1. Block Lanczos (lanczos.py) in float32 with an operator A whose largest eigenvalues are wanted: the wanted right
vectors and some beyond them, to three or four digits. For the largest triplets A is G = X^T X; for the smallest it is
(G - shift I)^-1, by a Cholesky factor. 2. Rayleigh-Ritz with them in float64, in X itself. 3. The residual of the
wanted triplets in float64, and from it the certificate. 4. While that is not accepted: a correction t of each wanted
vector v, with eigenvalue theta of G and residual R = G v - theta v, from

    (G - theta I) t = -R    on the complement of the wanted vectors,

in float32, to as many digits as the triplet needs: t is added to v. Back to steps 2 and 3, with the wanted vectors
alone.

The correction equation is that of the Jacobi-Davidson method, solved as (I - sigma A) t = b: with sigma = 1 / theta and
b = sigma R at the large end, with sigma = theta - shift and b = -A R at the small one. The vectors beyond the wanted
ones, where I - sigma A is nearly singular, are eliminated. What is left takes a few steps of Chebyshev's iteration:
zero for most triplets, and up to 12 for those next to the cut.

The shift. A clearly rectangular X has a spectrum that does not reach down to zero, and a shift just below it. Else the
rounding of the large entries of G would hide its small eigenvalues: the largest directions are deflated, in float64.

Precision. Steps 2 and 3 alone decide the accuracy. Each correction multiplies the error by 1e-2 to 1e-4.

Cost. In float32 at the large end 4 p q for each of some 10 r products, or p q^2 and 2 q^2 for each where X is tall; at
the small end p q^2, q^3 / 3 for each factor, and 2 q^2 for each of some 8 r products. In float64 2 p q for each vector
of step 2, and 4 p q r for each round of steps 2 and 3, of which there are two mostly. X in float32, or the Gram matrix.

Failure. `NotConverged` where float32 does not resolve the small end, or the corrections do not converge: no gap at the
cut, or one below the rounding of float32.

Sources: G. Sleijpen and H. van der Vorst (1996), https://doi.org/10.1137/S0036144599363084; Chebyshev's iteration:
Y. Saad (2003), Iterative Methods for Sparse Linear Systems, algorithm 12.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from milora_init.linalg.blocked_matrix import BlockedMatrix, Operator, gram_of_blocks
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
from milora_init.linalg.lanczos import (
    krylov_projection,
    largest_eigenpairs,
    largest_eigenvalues,
    outside,
    power_projection,
    round_down,
    spectral_norm,
)
from milora_init.linalg.shift_invert import DEFLATED, GRAM_NOISE, SHIFT, SHIFT_BLOCK, ends_above_zero

_PRODUCTS = 12  # vectors that G is applied to, for each wanted one
_MOST_STEPS = 12
_MOST_CORRECTIONS = 5
_BELOW_ZERO = 10  # times the noise: the shift where the spectrum reaches down to zero


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """How the vectors are sought, and how far they are corrected.

    Attributes:
        block: Columns of a block of the Krylov space.
        angle: The tolerated angle of its vectors.
        beyond: Vectors beyond the wanted ones: the more, the fewer steps a correction takes.
        ritz: How many of these take part in the first Rayleigh-Ritz step.
        margin: A correction aims at an error of a triplet that is this part of the tolerated one.
        reduction: Of the error by one correction at best, because A is rounded.
    """

    block: int
    angle: float
    beyond: int
    ritz: int
    margin: float
    reduction: float


class _End(Protocol):
    """One end of the spectrum of G = X^T X, by an operator A in float32 whose largest eigenvalues belong to it."""

    search: _Search

    def apply(self, B: Tensor) -> Tensor:
        """A B (q, b) for B (q, b) in float32."""

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        """The eigenvalues of A (k,) that belong to eigenvalues of G."""

    def sigma(self, s: Tensor) -> Tensor:
        """sigma (k,) of the correction equation, for singular values (k,)."""

    def precondition(self, R: Tensor) -> Tensor | None:
        """A R (q, k) in float64, for R (q, k) in float64; None at the large end, which has no use for it."""

    def nearest(self, s: float, residual_norm: float, weight: float) -> float:
        """The first unwanted singular value, from its Ritz value s.

        Args:
            s: The Ritz value.
            residual_norm: Of b = X^T u - s v.
            weight: b^T A b.
        """

    def excess(self, nearest: float) -> float:
        """The most by which b^T G^-1 b may exceed b^T A b, as a factor. Raises NotConverged."""

    def s_max(self, s: Tensor) -> float:
        """The largest singular value of X, or an estimate of it; s (k,) are the wanted ones."""


class _LargeEnd:
    """A = G."""

    search = _Search(block=32, angle=3e-4, beyond=48, ritz=48, margin=0.5, reduction=1e-4)

    def __init__(self, X: BlockedMatrix, r: int) -> None:
        self.apply = X.float32_gram_operator(_PRODUCTS * r)

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return theta

    def sigma(self, s: Tensor) -> Tensor:
        return 1 / s.square()

    def precondition(self, R: Tensor) -> None:  # noqa: ARG002  the protocol's
        return None

    def nearest(self, s: float, residual_norm: float, weight: float) -> float:  # noqa: ARG002  the protocol's
        return math.sqrt(s * s + s * residual_norm)  # it lies below its eigenvalue, by its residual at most

    def excess(self, nearest: float) -> float:  # noqa: ARG002  the protocol's
        return 1.0

    def s_max(self, s: Tensor) -> float:
        return float(s[0])


class _SmallEnd:
    """A = (G - shift I)^-1, to within `noise` as an eigenvalue of G; see `_shifted` and `_deflated`.

    With `deflated`, F (q, k) and Z (k, q) in float64 such that X F = U is orthonormal and Z = U^T X, and T = I - F Z,

        A = T S^-1 T^T + F F^T,    S = X^T (I - U U^T) X - shift I.

    S is the Schur complement, and `factor` is its factor. It has none of the large entries of G.
    """

    def __init__(
        self,
        factor: CholeskyFactor,
        shift: float,
        noise: float,
        largest: float,
        deflated: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._factor, self._shift, self._noise, self._largest = factor, shift, noise, largest
        self._deflated = deflated
        # After a deflation fewer steps are needed, and a better start often saves a correction.
        block, ritz = (48, 8) if deflated is None else (32, 72)
        self.search = _Search(block=block, angle=1e-3, beyond=72, ritz=ritz, margin=0.25, reduction=1e-5)
        self._rounded = None if deflated is None else (deflated[0].float(), deflated[1].float())

    def apply(self, B: Tensor) -> Tensor:
        return self._times(B, self._rounded)

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return 1 / (theta - self._shift)

    def sigma(self, s: Tensor) -> Tensor:
        return s.square() - self._shift

    def precondition(self, R: Tensor) -> Tensor:
        # The float32 errors of a basis make its residual large along the large directions: these stay in float64.
        return self._times(R, self._deflated)

    def _times(self, B: Tensor, deflated: tuple[Tensor, Tensor] | None) -> Tensor:
        """A B (q, b) in the dtype of B, F and Z; the factor is applied in float32."""
        if deflated is None:
            return self._factor.solve(B.to(torch.float32)).to(B.dtype)
        F, Z = deflated
        c = F.mT @ B
        Y = self._factor.solve(torch.addmm(B, Z.mT, c, alpha=-1).to(torch.float32)).to(B.dtype)
        return Y.addmm_(F, c - Z @ Y)

    def nearest(self, s: float, residual_norm: float, weight: float) -> float:  # noqa: ARG002  the protocol's
        return s * math.sqrt(max(1 - 2 * weight, 0.0))  # it lies above its eigenvalue, by about s^2 weight

    def excess(self, nearest: float) -> float:
        above = self._noise - self._shift
        if not above <= 0.5 * nearest * nearest:
            raise NotConverged("float32 does not resolve the wanted end")
        return 1 + max(0.0, above / (nearest * nearest))

    def s_max(self, s: Tensor) -> float:  # noqa: ARG002  the protocol's
        return self._largest


def corrected_triplets(
    X: BlockedMatrix, r: int, tolerance: float, *, largest: bool = False
) -> tuple[Solution, Certificate]:
    """The r smallest or largest triplets of X (p, q), with a certified component error of at most `tolerance`.

    Raises:
        NotConverged: float32 does not resolve them, or the corrections do not converge.
    """
    q, arithmetic = X.shape[1], X.arithmetic
    end: _End = _LargeEnd(X, r) if largest else _small_end(X)
    search = end.search
    block = min(search.block, q // 96 * 8)  # a Krylov space needs a dozen steps at its disposal
    pairs = largest_eigenpairs(
        end.apply,
        q,
        r,
        extra=search.beyond,
        block=block,
        max_basis=min(q - 2 * block, 16 * r + 768),
        tolerance=search.angle,
        arithmetic=arithmetic,
        device=X.stored.device,
        dtype=torch.float32,
    )
    kept = r + search.ritz
    theta, vectors, image = _ritz_pairs(X, pairs.vectors[:, :kept], largest=largest)
    if not spectral_norm(pairs.probe.to(torch.float64)) < float(end.eigenvalue_of(theta)[r - 1]):
        raise NotConverged("an independent block found what the Krylov space had missed")
    # From here on the triplets are in the order of A's eigenvalues, the first unwanted one last.
    right, image = vectors[:, : r + 1], image[:, : r + 1]
    if largest:
        left, s, right, image = rotated(image, right)
    else:  # they are orthogonal enough for a first correction
        s = theta[: r + 1].clamp_min(1e-300).sqrt()
        left = image / s
    beyond: _Beyond | None = None
    nearest, excess, previous = s[:0], 1.0, math.inf
    for corrections in range(_MOST_CORRECTIONS + 1):
        residual = residual_of(X, left, s, right)
        beside = outside(right, residual)
        solved = end.precondition(beside)
        weights = None if solved is None else (beside * solved).sum(dim=0).clamp_min(0)
        if corrections == 0:
            weight = 0.0 if weights is None else float(weights[r])
            first = end.nearest(float(s[r]), float(residual[:, r].norm()), weight)
            nearest, excess = torch.full_like(s[:r], first), end.excess(first)
            left, s, right, image, residual = (x[..., :r] for x in (left, s, right, image, residual))
            solved, weights = (None if x is None else x[..., :r] for x in (solved, weights))
        solution = Solution(
            left,
            s,
            right,
            image,
            end.s_max(s),
            path="mixed",
            reason=f"r = {r} of q = {q}, {pairs.steps} float32 steps of {block}, {corrections} corrections",
            complete="an independent block found nothing beyond the cut",
        )
        gaps = Gaps(nearest, (s - nearest).abs())
        certificate, errors = measure(solution, gaps, residual, None if weights is None else excess * weights)
        descending = solution if largest else _flipped(solution)
        if is_accepted(descending, certificate, tolerance):
            return descending, certificate
        error = math.inf if certificate.component_error is None else certificate.component_error
        if corrections == _MOST_CORRECTIONS or not error < 0.5 * previous:
            break
        previous = error
        if beyond is None:
            E = torch.cat([vectors[:, r:], pairs.vectors[:, kept:]], dim=1)
            beyond = _Beyond.of(end.apply, right, E)
        side, divisor = (residual, s) if solved is None else (outside(right, solved).neg_(), 1 / s)
        to_correct = _Equations(right, end.sigma(s), side, divisor, errors * (math.sqrt(r) / tolerance), search)
        t = _corrections(end.apply, beyond, to_correct)
        right, _ = arithmetic.orthonormalise(right + t, condition=10)
        left, s, right, image = rotated(X.times(right), right)
        if not largest:
            left, s, right, image = left.flip(1), s.flip(0), right.flip(1), image.flip(1)
    raise NotConverged(f"corrections in float64 left an error of {error:.1e}")


def _small_end(X: BlockedMatrix) -> _SmallEnd:
    """Raises NotConverged."""
    return _shifted(X) if ends_above_zero(X) else _deflated(X)


def _shifted(X: BlockedMatrix) -> _SmallEnd:
    """With a shift just below the smallest eigenvalue of G. Raises NotConverged."""
    (_, q), arithmetic, device = X.shape, X.arithmetic, X.stored.device
    G = X.float32_gram()
    noise = _noise(G)
    unshifted = G.clone()
    unshifted.diagonal().add_(noise)
    factor, shift = _factor(unshifted, X), -noise
    of_inverse = krylov_projection(factor.solve, q, block=SHIFT_BLOCK, arithmetic=arithmetic, device=device)
    of_matrix = power_projection(factor.times, q, arithmetic=arithmetic, device=device, dtype=torch.float32)
    inverse, largest = map(float, largest_eigenvalues(of_inverse, of_matrix))
    above_noise = round_down(SHIFT * (1 / inverse - noise)) if inverse > 0 else 0.0
    if above_noise > 4 * noise:
        G.diagonal().sub_(above_noise)
        if nearer := cholesky(G, arithmetic):
            factor, shift = nearer, above_noise
    return _SmallEnd(factor, shift, noise, math.sqrt(max(largest, 0.0)))


def _deflated(X: BlockedMatrix) -> _SmallEnd:
    """With a shift just below zero, and about k of the largest directions taken out of G. Raises NotConverged.

    Along them S is zero; a multiple of Q Q^T, for Q with about their right vectors, makes it definite there, and T of
    `_SmallEnd` takes that out again.
    """
    q, arithmetic = X.shape[1], X.arithmetic
    start = torch.randn(q, DEFLATED, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    blocks = list(X.float32_blocks())  # of rows; it is read three times
    V = start.to(torch.float32)
    of_start = torch.zeros(q, DEFLATED)
    for block in blocks:
        of_start.addmm_(block.mT, block @ V)
    Q = arithmetic.normalise(of_start)
    U, R = torch.linalg.qr(X.times(Q.to(torch.float64)))
    F = torch.linalg.solve_triangular(R, Q.to(torch.float64), upper=True, left=False)
    Z = X.transposed_times(U).mT
    if not bool(F.isfinite().all()):
        raise NotConverged("the weight has too few directions to deflate")
    top, of_rows, of_columns = 0, U.to(torch.float32), Z.to(torch.float32)
    for block in blocks:
        block.addmm_(of_rows[top : top + len(block)], of_columns, alpha=-1)
        top += len(block)
    S = gram_of_blocks(blocks, q, arithmetic)
    del blocks
    noise = _noise(S)
    S.addmm_(Q * (4 / q * float(S.diagonal().sum())), Q.mT)
    S.diagonal().add_(_BELOW_ZERO * noise)
    return _SmallEnd(_factor(S, X), -_BELOW_ZERO * noise, noise, spectral_norm(R), (F, Z))


def _factor(G: Tensor, X: BlockedMatrix) -> CholeskyFactor:
    """The Cholesky factor of G (q, q), which is overwritten. Raises NotConverged."""
    factor = cholesky(G, X.arithmetic)
    if factor is None:
        raise NotConverged("the Gram matrix is not positive definite in float32")
    return factor


def _noise(G: Tensor) -> float:
    """The rounding error of an eigenvalue of a Gram matrix (q, q) in float32, given by its lower triangle."""
    return GRAM_NOISE * float(torch.linalg.matrix_norm(G.tril()))


def _flipped(solution: Solution) -> Solution:
    """The triplets in the opposite order."""
    left, right, image = (x.flip(1) for x in (solution.left, solution.right, solution.image))
    return replace(solution, left=left, s=solution.s.flip(0), right=right, image=image)


def _ritz_pairs(X: BlockedMatrix, V: Tensor, *, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The Ritz values of X^T X (k,), its Ritz vectors (q, k) and their images under X (p, k), for V (q, k).

    Descending for the largest, else ascending.

    Raises:
        NotConverged: They are not finite.
    """
    image = X.times(V)
    projected = image.mT @ image
    if not bool(projected.isfinite().all()):
        raise NotConverged("the basis broke down in float64")
    theta, Y = torch.linalg.eigh(projected)
    if largest:
        theta, Y = theta.flip(0), Y.flip(1)
    return theta, V @ Y, image @ Y


def rotated(image: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triplets within orthonormal vectors (q, k), whose image under X (p, k) is given: left, s, right, X right."""
    Q, R = torch.linalg.qr(image)
    u, s, vh = torch.linalg.svd(R)
    return Q @ u, s, vectors @ vh.mT, image @ vh.mT


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
    def of(cls, apply: Operator, wanted: Tensor, vectors: Tensor) -> _Beyond:
        """For the wanted vectors (q, r), and vectors beyond them (q, e) that span about the next eigenvectors."""
        V, E = wanted.to(torch.float32), outside(wanted, vectors).to(torch.float32)
        image = outside(V, apply(E))
        values, Y = torch.linalg.eigh((E.mT @ image).to(torch.float64))
        values, Y = values.flip(0), Y.flip(1).to(torch.float32)
        E, image = E @ Y, image @ Y
        # The last ones are too rough to count as eigenvectors.
        return cls(E, values, outside(E, image), float(values[3 * len(values) // 4]))


@dataclass(frozen=True, slots=True)
class _Equations:
    """(I - sigma A) t = b for each wanted vector, on the complement of all of them.

    Attributes:
        right: The wanted vectors (q, r).
        sigma: (r,), ascending.
        side: (q, r), b times the divisor.
        divisor: (r,).
        excess: (r,), by how much the error of each triplet is too large.
        search: Has the error to aim at.
    """

    right: Tensor
    sigma: Tensor
    side: Tensor
    divisor: Tensor
    excess: Tensor
    search: _Search


def _corrections(apply: Operator, beyond: _Beyond, wanted: _Equations) -> Tensor:
    """t (q, r) in float64, about, with A in float32 and the vectors beyond the wanted ones."""
    V, sigma = wanted.right.to(torch.float32), wanted.sigma
    E = outside(V, beyond.E)
    size = wanted.side.norm(dim=0).clamp_min(1e-300)
    b = outside(V, (wanted.side / size).to(torch.float32))
    # In the span of E: (I - sigma diag(values)) c = E^T b + sigma rest^T t.
    coarse = 1 / (1 - beyond.values.unsqueeze(1) * sigma)
    coarse, coupling = coarse.to(torch.float32), (coarse * sigma).to(torch.float32)
    of_b = E.mT @ b
    fine = torch.addmm(b, E, of_b, alpha=-1).addmm_(beyond.rest, coupling * of_b)
    reduction = (wanted.search.margin / wanted.excess).clamp(wanted.search.reduction, 1.0)
    t = _chebyshev(apply, torch.cat([V, E], dim=1), fine, sigma, beyond.reach, reduction)
    t = t.addmm_(E, (coarse * of_b).addcmul_(coupling, beyond.rest.mT @ t))
    scaled: Tensor = t.to(torch.float64) * (size / wanted.divisor)
    return scaled


def _chebyshev(apply: Operator, basis: Tensor, b: Tensor, sigma: Tensor, reach: float, reduction: Tensor) -> Tensor:
    """t (q, r) with (I - K) t = b, for K = sigma P A P, by Chebyshev's iteration in each column; b is overwritten.

    P projects on the complement of the basis (q, k); b (q, r) lies there. The eigenvalues of K lie between 0 and
    sigma * reach. sigma (r,), ascending, and the reduction of the error (r,) decide how many steps a column gets; the
    last ones get most.
    """
    half = (sigma * reach).clamp(1e-6, 0.99) / 2  # of the interval of eigenvalues of I - K, around 1 - half
    ratio = (1 - half) / half
    rate = ratio - (ratio.square() - 1).sqrt()
    steps = (reduction.log() / rate.log()).ceil().clamp(0, _MOST_STEPS)
    rho = 1 / ratio
    residual, change = b, b / (1 - half).to(b.dtype)
    t: Tensor = change.clone()
    for step in range(1, int(steps.max()) + 1):
        rho, before = 1 / (2 * ratio - rho), rho
        of_change, of_residual, of_image = torch.stack([rho * before, 2 * rho / half, sigma]).to(b.dtype)
        active = slice(int((steps >= step).nonzero()[0]), None)
        r, d = residual[:, active], change[:, active]
        r.sub_(d).addcmul_(of_image[active], outside(basis, apply(d)))
        d.mul_(of_change[active]).addcmul_(of_residual[active], r)
        t[:, active].add_(d)
    return t
