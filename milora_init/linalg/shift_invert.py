"""The shift of shift-and-invert: the smallest eigenvalues of X^T X are the largest of (X^T X - shift I)^-1.

The nearer the shift is to the smallest eigenvalue, the fewer Krylov steps are needed. svd.py iterates with the factor
of this file in float64. mixed_precision.py and corrected_lanczos.py place shifts of their own in float32, by the same
rules, and take the largest directions out of X first: mixed_precision.py where the spectrum reaches down to zero,
corrected_lanczos.py always. Else the rounding of the large entries of X^T X would hide its small eigenvalues.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milora_init.linalg.blocked_matrix import BlockedMatrix
from milora_init.linalg.certificate import NotConverged
from milora_init.linalg.cholesky import CholeskyFactor, cholesky
from milora_init.linalg.lanczos import krylov_projection, largest_eigenvalues, round_down

SHIFT_BLOCK = 48  # columns, to estimate the smallest eigenvalue in a few steps
SHIFT = 0.95  # of the smallest eigenvalue
_EPS32 = torch.finfo(torch.float32).eps
_NOISE = 0.1  # of eps * ||G||: four times and more what was measured on the eigenvectors of the smallest eigenvalues
# The rounding error of an eigenvalue of a float32 Gram matrix, as a part of the Frobenius norm of its lower triangle.
GRAM_NOISE = _NOISE * _EPS32 * math.sqrt(2)


def ends_above_zero(X: BlockedMatrix) -> bool:
    """Whether X is so clearly rectangular that its spectrum does not reach down to zero."""
    p, q = X.shape
    return 2 * p >= 3 * q


def shifted_factor(X: BlockedMatrix, gram: Tensor | None = None) -> tuple[CholeskyFactor, float]:
    """The Cholesky factor of X^T X - shift I, and the shift.

    The spectrum of a clearly rectangular matrix does not reach down to zero, and a shift just below its smallest
    eigenvalue saves a third of the Krylov steps. A float32 estimate of that eigenvalue is enough: if the shifted matrix
    has a Cholesky factor, the shift is below the spectrum.

    Raises:
        NotConverged: X^T X is not positive definite.
    """
    q, arithmetic = X.shape[1], X.arithmetic
    G = X.gram() if gram is None else gram
    if ends_above_zero(X):
        estimate = cholesky(G.to(torch.float32), arithmetic)
        if estimate is not None:
            (largest,) = largest_eigenvalues(
                krylov_projection(estimate.solve, q, block=SHIFT_BLOCK, arithmetic=arithmetic, device=G.device)
            )
            inverse = float(largest)
            shift = round_down(SHIFT / inverse) if inverse > 0 else 0.0
            del estimate
            if shift > 0:
                G.diagonal().sub_(shift)
                factor = cholesky(G, arithmetic)
                if factor is not None:
                    return factor, shift
                G = X.gram()  # the attempt overwrote it
    factor = cholesky(G, arithmetic)
    if factor is None:
        raise NotConverged("the Gram matrix is not positive definite")
    return factor, 0.0
