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

The small end. The rounding of the large entries of G would disturb its small eigenvalues, or hide them: the largest
directions are taken out first, in float64. A clearly rectangular X has a spectrum that does not reach down to zero: the
shift is just below it.

Precision. Steps 2 and 3 alone decide the accuracy. Each correction multiplies the error by 1e-2 to 1e-4.

Cost. In float32 at the large end 4 p q for each of some 10 r products, or p q^2 and 2 q^2 for each where X is tall; at
the small end p q^2, q^3 / 3, and 2 q^2 for each of some 8 r products. In float64 2 p q for each vector
of step 2, and 4 p q r for each round of steps 2 and 3, of which there are two mostly. X in float32, or the Gram matrix.

Failure. `NotConverged` where float32 does not resolve the small end, or the corrections do not converge: no gap at the
cut, or one below the rounding of float32.

Sources: G. Sleijpen and H. van der Vorst (1996), https://doi.org/10.1137/S0036144599363084; Chebyshev's iteration:
Y. Saad (2003), Iterative Methods for Sparse Linear Systems, algorithm 12.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic
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
    largest_eigenpairs,
    outside,
    round_down,
    spectral_norm,
)
from milora_init.linalg.shift_invert import GRAM_NOISE, SHIFT, ends_above_zero

_PRODUCTS = 12  # vectors that G is applied to, for each wanted one
_MOST_STEPS = 12
_MOST_CORRECTIONS = 5
_BELOW_ZERO = 10  # times the noise: the shift where the spectrum reaches down to zero
_DEFLATED = 48  # large directions that are taken out
_FEW_DEFLATED = 24  # where the spectrum ends above zero: they cause most of the rounding error
_END_STEPS = 48  # of the Krylov space for the smallest eigenvalue


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
    """A = (G - shift I)^-1, to within `noise` as an eigenvalue of G, by block elimination; see `_shifted_inverse`.

    With Q (q, k) that has about the right vectors of the largest directions, L L^T = Q^T (G - shift I) Q,
    Z = L^-1 Q^T (G - shift I) (k, q), F = Q L^-T (q, k) and T = I - F Z,

        A = T S^-1 T^T + F F^T,    S = G - shift I - Z^T Z.

    S is the Schur complement, and `factor` is its factor. It has none of the large entries of G. F and Z are float64.
    """

    def __init__(
        self, factor: CholeskyFactor, eliminated: tuple[Tensor, Tensor], *, shift: float, noise: float, s_max: float
    ) -> None:
        self._factor, self._eliminated = factor, eliminated
        self._shift, self._noise, self._s_max = shift, noise, s_max
        # Where the spectrum reaches down to zero, a better start often saves a correction.
        self.search = _Search(block=32, angle=1e-3, beyond=72, ritz=8 if shift > 0 else 72, margin=0.25, reduction=1e-5)
        F, Z = eliminated
        self._rounded = F.to(torch.float32), Z.to(torch.float32)

    def apply(self, B: Tensor) -> Tensor:
        return self._times(B, self._rounded)

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return 1 / (theta - self._shift)

    def sigma(self, s: Tensor) -> Tensor:
        return s.square() - self._shift

    def precondition(self, R: Tensor) -> Tensor:
        # The float32 errors of a basis make its residual large along the large directions: these stay in float64.
        return self._times(R, self._eliminated)

    def _times(self, B: Tensor, eliminated: tuple[Tensor, Tensor]) -> Tensor:
        """A B (q, b) in the dtype of B, F and Z; the factor is applied in float32."""
        F, Z = eliminated
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
        return self._s_max


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
    """A with a shift just below the smallest eigenvalue of G, where the spectrum ends above zero, or just below zero.

    Raises:
        NotConverged: G is not positive definite in float32.
    """
    above_zero = ends_above_zero(X)
    rest = _without_largest(X, _FEW_DEFLATED if above_zero else _DEFLATED)
    noise, s_max = _noise(rest.S), spectral_norm(rest.R)
    shifts = [-_BELOW_ZERO * noise]
    if above_zero:
        smallest, largest = _ends(rest, X.arithmetic)
        s_max = max(s_max, math.sqrt(max(largest, 0.0)))
        shift = round_down(SHIFT * (smallest - noise))
        if shift > 4 * noise:
            shifts.insert(0, shift)
    for shift in shifts:
        if inverse := _shifted_inverse(rest, shift, X.arithmetic):
            return _SmallEnd(*inverse, shift=shift, noise=noise, s_max=s_max)
    raise NotConverged("the Gram matrix is not positive definite in float32")


