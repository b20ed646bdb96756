"""The singular values of a low-rank product, and the product cut to its largest directions.

For B (m, q) and A (q, n) with small q the matrix B @ A is never formed: with B = Q_B R_B and A^T = Q_A R_A, the SVD of
the core R_B @ R_A^T (q, q) gives that of the product. All of it is in float64, because the factors of an update can
cancel: [B, -B0] @ [A; A0] of an adapter that was hardly trained is much smaller than its factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProductSvd:
    """B @ A = left @ diag(s) @ right.

    Attributes:
        left: (m, q), orthonormal columns.
        s: (q,), descending.
        right: (q, n), orthonormal rows.
        resolution: A product of this Frobenius norm or less is zero within the accuracy of float32 factors.
    """

    left: Tensor
    s: Tensor
    right: Tensor
    resolution: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the product; 0 below its resolution."""
        norm = float(self.s.norm())
        return norm if norm > self.resolution else 0.0

    def lost(self, rank: int) -> float:
        """The relative Frobenius norm of what a cut to `rank` directions removes."""
        return float(self.s[rank:].norm()) / self.norm if self.norm else 0.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank, 1 or more, that keeps this share of the squared Frobenius norm."""
        if not self.norm:
            return 1
        kept = self.s.square().cumsum(0) / self.s.square().sum()
        # The last sums may be 1 - eps, although every direction is in them.
        return min(int((kept < energy * (1 - 1e-12)).sum()) + 1, len(self.s))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (m, rank) and A (rank, n): the nearest product of this rank, with balanced factors."""
        root = self.s[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def product_svd(B: Tensor, A: Tensor) -> ProductSvd:
    """The SVD of B (m, q) @ A (q, n), in float64."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, s, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    resolution = torch.finfo(torch.float32).eps * float(R_B.norm() * R_A.norm())
    return ProductSvd(Q_B @ U, s, Vh @ Q_A.mT, resolution)
