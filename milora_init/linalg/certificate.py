"""What is known about r computed singular triplets, measured against the weight itself.

The measure is the residual, which bounds the error of each singular value (Weyl) and, over the distance to
the nearest unwanted singular value, that of the space (Wedin).  Both are turned here into one figure for what
is used in the end, the component D = U diag(s) V^T.

Sources: P.-A. Wedin (1972), https://doi.org/10.1007/BF01932678.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.blocked_matrix import BlockedMatrix
from milora_init.linalg.cholesky import Operator

EPS = torch.finfo(torch.float64).eps
TINY = 1e-200  # against division by zero; X is scaled, so only a zero matrix has an s_max below 2^-17
BACKWARD_LIMIT = 1e-13  # the residual, relative to s_max, of a result that float64 cannot improve
CLUSTER_GAP = 1e-6  # below this gap the component is not unique, and the backward error is judged instead


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known about a result, measured against W in float64.

    gap is the distance from the wanted singular values to the nearest unwanted one, relative to the larger of
    the two; inf where nothing is unwanted (r = q).

    component_error estimates ||D - D_true||_F / ||D||_F for D = U diag(s) V^T.  To first order a triplet
    with residuals a = ||X v - s u|| and b = ||X^T u - s v|| leans on an unwanted triplet s_j by an angle of
    at most sqrt(a^2 + b^2) / |s_j - s|, and D moves by s times that; the r moves add in squares.
    Where the cut falls in a cluster (gap near 0) it is large or inf: the component is not unique, and what
    holds is the residual, by which D is exactly a component of a matrix that close to W.  ||D||_F is replaced
    by q * eps * s_max * sqrt(r) where D is below that, the resolution of float64.
    """

    path: str  # the algorithm: "lanczos", "eigh" or "svd"
    reason: str  # why that one
    residual: float  # max over the triplets of max(||X v - s u||, ||X^T u - s v||) / s_max
    orthogonality: float  # max(||U^T U - I||_max, ||V^T V - I||_max)
    gap: float
    component_error: float
    complete: str  # the evidence that no wanted triplet was missed


def certify(
    X: BlockedMatrix,
    left: Tensor,
    s: Tensor,
    right: Tensor,
    image: Tensor,
    nearby: tuple[Tensor, Tensor],
    s_max: float,
    path: str,
    reason: str,
    complete: str,
    inverse: Operator | None = None,
) -> Certificate:
    """Measure left (p, r), s (r,), right (q, r) against X; image is X right, nearby as from `gaps`.

    Where the inverse of X^T X is at hand and the wanted end is the smallest, it weighs the residual b.  Most
    of b is rounding error along the largest singular vectors, where it does no harm: the part along s_j moves
    D by s b_j sqrt(s_j^2 + s^2) / (s_j^2 - s^2), which is b_j / s_j times a factor that falls with s_j.
    """
    a = (image - left * s).norm(dim=0)
    lean_on = X.transposed_times(left) - right * s
    b = lean_on.norm(dim=0)
    nearest, distance = nearby
    identity = torch.eye(s.numel(), dtype=s.dtype, device=s.device)
    orthogonality = max(float((Q.mT @ Q - identity).abs().max()) for Q in (left, right))
    scale = max(s_max, TINY)
    larger = torch.maximum(s, nearest).clamp_min(TINY)
    lean = (s / distance.clamp_min(TINY)).clamp_min(1.0)
    moved_by_b = b * lean
    if inverse is not None:
        outside = lean_on - right @ (right.mT @ lean_on)
        weighed = (outside * inverse(outside)).sum(dim=0).clamp_min(0).sqrt()
        factor = nearest * torch.hypot(nearest, s) / (distance * (nearest + s)).clamp_min(TINY)
        moved_by_b = torch.minimum(moved_by_b, s * weighed * factor)
    moved = float(torch.hypot(a * lean, moved_by_b).norm())
    resolution = X.X.shape[1] * EPS * scale * math.sqrt(s.numel())
    return Certificate(
        path=path,
        reason=reason,
        residual=float(torch.maximum(a, b).max()) / scale,
        orthogonality=orthogonality,
        gap=float((distance / larger).min()),
        component_error=moved / max(float(s.norm()), resolution),
        complete=complete,
    )


def gaps(spectrum: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For each wanted value of a descending spectrum, the nearest unwanted one and the distance to it."""
    unwanted = torch.ones_like(spectrum, dtype=torch.bool)
    unwanted[wanted] = False
    others = spectrum[unwanted]
    s = spectrum[wanted]
    if others.numel() == 0:
        return s, torch.full_like(s, math.inf)
    nearest = (s.unsqueeze(1) - others).abs().min(dim=1)
    return others[nearest.indices], nearest.values


def is_good(s: Tensor, s_max: float, certificate: Certificate, tolerance: float) -> bool:
    """Whether a result with singular values s (r,) may be returned, or the next path must be tried."""
    negligible = float(s[0]) <= BACKWARD_LIMIT * s_max
    if not math.isfinite(certificate.residual) or certificate.orthogonality > 1e-10:
        return False
    if certificate.component_error <= tolerance:
        return True
    # No path can do better where the component is not unique, or is itself rounding error.
    return (certificate.gap < CLUSTER_GAP or negligible) and certificate.residual <= BACKWARD_LIMIT
