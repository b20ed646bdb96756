"""All singular values against float64 svdvals, and the estimated leak against the one that `split` measures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import matrices
from support.marks import wide
from torch import Tensor

from milora_init.linalg import spectrum
from milora_init.linalg.arithmetic import CPU, GPU, DeviceArithmetic
from milora_init.linalg.spectrum import effective_rank, energy, estimated_leaks, gap, singular_values, stable_rank
from milora_init.linalg.split import split
from milora_init.linalg.svd import krylov_triplets

EPS = torch.finfo(torch.float64).eps
RELATIVE = 1e-8
HARD = {**matrices.DISTINCT, **matrices.AMBIGUOUS}


def truth(W: Tensor) -> Tensor:
    s: Tensor = torch.linalg.svdvals(W.to(torch.float64))
    return s


def check_values(W: Tensor, arithmetic: DeviceArithmetic | None = None) -> Tensor:
    """The values are those of svdvals, to RELATIVE and to the resolution of a backward stable float64 SVD."""
    s, expected = singular_values(W, arithmetic=arithmetic), truth(W)
    assert s.dtype == torch.float64
    assert s.shape == expected.shape
    assert bool((s.diff() <= 0).all())
    resolution = max(W.shape) * EPS * float(expected[0])
    assert bool(((s - expected).abs() <= RELATIVE * expected + resolution).all())
    return s


@pytest.mark.parametrize("shape", [(96, 96), (64, 200), (200, 64)], ids=str)
@pytest.mark.parametrize("name", HARD)
def test_the_values_of_hard_spectra_are_those_of_a_float64_svd(name: str, shape: tuple[int, int]) -> None:
    check_values(HARD[name](*shape))


@pytest.mark.parametrize("arithmetic", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("decades", [3, wide(4), wide(6), 7])
def test_a_few_tiny_values_come_from_a_krylov_space(
    decades: int, arithmetic: DeviceArithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q is large enough for a Krylov space. The small end is computed again whatever its depth."""
    q = 520
    s = torch.linspace(1.0, 0.2, q, dtype=torch.float64)
    s[-6:] = 10.0 ** -torch.linspace(decades - 1, decades, 6, dtype=torch.float64)
    W = matrices.with_spectrum(s, q, q)
    called = []

    def counted(*args: Any) -> Any:
        called.append(args)
        return krylov_triplets(*args)

    monkeypatch.setattr(spectrum, "krylov_triplets", counted)
    check_values(W, arithmetic)
    assert bool(called) == (decades > 3)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_tiny_weights_have_values(m: int, n: int) -> None:
    check_values(matrices.gaussian(m, n))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_entries_that_are_not_finite_are_refused(value: float) -> None:
    W = matrices.gaussian(8, 8)
    W[3, 2] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        singular_values(W)


def test_where_lapack_does_not_converge_the_other_algorithm_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    W = matrices.gaussian(40, 30)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    check_values(W)
    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    with pytest.raises(ValueError, match="no algorithm converges"):
        singular_values(W)


def test_the_figures_are_those_of_their_definitions() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert stable_rank(s) == 22 / 16
    assert energy(s, slice(2, 4)) == 2 / 22
    assert energy(s, slice(1)) == 16 / 22
    assert (gap(s, 2), gap(s, 3), gap(s, 0), gap(s, 4)) == (0.5, 0.0, None, None)
    share = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
    assert effective_rank(s) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-14)
    equal = torch.ones(7, dtype=torch.float64)
    assert effective_rank(equal) == pytest.approx(7, rel=1e-14)
    assert stable_rank(equal) == 7


def test_a_zero_matrix_has_figures() -> None:
    s = singular_values(torch.zeros(6, 4))
    assert s.tolist() == [0.0] * 4
    assert (stable_rank(s), effective_rank(s), energy(s, slice(2)), gap(s, 2)) == (0.0, 0.0, 0.0, 0.0)
    assert estimated_leaks(torch.zeros(6, 4), [0.0], 0) == [dict.fromkeys(spectrum.CANDIDATES, 0.0)]


@pytest.mark.parametrize("m", [256, 700])
def test_the_estimated_leak_is_near_the_measured_one(m: int) -> None:
    """Within a tenth below a leak of 0.2, where roundings are like noise; within a half where they swallow entries."""
    W, r = matrices.language_model_like(m, 256).to(torch.bfloat16), 16
    s = truth(W)
    (estimate,) = estimated_leaks(W, [float(s[-r:].norm())], 0)
    measured_leaks = split(W, r, dtype=torch.bfloat16).rounding.leak_if
    assert estimate.keys() >= {"bfloat16", "float16"}
    for name in estimate:
        measured = measured_leaks[name]
        assert measured is not None
        assert estimate[name] == pytest.approx(measured, rel=0.1 if measured < 0.2 else 0.5), name


def test_a_residual_that_overflows_has_no_leak() -> None:
    W = torch.full((4, 4), 1e30)
    (estimate,) = estimated_leaks(W, [1.0], 0)
    assert estimate["float16"] is None
    assert estimate["float32"] is not None
