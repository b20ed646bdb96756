"""Which algorithms and block sizes a kind of device gets.

A CPU is fast on blocks that fit its cache and has a fast Householder QR. On a GPU each call costs some microseconds
whatever it computes, and QR and triangular solves of a thin block are bound by that latency: Cholesky-QR, an explicit
inverse and large blocks replace them by a few matrix products.

`arithmetic_of` chooses one of the two objects from the device, once a weight. Nothing else in this folder asks for the
device's kind, so every algorithm runs on every device: a test passes `GPU` along with a tensor on the CPU.

Source of the shifted Cholesky-QR: T. Fukaya et al. (2020), https://doi.org/10.1137/18M1218212.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from milora_init.linalg.cost import FLOAT32_ENTRIES
from milora_init.methods import Mode

PRODUCT_COLUMNS = 24  # MKL multiplies so many columns at a time: 72 columns take half the time of 64
_CHOLESKY_QR_SHIFT = 1e-14  # times the trace of a Gram matrix: above the rounding errors in it


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceArithmetic:
    """The choices for one kind of device.

    Attributes:
        qr: How a thin block is orthonormalised.
        inverse: How the inverse of a Cholesky factor is applied: "triangular", by two triangular solves; "explicit",
            by one product with the inverse of the whole matrix.
        crossing: Which rule of `cost.uses_krylov` decides between a Krylov space and all eigenvectors.
        row_block_bytes: Of the weight in float64, read at a time.
        float32_rows: Rows of the weight that are summed into a Gram matrix at a time in float32: fewer round less.
        gram_columns: A Gram matrix of more columns is computed by halves, to save the upper triangle.
        product_columns: A product's columns are padded to a multiple of this, which is faster.
        krylov_block: Columns of a block of a Krylov space in float64.
        float32_krylov_block: The same in float32.
        mixed_precision: How triplets are sought in float32 first: by "subspace" (`mixed_precision`), by "lanczos"
            (`corrected_lanczos`), or not.
        mixed_entries: With "lanczos", the smallest triplets are sought so in a weight of more entries than these.
        search_ties: Whether the entries that may be rounded wrong are searched for, or all are rounded with care.
        residual_block_bytes: Of the residual in float64, computed and rounded at a time.
    """

    qr: Literal["householder", "cholesky"]
    inverse: Literal["triangular", "explicit"]
    crossing: Literal["cpu", "gpu"]
    row_block_bytes: int
    float32_rows: int
    gram_columns: int
    product_columns: int
    krylov_block: int
    float32_krylov_block: int
    mixed_precision: Literal["subspace", "lanczos", "none"]
    mixed_entries: int
    search_ties: bool
    residual_block_bytes: int

    def float32_first(self, entries: int, mode: Mode) -> bool:
        """Whether the triplets of a weight with so many entries are sought in float32 before float64."""
        if self.mixed_precision == "lanczos":
            return mode == "max" or entries > self.mixed_entries
        return self.mixed_precision == "subspace"

    def orthonormalise(self, Y: Tensor, *, condition: float = math.inf) -> tuple[Tensor, Tensor]:
        """Q (..., q, b) with orthonormal columns and R (..., b, b) such that Y = Q R, for Y (..., q, b).

        Y is float64 or float32, one matrix or a batch.

        `condition` is a bound of Y's condition number, where one is known: Cholesky-QR then takes fewer passes. Where
        the columns of Y are dependent to working precision it may give NaN. It never waits for the host, so this is
        found only in what is computed from them.
        """
        if self.qr == "householder":
            Q, R = torch.linalg.qr(Y)
            return Q, R
        # In float64 for float32 too. Without a bound, the first pass adds a shift, with which it succeeds.
        passes = _passes(condition, Y.dtype)
        Q, R = Y.to(torch.float64), None
        for number in range(passes):
            L, failed = _gram_factor(Q, shifted=number == 0 and condition == math.inf)
            if number == passes - 1:
                L = torch.where(failed[..., None, None] == 0, L, torch.nan)
            Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
            R = L.mT if R is None else L.mT @ R
        assert R is not None
        return Q.to(Y.dtype), R.to(Y.dtype)

    def normalise(self, Y: Tensor) -> Tensor:
        """A well-conditioned basis of the columns of Y (..., q, b), for an iteration that does not need more.

        It is orthonormal where Y's condition is at most 1e6. Cholesky-QR then takes one pass.
        """
        if self.qr == "householder":
            Q: Tensor = torch.linalg.qr(Y).Q
            return Q
        Y64 = Y.to(torch.float64)
        L, _ = _gram_factor(Y64, shifted=True)
        Q = torch.linalg.solve_triangular(L.mT, Y64, upper=True, left=False).to(Y.dtype)
        return Q


def _gram_factor(Q: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of Q^T Q, and whether it failed; with a shift it succeeds for every finite Q but zero."""
    gram = Q.mT @ Q
    if shifted:
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(diagonal.sum(dim=-1, keepdim=True), alpha=_CHOLESKY_QR_SHIFT)
    L, failed = torch.linalg.cholesky_ex(gram)
    return L, failed


def _passes(condition: float, dtype: torch.dtype) -> int:
    """The passes after which the columns are orthonormal to the precision of dtype.

    One leaves an error of condition^2 * eps of float64; two are enough up to a condition of eps^-0.5, and so for all
    that float32 can hold.
    """
    if dtype == torch.float32:
        return 1 if condition <= 1e4 else 2
    return 1 if condition <= 10 else 2 if condition <= 1e7 else 3


CPU = DeviceArithmetic(
    qr="householder",
    inverse="triangular",
    crossing="cpu",
    row_block_bytes=8 << 20,  # twice as fast as blocks that leave the cache
    float32_rows=512,
    gram_columns=256,
    product_columns=PRODUCT_COLUMNS,
    krylov_block=24,  # MKL is fastest on multiples of 24
    float32_krylov_block=32,
    mixed_precision="lanczos",
    mixed_entries=FLOAT32_ENTRIES,
    search_ties=True,
    residual_block_bytes=2 << 20,
)
GPU = DeviceArithmetic(
    qr="cholesky",
    inverse="explicit",
    crossing="gpu",
    row_block_bytes=512 << 20,
    float32_rows=1 << 20,
    gram_columns=1024,
    product_columns=1,
    krylov_block=24,
    float32_krylov_block=96,
    mixed_precision="subspace",
    mixed_entries=0,
    search_ties=False,
    residual_block_bytes=512 << 20,
)


def arithmetic_of(device: torch.device) -> DeviceArithmetic:
    """The arithmetic for tensors on `device`."""
    return GPU if device.type == "cuda" else CPU


def plus_product(C: Tensor, A: Tensor, B: Tensor, factor: float = 1.0) -> Tensor:
    """C + factor * A B, for matrices or for batches of them."""
    add = torch.addmm if C.ndim == 2 else torch.baddbmm
    out: Tensor = add(C, A, B, alpha=factor)
    return out


def add_product(C: Tensor, A: Tensor, B: Tensor, factor: float = 1.0) -> Tensor:
    """The same in the memory of C."""
    return C.addmm_(A, B, alpha=factor) if C.ndim == 2 else C.baddbmm_(A, B, alpha=factor)


def read_together(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the host, in the widest of their dtypes: copied at once, as each copy waits for the device."""
    on_host = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = torch.split(on_host, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
