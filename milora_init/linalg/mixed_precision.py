"""The r smallest singular triplets of X, sought in float32 and corrected in float64.

Why. What is wanted needs float64 accuracy, but most of the work towards it does not. float32 is twice as fast as
float64 on a CPU, and 32 or 64 times on most GPUs. The products of bfloat16 numbers are exact in it.

How. 1. The Gram matrix G = X^T X, and a Cholesky factor of M = G - shift I, in float32. 2. Block Lanczos with M^-1 in
float32: the wanted right vectors, and some beyond them, to three digits. 3. Rayleigh-Ritz with these vectors in
float64, from X V and X^T X V. 4. While the error estimate is too large: a correction t of each wanted vector v, with
Ritz value theta and residual R = G v - theta v, from

    (G - theta I) t = -R    on the complement of the basis,

the correction equation of the Jacobi-Davidson method. It is solved to a few digits, in float32, by Chebyshev's
iteration on (I - (theta - shift) M^-1) t = -M^-1 R. The corrections join the basis: back to step 3.

Precision. Step 3 alone decides the accuracy. Each correction multiplies the error by the relative error of M on the
complement, 1e-2 to 1e-4.

Cost. p q^2 and q^3 / 3 operations in float32; in float64 4 p q for each column of the basis, of which there are r to
4 r.

Failure. `NotConverged` where float32 does not resolve the wanted end: the first unwanted eigenvalue of G must be well
above eps * ||G||. That shows in the corrections, too, which then do not converge. The certificate (certificate.py) is
in float64, from X.

Sources: the correction equation: G. Sleijpen and H. van der Vorst (1996), https://doi.org/10.1137/S0036144599363084.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic
from milora_init.linalg.blocked_matrix import BlockedMatrix, gram_of_blocks
from milora_init.linalg.certificate import Certificate, Gaps, NotConverged, Solution, certify, is_accepted
from milora_init.linalg.cholesky import CholeskyFactor, cholesky
from milora_init.linalg.lanczos import (
    krylov_projection,
    largest_eigenpairs,
    largest_eigenvalues,
    power_projection,
    round_down,
)

EPS32 = torch.finfo(torch.float32).eps
_EXTRA = 32  # vectors beyond the wanted ones: the more, the better conditioned is the correction equation
_ANGLE = 1e-3  # of the float32 vectors, about as accurate as float32 leaves them
_NOISE = 0.1  # of eps * ||G||: four times and more what was measured on the eigenvectors of the smallest eigenvalues
_DEFLATED = 72  # large directions that are taken out of X before its Gram matrix is rounded
_DEFLATED = 72  # large directions that are taken out of X before its Gram matrix is rounded
_BELOW_ZERO = 100  # times the noise: the shift where the spectrum reaches down to zero
_SHIFT_BLOCK = 48
_SHIFT = 0.95  # of the smallest eigenvalue
_MOST_CHEBYSHEV_STEPS = 12
_BEST_REDUCTION = 1e-5  # of the error by one correction: the rounding of M leaves more
_MOST_CORRECTIONS = 5
_COLUMNS = 24  # corrections are computed in multiples of this


Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True, slots=True)
class _Inverse:
    """M^-1 (q, q) in float32, with M = G - shift I to within `noise`, as an eigenvalue.

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
    s_max: float

    def solve(self, B: Tensor) -> Tensor:
        """M^-1 B (q, b) for B (q, b), in float32."""
        if self.deflated is None:
            return self.S.solve(B)
        F, Z = self.deflated
        c = F.mT @ B
        x = self.S.solve(torch.addmm(B, Z.mT, c, alpha=-1))
        return torch.addmm(x, F, torch.addmm(c, Z, x, alpha=-1))

    def solve_in_float64(self, B: Tensor, factor: float) -> Tensor:
        """factor * M^-1 B (q, b) for B (q, b), both float64."""
        return factor * self.solve(B.to(torch.float32)).to(torch.float64)

    def excess(self, next_eigenvalue: float) -> float:
        """The most by which an eigenvalue of M exceeds one of G that is at least `next_eigenvalue`, as a factor.

        Raises:
            NotConverged: It is not close to 1.
        """
        above = self.noise - self.shift
        if not above <= 0.5 * next_eigenvalue:
            raise NotConverged("float32 does not resolve the wanted end")
        return 1 + max(0.0, above / next_eigenvalue)


