"""Define what is measured for every split weight: the accuracy of its singular triplets, and the loss by rounding.

The solver (`linalg`) computes these values, and `milora_init.json` stores them. This file imports no torch, so that a
report can be printed without loading torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SolverPath = Literal["mixed", "lanczos", "eigh", "svd"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """How accurate the singular triplets of a weight are, measured against W in float64. All values are JSON values.

    Attributes:
        path: The algorithm: "mixed", "lanczos", "eigh" or "svd".
        reason: Why this algorithm was chosen.
        residual: The maximum over the triplets of max(||X v - s u||, ||X^T u - s v||), divided by s_max.
        orthogonality: max(||U^T U - I||_max, ||V^T V - I||_max).
        gap: The distance from the wanted singular values to the nearest unwanted one, divided by the larger of the
            two. None if all triplets are wanted (r = q).
        component_error: Estimate of ||D - D_true||_F / ||D||_F for D = U diag(s) V^T. A triplet with residuals of norms
            a = ||X v - s u|| and b = ||X^T u - s v|| is rotated towards an unwanted triplet s_j. To first order the
            angle is at most sqrt(a^2 + b^2) / |s_j - s|, and D changes by s times the angle. The squares of the r
            changes add. If the cut is inside a cluster (gap near 0), the estimate is large, or None for infinite: then
            the component is not unique. D is still exactly a component of a matrix near W, and `residual` says how
            near. If ||D||_F is below q * eps * s_max * sqrt(r), the resolution of float64, the
            estimate is divided by that limit and not by ||D||_F.
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
    """What is lost by rounding the residual to its dtype. All values are JSON values.

    D = scale * B @ A is the component. E = W - (stored residual + D) is the error of the pair. Norms are Frobenius
    norms.

    Attributes:
        component: ||D|| / ||W||; 0 if the weight is zero.
        error: ||E|| / ||W||, the relative error of the pair.
        leak: ||E|| / ||D||, how much of the component, or of its opposite, stays in the base. 0 if D is zero.
        leak_if: The leak by dtype, if the residual were rounded to `bfloat16`, `float16` or `float32`. It is measured
            on an eighth of the rows. None if the residual overflows in this dtype. `nf4` is the leak if bitsandbytes
            quantised the residual to 4 bits (QLoRA), measured on the first rows.
    """

    component: float
    error: float
    leak: float
    leak_if: dict[str, float | None]
