"""Householder QR and Cholesky-QR on blocks that are hard for Cholesky-QR."""

from __future__ import annotations

import pytest
import torch
from support import matrices

from milora_init.linalg.arithmetic import CPU, GPU, DeviceArithmetic


@pytest.mark.parametrize("decades", [0, 4, 6, 12, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arithmetic", [CPU, GPU], ids=["householder", "cholesky"])
def test_a_block_of_any_condition_becomes_orthonormal(
    arithmetic: DeviceArithmetic, dtype: torch.dtype, decades: int
) -> None:
    """Cholesky-QR applied twice fails in float64 for condition numbers above 1e8."""
    eps = torch.finfo(dtype).eps
    Y = matrices.with_spectrum(torch.logspace(0, -decades, 24), 700, 24).to(dtype)
    Q, R = arithmetic.orthonormalise(Y)
    assert Q.dtype == R.dtype == dtype
    assert float((Q.mT @ Q - torch.eye(24, dtype=dtype)).abs().max()) <= 100 * eps
    assert float((Q.double() @ R.double() - Y.double()).norm()) <= 100 * eps * float(Y.double().norm())
    assert not R.tril(-1).any()


@pytest.mark.parametrize("arithmetic", [CPU, GPU], ids=["householder", "cholesky"])
def test_a_zero_block_gives_an_orthonormal_block_or_nan(arithmetic: DeviceArithmetic) -> None:
    """Never a finite block that is not orthonormal; Householder QR always gives an orthonormal one."""
    Y = torch.zeros(300, 8, dtype=torch.float64)
    Q, _ = arithmetic.orthonormalise(Y)
    if arithmetic is GPU and not bool(Q.isfinite().all()):
        assert bool(Q.isnan().any())
    else:
        assert float((Q.mT @ Q - torch.eye(8, dtype=torch.float64)).abs().max()) <= 1e-13
