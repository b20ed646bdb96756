"""How far computed singular triplets are from those of the weight, measured against the weight in float64.

A solver's own error estimate is not trusted: every solution is measured here before it is returned.

What is measured. The residuals X v - s u and X^T u - s v of each triplet. They bound the error of its singular value
(Weyl) and, divided by the distance to the nearest unwanted singular value, the error of its singular vectors (Wedin).
Both become one figure for what is used in the end, the component D = U diag(s) V^T.

Cost: one product with X^T, 2 p q r operations; with an inverse of X^T X at hand, 2 q^2 r more.

Source: P.-A. Wedin (1972), https://doi.org/10.1007/BF01932678.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.accuracy import Certificate as Certificate
from milora_init.accuracy import SolverPath
from milora_init.linalg.arithmetic import read_together
from milora_init.linalg.blocked_matrix import BlockedMatrix, Operator

EPS = torch.finfo(torch.float64).eps
_TINY = 1e-200  # against division by zero; X is scaled, so only a zero matrix has an s_max below 2^-17
_BACKWARD_LIMIT = 1e-13  # the residual, relative to s_max, of a result that float64 cannot improve
_CLUSTER_GAP = 1e-6  # below this gap the component is not unique, and the residual is judged instead


class NotConverged(Exception):  # noqa: N818  the caller tries the next algorithm, nobody sees an error
    """An algorithm found no solution that may be returned; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Solution:
    """r computed triplets of X (p, q), not yet measured.

    Attributes:
        left: (p, r), the left singular vectors.
        s: (r,), descending.
        right: (q, r), the right singular vectors.
        image: (p, r), the product X right.
        s_max: The largest singular value of X, or an estimate of it.
        path: The algorithm.
        reason: Why this one.
        complete: The evidence that no wanted triplet was missed.
        inverse: The product with (X^T X - shift I)^-1, for a shift below the wanted eigenvalues, where it is known.
    """

    left: Tensor
    s: Tensor
    right: Tensor
    image: Tensor
    s_max: float
    path: SolverPath
    reason: str
    complete: str
    inverse: Operator | None = None


@dataclass(frozen=True, slots=True)
class Gaps:
    """For each wanted singular value (r,): the nearest unwanted one, and the distance to it.

    The distance is inf where nothing is unwanted.
    """

    nearest: Tensor
    distance: Tensor


def certify(X: BlockedMatrix, solution: Solution, gaps: Gaps) -> Certificate:
    """Measure a solution against X (p, q)."""
    residual = residual_of(X, solution.left, solution.s, solution.right)
    if solution.inverse is None:
        return measure(solution, gaps, residual)[0]
    outside = torch.addmm(residual, solution.right, solution.right.mT @ residual, alpha=-1)
    return measure(solution, gaps, residual, (outside * solution.inverse(outside)).sum(dim=0))[0]


def residual_of(X: BlockedMatrix, left: Tensor, s: Tensor, right: Tensor) -> Tensor:
    """X^T u - s v (..., q, k) for k triplets."""
    return torch.addcmul(X.transposed_times(left), right, s.unsqueeze(-2), value=-1)


def measure(
    solution: Solution, gaps: Gaps, residual: Tensor, weights: Tensor | None = None
) -> tuple[Certificate, Tensor]:
    """The certificate of a solution, and the part (r,) of each triplet in its error, on the CPU.

    The squares of the parts sum to the square of the component error.

    Args:
        solution: The triplets.
        gaps: To the unwanted ones.
        residual: b (q, r), as in `measured_errors`.
        weights: (r,), b^T (X^T X - shift I)^-1 b, if known.
    """
    errors = measured_errors(solution.left, solution.s, solution.right, solution.image, residual, weights)
    return judge(solution, *read_together(gaps.nearest, gaps.distance, *errors))


def measured_errors(
    left: Tensor, s: Tensor, right: Tensor, image: Tensor, residual: Tensor, weights: Tensor | None
) -> list[Tensor]:
    """What `judge` needs of a solution, or of each of a batch of them, still on its device.

    Most of the residual b = X^T u - s v is rounding error along the largest singular vectors, where it does no harm:
    the part of b along s_j changes D by s b_j sqrt(s_j^2 + s^2) / (s_j^2 - s^2), which is b_j / s_j times a factor that
    falls with s_j. An inverse of X^T X gives the weights 1 / s_j.
    """
    left_error = torch.addcmul(image, left, s.unsqueeze(-2), value=-1).norm(dim=-2)
    errors = [s, left_error, residual.norm(dim=-2), left.mT @ left, right.mT @ right]
    return errors if weights is None else [*errors, weights]


def judge(  # noqa: PLR0913
    solution: Solution,
    nearest: Tensor,
    distance: Tensor,
    s: Tensor,
    a: Tensor,
    b: Tensor,
    left_gram: Tensor,
    right_gram: Tensor,
    weights: Tensor | None = None,
) -> tuple[Certificate, Tensor]:
    """As `measure`, from the gaps and the measured errors of one solution on the CPU."""
    r, q = s.numel(), solution.right.shape[0]
    scale = max(solution.s_max, _TINY)
    larger = torch.maximum(s, nearest).clamp_min(_TINY)
    per_residual = (s / distance.clamp_min(_TINY)).clamp_min(1.0)
    change_by_b = b * per_residual
    if weights is not None:
        weighted = weights.clamp_min(0).sqrt()
        factor = nearest * torch.hypot(nearest, s) / (distance * (nearest + s)).clamp_min(_TINY)
        change_by_b = torch.minimum(change_by_b, s * weighted * factor)
    identity = torch.eye(r, dtype=s.dtype)
    skew = torch.stack([gram - identity for gram in (left_gram, right_gram)]).abs().max()
    component_norm, gap = float(s.norm()), float((distance / larger).min())
    resolution = q * EPS * scale * math.sqrt(r)
    changes = torch.hypot(a * per_residual, change_by_b)
    error = float(changes.norm()) / max(component_norm, resolution)
    certificate = Certificate(
        path=solution.path,
        reason=solution.reason,
        residual=float(torch.maximum(a, b).max()) / scale,
        orthogonality=float(skew),
        gap=gap if math.isfinite(gap) else None,
        component_error=error if math.isfinite(error) else None,
        complete=solution.complete,
    )
    return certificate, changes / max(component_norm, resolution)


def gaps_in(spectrum: Tensor, wanted: Tensor) -> Gaps:
    """The gaps of the values at the indices `wanted` (r,) of a descending spectrum (q,)."""
    unwanted = torch.ones_like(spectrum, dtype=torch.bool)
    unwanted[wanted] = False
    others = spectrum[unwanted]
    s = spectrum[wanted]
    if others.numel() == 0:
        return Gaps(s, torch.full_like(s, math.inf))
    nearest = (s.unsqueeze(1) - others).abs().min(dim=1)
    return Gaps(others[nearest.indices], nearest.values)


def is_accepted(solution: Solution, certificate: Certificate, tolerance: float) -> bool:
    """Whether a solution may be returned. `tolerance` is the largest component error that is accepted."""
    if not math.isfinite(certificate.residual) or not certificate.orthogonality <= 1e-10:
        return False
    if certificate.component_error is not None and certificate.component_error <= tolerance:
        return True
    # No algorithm can do better where the component is not unique, or is itself rounding error.
    negligible = float(solution.s[0]) <= _BACKWARD_LIMIT * solution.s_max
    clustered = certificate.gap is not None and certificate.gap < _CLUSTER_GAP
    return (clustered or negligible) and certificate.residual <= _BACKWARD_LIMIT
