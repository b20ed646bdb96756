"""The r largest singular triplets of X on a CPU, sought in float32 and corrected in float64.

Why. Most of the work towards the largest triplets does not need float64, and float32 is twice as fast. A GPU takes
mixed_precision.py for both ends of the spectrum, which makes fewer calls; this file multiplies fewer columns.

How. 1. Block Lanczos (lanczos.py) with G = X^T X in float32: the wanted right vectors and some beyond them, to three or
four digits. 2. Rayleigh-Ritz with them in float64, in X itself. 3. The residual of the wanted triplets in float64, and
from it the certificate. 4. While that is not accepted: a correction t of each wanted vector v, with eigenvalue theta
and residual R = G v - theta v, from

    (G - theta I) t = -R    on the complement of the wanted vectors,

in float32, to as many digits as the triplet needs: t is added to v. Back to steps 2 and 3, with the wanted vectors
alone.

The correction equation is that of the Jacobi-Davidson method, solved as (I - sigma G) t = sigma R with sigma = 1 /
theta. The vectors beyond the wanted ones, where I - sigma G is nearly singular, are eliminated. What is left takes a
few steps of Chebyshev's iteration: zero for most triplets, and up to 12 for those next to the cut.

Precision. Steps 2 and 3 alone decide the accuracy. Each correction multiplies the error by 1e-2 to 1e-4.

Cost. In float32 4 p q for each of some 10 r products, or p q^2 and 2 q^2 for each where X is tall. In float64 2 p q for
each vector of step 1, and 4 p q r for each round of steps 2 and 3, of which there are two mostly. X in float32, or the
Gram matrix.

Failure. `NotConverged` where the corrections do not converge: no gap at the cut, or one below the rounding of float32.

Sources: G. Sleijpen and H. van der Vorst (1996), https://doi.org/10.1137/S0036144599363084; Chebyshev's iteration:
Y. Saad (2003), Iterative Methods for Sparse Linear Systems, algorithm 12.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.blocked_matrix import BlockedMatrix, Operator
from milora_init.linalg.certificate import (
    Certificate,
    Gaps,
    NotConverged,
    Solution,
    is_accepted,
    measure,
    residual_of,
)
from milora_init.linalg.lanczos import largest_eigenpairs, outside, spectral_norm

_BEYOND = 48  # vectors beyond the wanted ones: the more, the fewer steps a correction takes
_ANGLE = 3e-4  # the tolerated angle of the float32 vectors: about what float32 can reach
_PRODUCTS = 12  # vectors that G is applied to, for each wanted one
_MOST_STEPS = 12
_BEST_REDUCTION = 1e-4  # one correction cannot reduce the error by a smaller factor, because G is rounded
_MOST_CORRECTIONS = 5
_MARGIN = 0.5  # a correction aims at an error of a triplet that is this part of the tolerated one


def largest_triplets(X: BlockedMatrix, r: int, tolerance: float) -> tuple[Solution, Certificate]:
    """The r largest triplets of X (p, q), with a certified component error of at most `tolerance`.

    Raises:
        NotConverged: float32 does not resolve them, or the corrections do not converge.
    """
    q, arithmetic = X.shape[1], X.arithmetic
    apply = X.float32_gram_operator(_PRODUCTS * r)
    block = min(arithmetic.float32_krylov_block, q // 96 * 8)  # a Krylov space needs a dozen steps at its disposal
    pairs = largest_eigenpairs(
        apply,
        q,
        r,
        extra=_BEYOND,
        block=block,
        max_basis=min(q - 2 * block, 16 * r + 768),
        tolerance=_ANGLE,
        arithmetic=arithmetic,
        device=X.stored.device,
        dtype=torch.float32,
    )
    theta, vectors, image = _ritz_pairs(X, pairs.vectors)
    if not spectral_norm(pairs.probe.to(torch.float64)) < float(theta[r - 1]):
        raise NotConverged("an independent block found what the Krylov space had missed")
    left, s, right, image = _rotate(image[:, : r + 1], vectors[:, : r + 1])
    beyond: _Beyond | None = None
    nearest, previous = s[:0], math.inf
    for corrections in range(_MOST_CORRECTIONS + 1):
        residual = residual_of(X, left, s, right)
        if corrections == 0:
            # The first unwanted triplet: its Ritz value lies below its eigenvalue, by its residual at most.
            nearest = (s[r].square() + s[r] * residual[:, r].norm()).sqrt().expand(r)
            left, s, right, image, residual = (x[..., :r] for x in (left, s, right, image, residual))
        solution = Solution(
            left,
            s,
            right,
            image,
            float(s[0]),
            path="mixed",
            reason=f"r = {r} of q = {q}, {pairs.steps} float32 steps of {block}, {corrections} corrections",
            complete="an independent block found nothing beyond the cut",
        )
        certificate, errors = measure(solution, Gaps(nearest, (s - nearest).abs()), residual)
        if is_accepted(solution, certificate, tolerance):
            return solution, certificate
        error = math.inf if certificate.component_error is None else certificate.component_error
        if corrections == _MOST_CORRECTIONS or not error < 0.5 * previous:
            break
        previous = error
        if beyond is None:
            beyond = _Beyond.of(apply, right, vectors[:, r:], theta[r:])
        t = _corrections(apply, beyond, right, s, residual, errors * (math.sqrt(r) / tolerance))
        right, _ = arithmetic.orthonormalise(right + t, condition=10)
        left, s, right, image = _rotate(X.times(right), right)
    raise NotConverged(f"corrections in float64 left an error of {error:.1e}")


def _ritz_pairs(X: BlockedMatrix, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Ritz values of X^T X (k,) descending, its Ritz vectors (q, k) and their images under X (p, k), for V (q, k).

    Raises:
        NotConverged: They are not finite.
    """
    image = X.times(V)
    projected = image.mT @ image
    if not bool(projected.isfinite().all()):
        raise NotConverged("the basis broke down in float64")
    theta, Y = torch.linalg.eigh(projected)
    Y = Y.flip(1)
    return theta.flip(0), V @ Y, image @ Y


