"""The r smallest or largest singular triplets of X, sought in float32 and corrected in float64; of a batch at once.

Why. What is wanted needs float64 accuracy, but most of the work towards it does not. float32 is 32 or 64 times as fast
as float64 on most GPUs. The products of bfloat16 numbers are exact in it. A small weight keeps no GPU busy: each call
takes longer to start than to compute. So the calls here work on a batch of equal weights, of which there may be one.

How. 1. An operator A in float32 whose largest eigenvalues are wanted. For the largest triplets it is the Gram matrix
G = X^T X, applied as X^T (X v). For the smallest it is M^-1, with M = G - shift I, from G and a Cholesky factor.
2. A filtered subspace (filtered_subspace.py) of A: the wanted right vectors to three digits, and some beyond them.
3. Rayleigh-Ritz with these vectors in float64, from X V and X^T X V. 4. While the error estimate is too large: a
correction t of each wanted vector v, with Ritz value theta and residual R = G v - theta v, from

    (G - theta I) t = -R    on the complement of the basis,

the correction equation of the Jacobi-Davidson method. With P A P for the operator on that complement it is
(I - sigma P A P) t = -P A R with sigma = theta - shift at the small end, (I - sigma P A P) t = sigma R with
sigma = 1 / theta at the large one. It is solved to a few digits, in float32, by a Chebyshev series of
1 / (1 - sigma x). The corrections join the basis: back to step 3.

Precision. Step 3 alone decides the accuracy. Each correction multiplies the error by 1e-2 to 1e-4. P A P is computed
before it is applied: a product with A would leave rounding errors of the size of its wanted, largest eigenvalues.

Cost. For the smallest p q^2 and q^3 / 3 operations in float32, for the largest 4 p q for each product; in float64
4 p q for each column of the basis, of which there are r to 4 r.

A batch. All weights get as many products and Chebyshev steps as the one that needs most; each is certified when it is
ready. One that fails does not end the others. What is not finite stays within its own weight.

Failure. `NotConverged` where float32 does not resolve the wanted end: the first unwanted eigenvalue of G must be well
above eps * ||G||. That shows in the corrections, too, which then do not converge. The certificate (certificate.py) is
in float64, from X.

Sources: the correction equation: G. Sleijpen and H. van der Vorst (1996), https://doi.org/10.1137/S0036144599363084;
the series: J. Mason and D. Handscomb (2002), Chebyshev Polynomials, section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import add_product, plus_product, read_together
from milora_init.linalg.blocked_matrix import BlockedMatrix, gram_of_blocks
from milora_init.linalg.certificate import (
    Certificate,
    NotConverged,
    Solution,
    is_accepted,
    judge,
    measured_errors,
    residual_of,
)
from milora_init.linalg.filtered_subspace import filtered_space
from milora_init.linalg.lanczos import (
    krylov_projection,
    largest_eigenvalues,
    outside,
    power_projection,
    round_down,
)
from milora_init.linalg.shift_invert import GRAM_NOISE, SHIFT, SHIFT_BLOCK, ends_above_zero

_BELOW_ZERO = 100  # times the noise: the shift where the spectrum reaches down to zero
_MOST_CHEBYSHEV_STEPS = 12
_BEST_REDUCTION = 1e-5  # of the error by one correction: the rounding of M leaves more
_MOST_CORRECTIONS = 5
_DEFLATED = 72  # large directions that are taken out of X before its Gram matrix is rounded
_COLUMNS = 24  # corrections are computed in multiples of this

Solved = tuple[Solution, Certificate]
Result = Solved | NotConverged
Recurrence = Callable[[Tensor, Tensor], Tensor]
"""Of blocks (b, q, k), the newest and the one before: the next Chebyshev polynomial of an operator times a block."""


@dataclass(frozen=True, slots=True)
class _Estimate:
    """Of the errors of computed triplets, for each weight of a batch.

    Attributes:
        errors: (b, r), the part of each triplet in the relative error of the component.
        nearest: (b,), the nearest unwanted singular value.
        resolved: (b,), whether `nearest` is well above the rounding errors of float32.
        excess: (b,), the most by which an eigenvalue of G may exceed that of A's inverse, as a factor.
    """

    errors: Tensor
    nearest: Tensor
    resolved: Tensor
    excess: Tensor


class _Complement(Protocol):
    """The operator P A P (b, q, q), where P projects on the complement of a basis V (b, q, k)."""

    def precondition(self, R: Tensor) -> Tensor:
        """The right-hand side (b, q, k) of the equation that P A P solves, up to a factor for each column."""

    def recurrence(self, reach: Tensor) -> Recurrence:
        """For the Chebyshev polynomials on [0, reach], with `reach` (b,) on the host. Call it once, and last."""


class _End(Protocol):
    """One end of the spectrum of G, by an operator A (b, q, q) in float32 whose largest eigenvalues belong to it."""

    def apply(self, B: Tensor) -> Tensor:
        """A B (b, q, k) for B (b, q, k)."""

    def complement(self, V: Tensor, image: Tensor, *, corrected: bool) -> _Complement:
        """For an orthonormal basis V (b, q, k), and X V (b, p, k); and whether corrections are in the basis."""

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        """The eigenvalues of A (b, k) that belong to eigenvalues of G."""

    def estimate(self, theta: Tensor, weights: Tensor) -> _Estimate:
        """For the Ritz values theta (b, r + 1), the first unwanted one last, and weights = R^T precondition(R)."""

    @property
    def inverse(self) -> Tensor | None:
        """(X^T X - shift I)^-1 (b, q, q) in float32, for the certificate; None if it is not known."""

    def s_max(self, item: int, s: Tensor) -> float:
        """The largest singular value of one X, or an estimate of it from below; s (r,) are its wanted ones."""


@dataclass(frozen=True, slots=True)
class _SmallEnd:
    """A = M^-1 (b, q, q) in float32, with M = G - shift I to within `noise`, as an eigenvalue.

    Attributes:
        inverse: A.
        shift, noise: (b,), on the host.
        largest: (b,), an estimate of the largest singular value of X, from below.
        deflated: F (b, q, k) and Z^T (b, q, k) of `_deflated_inverse`, with A Z^T = F; or None.
    """

    inverse: Tensor
    shift: Tensor
    noise: Tensor
    largest: Tensor
    deflated: tuple[Tensor, Tensor] | None = None

    def apply(self, B: Tensor) -> Tensor:
        return self.inverse @ B

    def complement(self, V: Tensor, image: Tensor, *, corrected: bool) -> _Complement:
        V = V.to(torch.float32)
        image = self.inverse @ V
        half = plus_product(image, V, V.mT @ image, -0.5)
        # P A P = A - V half^T - half V^T
        matrix = plus_product(self.inverse, torch.cat([V, half], dim=-1), torch.cat([half, V], dim=-1).mT, -1)
        deflated = None if corrected or self.deflated is None else (*self.deflated, V, image)
        return _InverseOnComplement(matrix, deflated)

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return 1 / (theta - self.shift[:, None])

    def estimate(self, theta: Tensor, weights: Tensor) -> _Estimate:
        # An unwanted Ritz value lies above its eigenvalue, by about its own weight.
        following = theta[:, -1] - 2 * weights[:, -1]
        theta, weights = theta[:, :-1], weights[:, :-1].clamp_min(0)
        above = self.noise - self.shift
        excess = 1 + (above / following).clamp_min(0)
        s, nearest = theta.clamp_min(0).sqrt(), following.clamp_min(0).sqrt()
        distance = (following[:, None] - theta).clamp_min(1e-300)
        per_weight = nearest[:, None] * (following[:, None] + theta).clamp_min(0).sqrt() / distance  # as in `judge`
        errors = (excess[:, None] * weights).sqrt() * per_weight / s.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        return _Estimate(errors, nearest, above <= 0.5 * following, excess)

    def s_max(self, item: int, s: Tensor) -> float:  # noqa: ARG002  the protocol's
        return float(self.largest[item])


@dataclass(frozen=True, slots=True)
class _InverseOnComplement:
    """P A P (b, q, q); if large directions were deflated, F and Z^T with A Z^T = F, V and A V, all (b, q, k)."""

    matrix: Tensor
    deflated: tuple[Tensor, Tensor, Tensor, Tensor] | None

    def precondition(self, R: Tensor) -> Tensor:
        if self.deflated is None:
            return self.matrix @ R
        # The float32 errors of a basis make its residual large along these directions, where A is not accurate.
        F, Zt, V, AV = self.deflated
        c = F.mT @ R
        rest = plus_product(R, Zt, c, -1)
        solved = add_product(self.matrix @ rest, F, c)
        return outside(V, add_product(solved, AV, V.mT @ rest))

    def recurrence(self, reach: Tensor) -> Recurrence:
        twice = self.matrix.mul_((4 / reach).to(self.matrix)[:, None, None])
        twice.diagonal(dim1=-2, dim2=-1).sub_(2)
        return lambda newest, before: torch.baddbmm(before, twice, newest, beta=-1)


@dataclass(frozen=True, slots=True)
class _LargeEnd:
    """A = G in float32, as X^T (X B) with the blocks of rows of X (b, rows, q)."""

    blocks: list[Tensor]
    inverse: None = None

    def apply(self, B: Tensor) -> Tensor:
        return _transposed_times(self.blocks, [block @ B for block in self.blocks])

    def complement(self, V: Tensor, image: Tensor, *, corrected: bool) -> _Complement:  # noqa: ARG002  the protocol's
        V = V.to(torch.float32)
        images = torch.split(image.to(torch.float32), [block.shape[-2] for block in self.blocks], dim=-2)
        return _GramOnComplement([plus_product(b, i, V.mT, -1) for b, i in zip(self.blocks, images, strict=True)])

    def eigenvalue_of(self, theta: Tensor) -> Tensor:
        return theta

    def estimate(self, theta: Tensor, weights: Tensor) -> _Estimate:
        weights = weights.clamp_min(0)
        s = theta.clamp_min(0).sqrt()
        # An unwanted Ritz value lies below its eigenvalue, by its residual at most.
        nearest = (theta[:, -1] + weights[:, -1].sqrt()).clamp_min(0).sqrt()
        s, weights = s[:, :-1], weights[:, :-1]
        errors = weights.sqrt() / (s - nearest[:, None]).clamp_min(1e-300)
        errors = errors / s.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        return _Estimate(errors, nearest, torch.isfinite(nearest), torch.ones_like(nearest))

    def s_max(self, item: int, s: Tensor) -> float:  # noqa: ARG002  the protocol's
        return float(s[0])


@dataclass(frozen=True, slots=True)
class _GramOnComplement:
    """P G P, as (X P)^T (X P) with the blocks of rows of X P (b, rows, q)."""

    blocks: list[Tensor]

    def precondition(self, R: Tensor) -> Tensor:
        return R

    def recurrence(self, reach: Tensor) -> Recurrence:
        for block in self.blocks:
            block.mul_((2 / reach.sqrt()).to(block)[:, None, None])

        def following(newest: Tensor, before: Tensor) -> Tensor:
            out = torch.add(before, newest, alpha=2).neg_()
            for block in self.blocks:
                add_product(out, block.mT, block @ newest)
            return out

        return following


def extreme_triplets(X: BlockedMatrix, r: int, tolerance: float, *, largest: bool = False) -> list[Result]:
    """The r smallest or largest triplets of each of a batch X (b, p, q), with a component error up to `tolerance`.

    Returns:
        For each matrix its solution, which the certificate accepts; or why there is none: float32 does not resolve it,
        or the corrections do not converge.

    Raises:
        NotConverged: No matrix has a solution, for the reason given.
    """
    q, arithmetic, device = X.shape[1], X.arithmetic, X.stored.device
    end: _End = _LargeEnd(list(X.float32_blocks())) if largest else _small_end(X)
    space = filtered_space(end.apply, q, r, arithmetic=arithmetic, device=device, batch=X.batch)
    V, width = space.vectors, space.vectors.shape[-1]
    spare = 3 * (width - r) // 4  # beyond the wanted vectors, those of the basis that are as good
    image, gram_image = X.times_and_back(V)
    items = _Items(len(X.stored))
    previous = torch.full((len(X.stored),), math.inf, dtype=torch.float64)
    for corrections in range(_MOST_CORRECTIONS + 1):
        projected, probe = read_together(V.mT @ gram_image, space.probe)
        finite = projected.isfinite().flatten(1).all(dim=1) & probe.isfinite().flatten(1).all(dim=1)
        items.require(finite, "the basis broke down in float64")
        projected[~finite], probe[~finite] = torch.eye(projected.shape[-1], dtype=projected.dtype), 0.0
        theta, Y = torch.linalg.eigh((projected + projected.mT) / 2)
        if largest:
            theta, Y = theta.flip(-1), Y.flip(-1)
        last = end.eigenvalue_of(theta[:, r - 1 : r]).squeeze(1)
        complete = torch.linalg.matrix_norm(probe, ord=2) < last
        items.require(complete, "an independent block found what the subspace had missed")

        scaled = torch.stack([Y[..., : r + 1], Y[..., : r + 1] * theta[:, None, : r + 1]]).to(device)
        residual = plus_product(gram_image @ scaled[0], V, scaled[1], -1).to(torch.float32)
        complement = end.complement(V, image, corrected=corrections > 0)
        solved = complement.precondition(residual)
        weights = (residual * solved).sum(dim=-2).cpu().to(torch.float64)
        estimate = end.estimate(theta[:, : r + 1], weights)
        items.require(estimate.resolved, "float32 does not resolve the wanted end")
        error = estimate.errors.norm(dim=-1)
        left = [f"corrections in float64 left an error of {figure:.1e}" for figure in error.tolist()]
        helps = (error > 0) & (error < 0.5 * previous)  # else a correction has nothing to reduce, or does not reduce it
        items.require(helps | (error <= tolerance), left)

        ready = [item for item in items.open if float(error[item]) <= tolerance]
        if ready:
            how = f"r = {r} of q = {q}, {space.products} float32 steps of {width}, {corrections} corrections"
            how += f", {len(X.stored)} equal weights at once" if len(X.stored) > 1 else ""
            solutions = _certified(X, end, image, V, scaled[0, ..., :r], estimate, ready, how)
            for item, found in zip(ready, solutions, strict=True):
                if is_accepted(*found, tolerance):
                    items.end(item, found)
            items.require(helps, left)
        if corrections == _MOST_CORRECTIONS:
            items.require(torch.zeros_like(helps), left)
        if not items.open:
            break
        previous = error

        worst = _worst(estimate.errors, tolerance, items.open)
        sigma = 1 / end.eigenvalue_of(theta.gather(1, worst))
        reach = end.eigenvalue_of(theta[:, r + spare : r + spare + 1]).squeeze(1)
        reduction = (0.1 * tolerance / error[items.open]).clamp(_BEST_REDUCTION, 0.1).min()
        size = weights.gather(1, worst).abs().clamp_min(1e-37).rsqrt()
        selection = torch.zeros(len(X.stored), r + 1, worst.shape[1])
        selection.scatter_(1, worst.unsqueeze(1), size.to(torch.float32).unsqueeze(1))
        table = _chebyshev_series(sigma * reach[:, None], float(reduction), items.open).to(device, torch.float32)
        new = _series_times(complement.recurrence(reach), table.unsqueeze(2), solved @ selection.to(device))
        new, _ = arithmetic.orthonormalise(outside(V, new.to(torch.float64)), condition=1e7)
        new_image, new_gram_image = X.times_and_back(new)
        V, image = torch.cat([V, new], dim=-1), torch.cat([image, new_image], dim=-1)
        gram_image = torch.cat([gram_image, new_gram_image], dim=-1)
    return [items.results[item] for item in range(len(X.stored))]


class _Items:
    """The matrices of a batch: those that are still worked on, and the results of the others."""

    def __init__(self, count: int) -> None:
        self.open = list(range(count))
        self.results: dict[int, Result] = {}

    def end(self, item: int, result: Result) -> None:
        self.open.remove(item)
        self.results[item] = result

    def require(self, good: Tensor, reasons: str | Sequence[str]) -> None:
        """Give up each open item for which good (b,) does not hold."""
        for item in [item for item in self.open if not good[item]]:
            self.end(item, NotConverged(reasons if isinstance(reasons, str) else reasons[item]))


def _certified(  # noqa: PLR0913
    X: BlockedMatrix,
    end: _End,
    image: Tensor,
    V: Tensor,
    wanted: Tensor,
    estimate: _Estimate,
    items: list[int],
    reason: str,
) -> list[Solved]:
    """The solutions within the wanted columns V wanted (b, q, r), with their certificates, of those items."""
    inverse = end.inverse
    if len(items) < len(V):
        X, image, V, wanted = replace(X, stored=X.stored[items]), image[items], V[items], wanted[items]
        inverse = None if inverse is None else inverse[items]
    image = image @ wanted
    Q, R = X.arithmetic.orthonormalise(image, condition=1e7)
    u, s, vh = torch.linalg.svd(R)
    left, right, image = Q @ u, V @ wanted @ vh.mT, image @ vh.mT
    residual = residual_of(X, left, s, right)
    weights: Tensor | None = None
    if inverse is not None:
        b = outside(right, residual).to(torch.float32)
        weights = (b * (inverse @ b)).sum(dim=-2, dtype=torch.float64)
    errors = read_together(*measured_errors(left, s, right, image, residual, weights))
    found = []
    for number, item in enumerate(items):
        s_host, *others = (x[number] for x in errors)
        if weights is not None:
            others[-1] = others[-1] * estimate.excess[item]
        solution = Solution(
            left[number],
            s[number],
            right[number],
            image[number],
            end.s_max(item, s_host),
            path="mixed",
            reason=reason,
            complete="an independent block found nothing beyond the cut",
        )
        nearest = estimate.nearest[item].expand_as(s_host)
        found.append((solution, judge(solution, nearest, (s_host - nearest).abs(), s_host, *others)[0]))
    return found


def _worst(errors: Tensor, tolerance: float, items: list[int]) -> Tensor:
    """The indices (b, columns), ascending, of the triplets to correct, of r with these errors (b, r)."""
    r = errors.shape[1]
    count = int((errors[items] > 0.1 * tolerance / math.sqrt(r)).sum(dim=1).max())
    columns = min(r, -(-max(count, 1) // _COLUMNS) * _COLUMNS)
    return errors.topk(columns).indices.sort().values


def _chebyshev_series(products: Tensor, reduction: float, items: list[int]) -> Tensor:
    """The coefficients (terms, b, k) of 1 / (1 - z) on 0 <= z <= products (b, k), to a relative error of `reduction`.

    With z = products (1 + y) / 2, they belong to the Chebyshev polynomials of y.
    """
    c = (products / 2).clamp(1e-6, 0.495)
    ratio = (1 - c) / c
    rho = ratio - (ratio.square() - 1).sqrt()
    terms = 1 + min(_MOST_CHEBYSHEV_STEPS, math.ceil(math.log(reduction) / math.log(float(rho[items].max()))))
    series = 2 * rho ** torch.arange(terms, dtype=rho.dtype)[:, None, None] / (1 - 2 * c).sqrt()
    series[0] /= 2
    return series


def _series_times(recurrence: Recurrence, series: Tensor, block: Tensor) -> Tensor:
    """The sum of a Chebyshev series (terms, b, 1, k) of an operator, times a block (b, q, k)."""
    before, newest = block, recurrence(block, torch.zeros_like(block)) / 2  # T_1 = y, where the recurrence gives 2 y
    first, *factors = series.unbind()
    out = first * block
    for number, factor in enumerate(factors):
        if number:
            before, newest = newest, recurrence(newest, before)
        out.addcmul_(factor, newest)
    return out


def _small_end(X: BlockedMatrix) -> _SmallEnd:
    """M^-1 in float32: shifted for a clearly rectangular X, whose spectrum does not reach down to zero; else deflated.

    Raises:
        NotConverged: No M is positive definite.
    """
    end = _shifted_inverse(X) if ends_above_zero(X) else _deflated_inverse(X)
    if not bool(end.largest.isfinite().any()):
        raise NotConverged("the Gram matrix is not positive definite in float32")
    return end


def _shifted_inverse(X: BlockedMatrix) -> _SmallEnd:
    """(G - shift I)^-1, the shift just below the smallest eigenvalue of G."""
    (_, q), arithmetic, device, batch = X.shape, X.arithmetic, X.stored.device, X.batch
    G = X.float32_gram()
    norm = torch.linalg.matrix_norm(G)
    first = G.clone()
    _diagonal(first).add_((GRAM_NOISE * norm)[:, None])
    L, inverse, _ = _factor_and_inverse(first)
    of_inverse = krylov_projection(
        lambda B: inverse @ B, q, block=SHIFT_BLOCK, arithmetic=arithmetic, device=device, batch=batch
    )
    of_matrix = power_projection(
        lambda B: L @ (L.mT @ B), q, arithmetic=arithmetic, device=device, dtype=torch.float32, batch=batch
    )
    on_host = largest_eigenvalues(of_inverse, of_matrix, norm[:, None, None])
    smallest, largest, norm_on_host = (x.to(torch.float64) for x in on_host)
    noise = GRAM_NOISE * norm_on_host
    shift = torch.tensor([round_down(x) for x in (SHIFT * (1 / smallest - noise)).nan_to_num(0.0).tolist()])
    shift = shift.to(torch.float64)
    shifted = (smallest > 0) & (shift > 4 * noise)
    shift = torch.where(shifted, shift, -noise)
    if bool(shifted.any()):
        _diagonal(G).sub_(shift.to(G)[:, None])
        _, nearer, failed = _factor_and_inverse(G)
        succeeded = (failed == 0).cpu()
        if bool(succeeded.all()):
            inverse = nearer
        else:
            inverse = torch.where((failed == 0)[:, None, None], nearer, inverse)
            shift = torch.where(succeeded, shift, -noise)
    return _SmallEnd(inverse, shift, noise, largest.clamp_min(0).sqrt())


def _deflated_inverse(X: BlockedMatrix) -> _SmallEnd:
    """(G + noise I)^-1 by block elimination of the largest directions.

    With about k of the largest right singular vectors in the columns of Q, U orthonormal and F = Q R^-1 such that
    X F = U, Z = U^T X, and T = I - F Z,

        M^-1 = T S^-1 T^T + F F^T,    S = X^T (I - U U^T) X - shift I.

    S is the Schur complement. It has none of the large entries of G, whose rounding would hide the small eigenvalues.
    Along Q, S is zero; a multiple of Q Q^T makes it definite there, and T takes that out again.
    """
    q, arithmetic = X.shape[1], X.arithmetic
    start = torch.randn(q, _DEFLATED, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    V = start.to(X.stored.device, torch.float32)
    blocks = list(X.float32_blocks())  # of rows; it is read five times
    starts = list(accumulate(block.shape[-2] for block in blocks))[:-1]
    Q = arithmetic.normalise(_transposed_times(blocks, [block @ V for block in blocks]))
    U, R = arithmetic.orthonormalise(torch.cat([block @ Q for block in blocks], dim=-2), condition=1e4)
    F = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
    of_blocks = U.tensor_split(starts, dim=-2)
    Z = _transposed_times(blocks, of_blocks).mT
    for block, rows in zip(blocks, of_blocks, strict=True):
        add_product(block, rows, Z, -1)
    S = gram_of_blocks(blocks, q, arithmetic)
    del blocks
    norm, trace = torch.linalg.matrix_norm(S), _diagonal(S).sum(dim=-1)
    add_product(S, Q * (4 / q * trace)[:, None, None], Q.mT)
    # An explicit inverse has an error of eps / shift, which must be small beside 1 / s_max^2.
    _diagonal(S).add_((GRAM_NOISE * norm)[:, None], alpha=_BELOW_ZERO)
    _, inverse, _ = _factor_and_inverse(S)
    SZ = inverse @ Z.mT
    half = plus_product(F, F, Z @ SZ).mul_(0.5).sub_(SZ)
    add_product(add_product(inverse, half, F.mT), F, half.mT)
    largest, norm_on_host, corner = largest_eigenvalues(R.mT @ R, norm[:, None, None], inverse[:, :1, :1])
    noise = GRAM_NOISE * norm_on_host.to(torch.float64)
    largest = largest.to(torch.float64).sqrt().where(corner.isfinite(), math.nan)
    return _SmallEnd(inverse, -_BELOW_ZERO * noise, noise, largest, (F, Z.mT))


def _factor_and_inverse(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L with G = L L^T, G^-1 (b, q, q), and (b,) the info of the library: where that is not 0, both are NaN."""
    L, failed = torch.linalg.cholesky_ex(G)
    L = torch.where(failed[:, None, None] == 0, L, torch.nan)
    return L, torch.cholesky_inverse(L), failed


def _transposed_times(blocks: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """X^T U (b, q, k), for the blocks of rows of X (b, p, q) and of U (b, p, k)."""
    out = blocks[0].mT @ rows[0]
    for block, of_block in zip(blocks[1:], rows[1:], strict=True):
        add_product(out, block.mT, of_block)
    return out


def _diagonal(G: Tensor) -> Tensor:
    """The diagonals (b, q) of a batch of matrices (b, q, q), in their memory."""
    return G.diagonal(dim1=-2, dim2=-1)
