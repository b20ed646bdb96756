"""What is measured of every split weight: how exact its singular triplets are, and what rounding costs.

The solver (`linalg`) fills these values in, and `milora_init.json` stores them. This file imports no torch, so that a
report can be printed without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SolverPath = Literal["mixed", "lanczos", "eigh", "svd"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known about a solution, measured against W in float64. Plain values, as JSON has them.

    Attributes:
        path: The algorithm: "mixed", "lanczos", "eigh" or "svd".
        reason: Why this one.
        residual: The maximum over the triplets of max(||X v - s u||, ||X^T u - s v||), divided by s_max.
        orthogonality: max(||U^T U - I||_max, ||V^T V - I||_max).
        gap: The distance from the wanted singular values to the nearest unwanted one, divided by the larger of the
            two. None where nothing is unwanted (r = q).
        component_error: Estimate of ||D - D_true||_F / ||D||_F for D = U diag(s) V^T. To first order a triplet with
            residuals of norms a = ||X v - s u|| and b = ||X^T u - s v|| is turned towards an unwanted triplet s_j by an
            angle of at most sqrt(a^2 + b^2) / |s_j - s|, and D changes by s times that; the r changes add in squares.
            Where the cut falls in a cluster (gap near 0) it is large, or None for infinite: the component is not
            unique, and the residual says how close to W the matrix is of which D is exactly a component. Where ||D||_F
            is below q * eps * s_max * sqrt(r), the resolution of float64, that takes its place.
        complete: The evidence that no wanted triplet was missed.
    """

    path: SolverPath
    reason: str
    residual: float
    orthogonality: float
    gap: float | None
    component_error: float | None
    complete: str


@dataclass(frozen=True, slots=True)
class Rounding:
    """What the dtype of the residual costs. D = scale * B @ A, E = W - (stored residual + D). Plain values.

    Attributes:
        component: ||D|| / ||W||, Frobenius norms here and below. 0 for a zero weight.
        error: ||E|| / ||W||, how far the pair is from the weight.
        leak: ||E|| / ||D||, how much of the component stays in the base, or of its opposite. 0 where D is zero.
        leak_if: The leak that `bfloat16`, `float16` and `float32` would have, measured on an eighth of the rows; None
            where the residual overflows.
    """

    component: float
    error: float
    leak: float
    leak_if: dict[str, float | None]