def _rotate(image: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triplets within orthonormal vectors (q, k), whose image under X (p, k) is given: left, s, right, X right."""
    Q, R = torch.linalg.qr(image)
    u, s, vh = torch.linalg.svd(R)
    return Q @ u, s, vectors @ vh.mT, image @ vh.mT


@dataclass(frozen=True, slots=True)
class _Beyond:
    """The vectors beyond the wanted ones, in float32: E (q, e) with G E = E diag(values) + rest.

    `rest` (q, e) is orthogonal to E and the wanted vectors; `reach` is the largest eigenvalue of G outside both.
    """

    E: Tensor
    values: Tensor
    rest: Tensor
    reach: float

    @classmethod
    def of(cls, apply: Operator, wanted: Tensor, vectors: Tensor, values: Tensor) -> _Beyond:
        """For the wanted vectors (q, r), Ritz vectors beyond them (q, e), and their Ritz values (e,)."""
        V, E = wanted.to(torch.float32), vectors.to(torch.float32)
        # The last ones are too rough to count as eigenvectors.
        return cls(E, values, outside(E, outside(V, apply(E))), float(values[3 * len(values) // 4]))


def _corrections(
    apply: Operator, beyond: _Beyond, right: Tensor, s: Tensor, residual: Tensor, excess: Tensor
) -> Tensor:
    """t (q, r) in float64 with (G - theta I) t = -R on the complement of the wanted vectors, about.

    Args:
        apply: G in float32.
        beyond: The vectors beyond the wanted ones.
        right: The wanted vectors (q, r).
        s: Their singular values (r,); theta is their square.
        residual: X^T u - s v (q, r); R is s times that.
        excess: (r,), by how much the error of each triplet is too large.
    """
    V = right.to(torch.float32)
    E = outside(V, beyond.E)
    size, sigma = residual.norm(dim=0).clamp_min(1e-300), 1 / s.square()
    b = outside(V, (residual / size).to(torch.float32))
    # In the span of E: (I - sigma diag(values)) c = E^T b + sigma rest^T t.
    coarse = 1 / (1 - beyond.values.unsqueeze(1) * sigma)
    coarse, coupling = coarse.to(torch.float32), (coarse * sigma).to(torch.float32)
    of_b = E.mT @ b
    fine = torch.addmm(b, E, of_b, alpha=-1).addmm_(beyond.rest, coupling * of_b)
    t = _chebyshev(apply, torch.cat([V, E], dim=1), fine, sigma, beyond.reach, excess)
    t = t.addmm_(E, (coarse * of_b).addcmul_(coupling, beyond.rest.mT @ t))
    scaled: Tensor = t.to(torch.float64) * (size / s)
    return scaled


def _chebyshev(apply: Operator, basis: Tensor, b: Tensor, sigma: Tensor, reach: float, excess: Tensor) -> Tensor:
    """t (q, r) with (I - K) t = b, for K = sigma P G P, by Chebyshev's iteration in each column; b is overwritten.

    P projects on the complement of the basis (q, k); b (q, r) lies there. The eigenvalues of K lie between 0 and
    sigma * reach. sigma (r,), ascending, and excess (r,) decide how many steps a column gets; the last ones get most.
    """
    half = (sigma * reach).clamp(1e-6, 0.99) / 2  # of the interval of eigenvalues of I - K, around 1 - half
    ratio = (1 - half) / half
    rate = ratio - (ratio.square() - 1).sqrt()
    reduction = (_MARGIN / excess).clamp(_BEST_REDUCTION, 1.0)
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
