"""The filtered subspace contains the wanted eigenvectors, whatever the spread of the eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from support import matrices
from torch import Tensor

from milora_init.linalg.arithmetic import CPU, GPU, DeviceArithmetic
from milora_init.linalg.certificate import NotConverged
from milora_init.linalg.filtered_subspace import filtered_space

HOST = torch.device("cpu")


@pytest.mark.parametrize("arithmetic", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("spread", [2.0, 1e2, 1e4, 1e5])
def test_the_space_contains_the_largest_eigenvectors(spread: float, arithmetic: DeviceArithmetic) -> None:
    q, r = 600, 12
    # The wanted eigenvalues from `spread` to 1, all others from 0.7 down.
    eigenvalues = torch.cat([torch.logspace(math.log10(spread), 0, r), torch.linspace(0.7, 0.01, q - r)]).double()
    vectors = matrices.orthonormal(q, q)
    A = ((vectors * eigenvalues) @ vectors.mT).float()
    space = filtered_space(lambda B: A @ B, q, r, arithmetic=arithmetic, device=HOST)
    V = space.vectors
    assert V.dtype == torch.float64
    assert float((V.mT @ V - torch.eye(V.shape[1], dtype=V.dtype)).abs().max()) < 1e-12
    wanted = vectors[:, :r]
    # The operator itself is rounded to float32, relative to its largest eigenvalue.
    assert float((wanted - V @ (V.mT @ wanted)).norm()) < 1e-3 + 1e-6 * spread
    assert float(torch.linalg.matrix_norm(space.probe.double(), ord=2)) < 1


def test_an_operator_that_is_not_finite_is_refused() -> None:
    def broken(B: Tensor) -> Tensor:
        return B * math.nan

    with pytest.raises(NotConverged, match="not finite"):
        filtered_space(broken, 600, 12, arithmetic=GPU, device=HOST)
