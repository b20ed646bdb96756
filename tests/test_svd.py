"""Singular triplets against a full float64 SVD."""

from __future__ import annotations

import math
from typing import get_args

import matrices
import pytest
import torch
from torch import Tensor

from milora_init.svd import Mode, Triplets, singular_triplets, wanted_indices

EPS = torch.finfo(torch.float64).eps
MODES: tuple[Mode, ...] = get_args(Mode)
SHAPES = [(64, 64), (65, 64), (192, 64), (64, 192), (1600, 32)]


def component(t: Triplets) -> Tensor:
    return (t.U * t.s) @ t.V.mT


def check_properties(W: Tensor, t: Triplets, r: int) -> None:
    """What holds for every matrix, however hard."""
    m, n = W.shape
    q = min(m, n)
    assert (t.U.shape, t.s.shape, t.V.shape) == ((m, r), (r,), (n, r))
    assert t.U.dtype == t.s.dtype == t.V.dtype == torch.float64
    assert bool((t.s[:-1] >= t.s[1:]).all())
    assert bool((t.s >= 0).all())
    eye = torch.eye(r, dtype=torch.float64)
    assert float((t.U.mT @ t.U - eye).abs().max()) < 10 * q * EPS
    assert float((t.V.mT @ t.V - eye).abs().max()) < 10 * q * EPS
    scale = float(W.double().abs().max()) or 1.0
    X, s, s_max = W.double() / scale, t.s / scale, t.s_max / scale
    residual = max(
        float((X @ t.V - t.U * s).norm(dim=0).max()),
        float((X.mT @ t.U - t.V * s).norm(dim=0).max()),
    )
    assert residual <= t.certificate.residual * s_max * 1.5 + q * EPS * s_max
    top = t.V.abs().max(dim=0)
    assert bool((t.V.gather(0, top.indices.unsqueeze(0)) > -2e-6).all())
    assert math.isfinite(t.certificate.residual)
    assert not math.isnan(t.certificate.component_error)


def check_values(W: Tensor, t: Triplets, r: int, mode: Mode) -> None:
    """s against the truth: to the accuracy that the residual promises (Weyl), and never a wrong index."""
    truth = torch.linalg.svdvals(W.double())
    wanted = truth[wanted_indices(truth.numel(), r, mode, 0)]
    q = truth.numel()
    assert float((t.s - wanted).abs().max()) <= (10 * q * EPS + 2 * t.certificate.residual) * float(truth[0])
    assert t.s_max == pytest.approx(float(truth[0]), rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", matrices.DISTINCT)
def test_distinct_spectrum(name: str, shape: tuple[int, int], mode: Mode) -> None:
    W, r = matrices.DISTINCT[name](*shape), 8
    t = singular_triplets(W, r, mode=mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    scale = float(W.double().abs().max())
    U, s, Vh = torch.linalg.svd(W.double() / scale, full_matrices=False)
    wanted = wanted_indices(s.numel(), r, mode, 0)
    truth = (U[:, wanted] * s[wanted]) @ Vh[wanted]
    error = float((component(t) / scale - truth).norm() / truth.norm())
    # The reference has an error of its own, q * eps * s_max in each vector over its gap.
    others = torch.tensor([x for i, x in enumerate(s.tolist()) if i not in wanted.tolist()], dtype=s.dtype)
    lean = (s[wanted] / (s[wanted].unsqueeze(1) - others).abs().amin(dim=1)).clamp_min(1).norm()
    reference = s.numel() * EPS * float(s[0] * lean / truth.norm())
    assert error <= 2 * t.certificate.component_error + reference
    assert error <= max(1e-7, reference)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", matrices.AMBIGUOUS)
def test_ambiguous_spectrum(name: str, shape: tuple[int, int], mode: Mode) -> None:
    W, r = matrices.AMBIGUOUS[name](*shape), 8
    t = singular_triplets(W, r, mode=mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    # The component is not unique, so it is judged by what defines it: exact triplets of W.
    assert t.certificate.residual <= 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("m", "n", "r"), [(1, 1, 1), (1, 7, 1), (7, 1, 1), (2, 3, 2), (9, 9, 8), (40, 30, 30)])
def test_tiny_and_full(m: int, n: int, r: int, mode: Mode) -> None:
    W = matrices.gaussian(m, n)
    t = singular_triplets(W, r, mode=mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    if r == min(m, n):
        assert t.certificate.gap == math.inf
        assert float((component(t) - W).norm()) <= 100 * EPS * float(W.norm())


@pytest.mark.parametrize(("mode", "expected"), [("min", [7, 8, 9]), ("max", [0, 1, 2]), ("mid", [3, 4, 5])], ids=str)
def test_wanted_indices(mode: Mode, expected: list[int]) -> None:
    assert wanted_indices(10, 3, mode, 0).tolist() == expected


def test_random_indices() -> None:
    a, b = wanted_indices(100, 10, "random", 1), wanted_indices(100, 10, "random", 2)
    assert a.tolist() == sorted(set(a.tolist()))
    assert a.tolist() != b.tolist()
    assert a.tolist() == wanted_indices(100, 10, "random", 1).tolist()


@pytest.mark.parametrize(
    ("W", "r", "message"),
    [
        (torch.zeros(3), 1, "matrix"),
        (torch.zeros(3, 3, dtype=torch.int32), 1, "floating"),
        (torch.zeros(3, 2), 0, "1 to 2"),
        (torch.zeros(3, 2), 3, "1 to 2"),
        (torch.zeros(0, 2), 1, "1 to 0"),
        (torch.tensor([[1.0, math.nan]]), 1, "NaN"),
        (torch.tensor([[1.0, -math.inf]]), 1, "Inf"),
    ],
)
def test_refuses(W: Tensor, r: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        singular_triplets(W, r)


def test_sign_and_input_are_stable() -> None:
    W = matrices.gaussian(50, 40).float()
    before = W.clone()
    a, b = singular_triplets(W, 5), singular_triplets(-W, 5)
    assert torch.equal(W, before)
    assert torch.allclose(a.V, b.V, atol=1e-10)
    assert torch.allclose(a.U, -b.U, atol=1e-10)
