"""Which algorithms and block sizes a kind of device gets.

A CPU is fast on blocks that fit its cache and has a fast Householder QR. On a GPU each call costs some microseconds
whatever it computes, and QR and triangular solves of a thin block are bound by that latency: Cholesky-QR, an explicit
inverse and large blocks replace them by a few matrix products.

`arithmetic_of` chooses one of the two objects from the device, once a weight. Nothing else in this folder asks for the
device's kind, so every algorithm runs on every device: a test passes `GPU` along with a tensor on the CPU.

Source of Cholesky-QR, done twice: Y. Yamamoto et al. (2015),
https://etna.math.kent.edu/volumes/2011-2020/vol44/abstract.php?vol=44&pages=306-326.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceArithmetic:
    """The choices for one kind of device.

    Attributes:
        qr: How a thin block is orthonormalised.
        inverse: How the inverse of a Cholesky factor is applied: "blocks", by products with the inverses of its
            diagonal blocks; "explicit", by one product with the inverse of the whole matrix.
        row_block_bytes: Of the weight in float64, read at a time.
        gram_columns: A Gram matrix of more columns is computed by halves, to save the upper triangle.
        residual_block_bytes: Of the residual in float64, computed and rounded at a time.
    """

    qr: Literal["householder", "cholesky"]
    inverse: Literal["blocks", "explicit"]
    row_block_bytes: int
    gram_columns: int
    residual_block_bytes: int

    def orthonormalise(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Q (q, b) with orthonormal columns and R (b, b) such that Y = Q R, for Y (q, b).

        By Cholesky-QR both are NaN where the columns of Y are linearly dependent.
        """
        if self.qr == "householder":
            Q, R = torch.linalg.qr(Y)
            return Q, R
        total = torch.eye(Y.shape[1], dtype=Y.dtype, device=Y.device)
        for _ in range(2):
            factor, failed = torch.linalg.cholesky_ex(Y.mT @ Y)
            factor = torch.where(failed == 0, factor, torch.nan)
            Y = torch.linalg.solve_triangular(factor.mT, Y, upper=True, left=False)
            total = factor.mT @ total
        return Y, total


CPU = DeviceArithmetic(
    qr="householder",
    inverse="blocks",
    row_block_bytes=8 << 20,  # twice as fast as blocks that leave the cache
    gram_columns=256,
    residual_block_bytes=2 << 20,
)
GPU = DeviceArithmetic(
    qr="cholesky",
    inverse="explicit",
    row_block_bytes=8 << 20,
    gram_columns=256,
    residual_block_bytes=128 << 20,
)


def arithmetic_of(device: torch.device) -> DeviceArithmetic:
    """The arithmetic for tensors on `device`."""
    return GPU if device.type == "cuda" else CPU