def smallest_triplets(X: BlockedMatrix, r: int, tolerance: float) -> tuple[Solution, Certificate]:
    """The r smallest triplets of X (p, q), with a certified component error of at most `tolerance`.

    Raises:
        NotConverged: float32 does not resolve them, or the corrections do not converge.
    """
    q, arithmetic, device = X.shape[1], X.arithmetic, X.stored.device
    inverse = _float32_inverse(X)
    block = min(arithmetic.float32_krylov_block, q // 96 * 8)  # a Krylov space needs a dozen steps at its disposal
    pairs = largest_eigenpairs(
        inverse.solve,
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
    if not pairs.probe_value < float(pairs.values[r - 1]):
        raise NotConverged("an independent block found what the Krylov space had missed")

    V = pairs.vectors
    image, gram_image = X.times_and_back(V)
    previous = math.inf
    for corrections in range(_MOST_CORRECTIONS + 1):
        projected = (V.mT @ gram_image).cpu()
        if not bool(projected.isfinite().all()):
            raise NotConverged("the basis broke down in float64")
        theta, Y = torch.linalg.eigh((projected + projected.mT) / 2)
        Y = Y[:, : r + 1].to(device)
        vectors = V @ Y
        residual = gram_image @ Y - vectors * theta[: r + 1].to(device)
        size = residual.norm(dim=0).clamp_min(1e-300)
        residual = (residual / size).to(torch.float32)
        basis = V.to(torch.float32)
        solved = _outside(basis, inverse.solve(residual))
        weights = ((residual * solved).sum(dim=0) * size.square()).cpu().to(torch.float64)  # R^T M^-1 R

        # An unwanted Ritz value lies above its eigenvalue, by about its own weight.
        next_eigenvalue = float(theta[r] - 2 * weights[r])
        excess = inverse.excess(next_eigenvalue)
        s, nearest = theta[:r].clamp_min(0).sqrt(), math.sqrt(next_eigenvalue)
        distance = (next_eigenvalue - theta[:r]).clamp_min(1e-300)
        per_weight = nearest * (next_eigenvalue + theta[:r]).clamp_min(0).sqrt() / distance  # as in `certify`
        errors = (excess * weights[:r].clamp_min(0)).sqrt() * per_weight / float(s.norm().clamp_min(1e-300))
        error = float(errors.norm())
        if error <= tolerance:
            left, s, right, right_image = _rotate(image @ Y[:, :r], vectors[:, :r], arithmetic)
            gaps = Gaps(torch.full_like(s, nearest), nearest - s)
            solution = Solution(
                left,
                s,
                right,
                right_image,
                inverse.s_max,
                path="mixed",
                reason=f"r = {r} of q = {q}, {pairs.steps} float32 steps of {block}, {corrections} corrections",
                complete="an independent block found nothing beyond the cut",
                inverse=partial(inverse.solve_in_float64, factor=excess),
            )
            certificate = certify(X, solution, gaps)
            if is_accepted(solution, certificate, tolerance):
                return solution, certificate
        if not error > 0 or (corrections and not error < 0.5 * previous):
            break  # no correction helps: the estimate has nothing left to reduce, or does not fall
        previous = error
        if corrections == _MOST_CORRECTIONS:
            break
        count = int((errors > 0.1 * tolerance / math.sqrt(r)).sum())
        columns = min(r, -(-max(count, 1) // _COLUMNS) * _COLUMNS)
        worst = errors.topk(columns).indices.sort().values
        sigma, beyond = theta[worst] - inverse.shift, float(theta[r + _EXTRA // 2]) - inverse.shift
        reduction = min(0.1, max(0.1 * tolerance / error, _BEST_REDUCTION))
        new = _corrections(inverse, basis, solved[:, worst.to(device)], sigma, beyond, reduction)
        new = _orthonormal_complement(V, new.to(torch.float64), arithmetic)
        new_image, new_gram_image = X.times_and_back(new)
        V, image = torch.cat([V, new], dim=1), torch.cat([image, new_image], dim=1)
        gram_image = torch.cat([gram_image, new_gram_image], dim=1)
    raise NotConverged(f"corrections in float64 left an error of {error:.1e}")


def _float32_inverse(X: BlockedMatrix) -> _Inverse:
    """M^-1 in float32: shifted for a clearly rectangular X, whose spectrum does not reach down to zero; else deflated.

    Raises:
        NotConverged: M is not positive definite.
    """
    p, q = X.shape
    return _shifted_inverse(X) if 2 * p >= 3 * q else _deflated_inverse(X)


def _shifted_inverse(X: BlockedMatrix) -> _Inverse:
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
            return _Inverse(nearer, None, shift, noise, s_max)
    return _Inverse(factor, None, -noise, noise, s_max)


def _deflated_inverse(X: BlockedMatrix) -> _Inverse:
    """(G + noise I)^-1 by block elimination of the largest directions. Raises NotConverged."""
    q, arithmetic = X.shape[1], X.arithmetic
    start = torch.randn(q, _DEFLATED, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    blocks = list(X.float32_blocks())  # of rows; it is read five times
    starts = list(accumulate(block.shape[0] for block in blocks))[:-1]
    V = start.to(X.stored.device, torch.float32)
    Q, _ = arithmetic.orthonormalise(_transposed_times(blocks, [block @ V for block in blocks]))
    U, R = arithmetic.orthonormalise(torch.cat([block @ Q for block in blocks]))
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
        return _Inverse(factor, (F, Z), shift, noise, s_max)
    # M^-1 as one matrix: a solve is then one product.
    SZ = factor.inverse @ Z.mT
    half = torch.addmm(F, F, Z @ SZ).mul_(0.5).sub_(SZ)
    whole = torch.addmm(factor.inverse, half, F.mT).addmm_(F, half.mT)
    return _Inverse(CholeskyFactor(factor.L, [], whole), None, shift, noise, s_max)


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


def _outside(basis: Tensor, Y: Tensor) -> Tensor:
    """Y (q, b) without its part in the span of an orthonormal basis (q, k)."""
    return torch.addmm(Y, basis, basis.mT @ Y, alpha=-1)


def _corrections(
    inverse: _Inverse, basis: Tensor, solved: Tensor, sigma: Tensor, beyond: float, reduction: float
) -> Tensor:
    """t (q, b) with (I - K) t = solved, for K = sigma P M^-1 P, by Chebyshev's iteration in each column.

    P projects on the complement of the basis (q, k); solved (q, b) is P M^-1 P R; sigma (b,) is theta - shift. The
    eigenvalues of K lie between 0 and sigma / beyond, where `beyond` is the smallest eigenvalue of M on the complement.
    The iteration ends when the error of t should be `reduction` of t.
    """
    center = (sigma / beyond).clamp_max(0.99) / 2
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
    before = torch.zeros_like(solved)
    t = before
    for of_solved, of_image, of_t, of_before in table.to(solved.device, solved.dtype).unbind():
        image = _outside(basis, inverse.solve(t)) if t is not before else before
        new = torch.addcmul(torch.addcmul(of_solved * solved, of_image, image), of_t, t)
        t, before = torch.addcmul(new, of_before, before), t
    return t


def _orthonormal_complement(V: Tensor, Z: Tensor, arithmetic: DeviceArithmetic) -> Tensor:
    """An orthonormal basis of Z (q, b) within the complement of V (q, k)."""
    Z = Z / Z.norm(dim=0).clamp_min(1e-300)
    for _ in range(2):
        Z = _outside(V, Z)
    return arithmetic.orthonormalise(Z, condition=1e7)[0]


def _rotate(image: Tensor, vectors: Tensor, arithmetic: DeviceArithmetic) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triplets within orthonormal vectors (q, r), whose image under X (p, r) is given: left, s, right, X right."""
    Q, R = arithmetic.orthonormalise(image, condition=1e7)
    u, s, vh = torch.linalg.svd(R)
    return Q @ u, s, vectors @ vh.mT, image @ vh.mT
