"""Which algorithms and block sizes a kind of device gets.

A CPU is fast on blocks that fit its cache and has a fast Householder QR. On a GPU each call costs some microseconds
whatever it computes, and QR and triangular solves of a thin block are bound by that latency: Cholesky-QR, an explicit
inverse and large blocks replace them by a few matrix products.

`arithmetic_of` chooses one of the two objects from the device, once a weight. Nothing else in this folder asks for the
device's kind, so every algorithm runs on every device: a test passes `GPU` along with a tensor on the CPU.

Source of the shifted Cholesky-QR: T. Fukaya et al. (2020), https://doi.org/10.1137/18M1218212.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_SHIFT = 1e-14  # times the trace of a Gram matrix: above the rounding errors in it


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
        """Q (q, b) with orthonormal columns and R (b, b) such that Y = Q R, for Y (q, b), float64 or float32.

        Where the columns of Y are dependent to working precision, Cholesky-QR may give NaN. It never waits for the
        host, so this is found only in what is computed from them.
        """
        if self.qr == "householder":
            Q, upper = torch.linalg.qr(Y)
            return Q, upper
        # In float64 for float32 too: two passes are then enough for every block that is independent in float32. For a
        # float64 block the first of three passes adds a shift, with which it succeeds.
        Q = Y.to(torch.float64)
        passes = 2 if Y.dtype == torch.float32 else 3
        R: Tensor | None = None
        for number in range(passes):
            gram = Q.mT @ Q
            if number == 0:
                gram.diagonal().add_(gram.diagonal().sum(), alpha=_SHIFT)
            L, failed = torch.linalg.cholesky_ex(gram)
            if number == passes - 1:
                L = torch.where(failed == 0, L, torch.nan)
            Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
            R = L.mT if R is None else L.mT @ R
        assert R is not None
        return Q.to(Y.dtype), R.to(Y.dtype)


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