@dataclass(frozen=True, slots=True)
class _Rest:
    """G without some of its largest directions: S = G - Z^T Z, with X Q = U R and Z = U^T X.

    Attributes:
        S: (q, q), given by its lower triangle.
        Q: (q, k), orthonormal: about the right vectors of the largest directions.
        R: (k, k), upper triangular.
        Z: (k, q).
    """

    S: Tensor
    Q: Tensor
    R: Tensor
    Z: Tensor

    @property
    def lift(self) -> float:
        """What S gets along Q, where it is zero: as large as its other eigenvalues."""
        return 4 / len(self.S) * float(self.S.diagonal().sum())


def _without_largest(X: BlockedMatrix, count: int) -> _Rest:
    """X^T X (q, q) without about `count` of its largest directions."""
    q, arithmetic = X.shape[1], X.arithmetic
    start = torch.randn(q, count, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(torch.float32)
    of_start = torch.zeros(count, q)  # transposed, as in `BlockedMatrix.transposed_times`
    for block in X.float32_blocks():
        of_start.addmm_((block @ start).mT, block)
    Q = arithmetic.normalise(of_start.mT).to(torch.float64)
    U, R = torch.linalg.qr(X.times(Q))
    Z = X.transposed_times(U).mT

    def blocks() -> Iterator[Tensor]:
        """X - U Z in blocks of rows."""
        top, of_rows, of_columns = 0, U.to(torch.float32), Z.to(torch.float32)
        for block in X.float32_blocks():
            yield block.addmm_(of_rows[top : top + len(block)], of_columns, alpha=-1)
            top += len(block)

    return _Rest(gram_of_blocks(blocks(), q, arithmetic), Q, R, Z)


def _shifted_inverse(
    rest: _Rest, shift: float, arithmetic: DeviceArithmetic
) -> tuple[CholeskyFactor, tuple[Tensor, Tensor]] | None:
    """The factor, F and Z of `_SmallEnd`; None if G - shift I is not positive definite.

    By block elimination of Q: with H = Q^T (G - shift I) Q and N = Q^T (G - shift I), the Schur complement is
    G - shift I - N^T H^-1 N. Its difference from S - shift I is of the size of the shift, and is computed without
    the large terms, which would be rounded.
    """
    Q, R, Z = rest.Q, rest.R, rest.Z
    identity = torch.eye(len(R), dtype=R.dtype)
    L, failed = torch.linalg.cholesky_ex(R.mT @ R - shift * identity)
    of_left, failed_left = torch.linalg.cholesky_ex(R @ R.mT - shift * identity)
    if int(failed) or int(failed_left):
        return None
    inverse = torch.cholesky_inverse(L)  # of H
    coupling = -shift * R @ inverse
    middle = torch.cat(
        [
            torch.cat([shift * torch.cholesky_inverse(of_left), coupling], dim=1),
            torch.cat([coupling.mT, shift**2 * inverse], dim=1),
        ]
    )
    both = torch.cat([Z, Q.mT])
    S = torch.addmm(rest.S, both.mT.to(torch.float32), (middle @ both).to(torch.float32), alpha=-1)
    S.addmm_((rest.lift * Q).to(torch.float32), Q.mT.to(torch.float32))
    S.diagonal().sub_(shift)
    factor = cholesky(S, arithmetic)
    if factor is None:
        return None
    N = R.mT @ Z - shift * Q.mT
    of_Q, of_N = (torch.linalg.solve_triangular(L, rows, upper=False) for rows in (Q.mT, N))
    return factor, (of_Q.mT, of_N)


def _ends(rest: _Rest, arithmetic: DeviceArithmetic) -> tuple[float, float]:
    """The smallest eigenvalue of S on the complement of Q, to a few percent, and the largest of S from below.

    From a Krylov space of S. The smallest Ritz value lies above its eigenvalue. At the end of a dense spectrum the
    distance falls as the square of the steps, so that of half the steps tells how much is left; elsewhere it falls
    faster.
    """
    Q, q = rest.Q.to(torch.float32), len(rest.S)
    S = rest.S.tril()
    S += S.tril(-1).mT
    S.addmm_(rest.lift * Q, Q.mT)
    start = torch.randn(q, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis = newest = arithmetic.orthonormalise(start.to(torch.float32))[0]
    images: list[Tensor] = []
    for _ in range(_END_STEPS):
        images.append(S @ newest)
        newest, _ = arithmetic.orthonormalise(outside(basis, outside(basis, images[-1])))
        basis = torch.cat([basis, newest], dim=1)
    basis = basis[:, :-1]
    projected, of_Q = basis.mT @ torch.cat(images, dim=1), Q.mT @ basis
    if not bool(projected.isfinite().all()):
        return 0.0, 0.0
    half = len(projected) // 2
    unlifted = torch.addmm(projected, of_Q.mT, of_Q, alpha=-rest.lift)
    of_half, of_all, plain = (torch.linalg.eigvalsh(T) for T in (projected[:half, :half], projected, unlifted))
    return float(of_all[0] - (of_half[0] - of_all[0]) / 3), float(plain[-1])


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
