"""Singular triplets against a full float64 SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import matrices
from support.marks import mostly_wide, wide
from support.triplets import certified, check_component, check_properties, check_values, component
from torch import Tensor

from milora_init.linalg import blocked_matrix, corrected_lanczos, filtered_subspace, lanczos, mixed_precision, svd
from milora_init.linalg.arithmetic import CPU, GPU, DeviceArithmetic
from milora_init.linalg.certificate import NotConverged
from milora_init.linalg.filtered_subspace import FilteredSpace
from milora_init.linalg.lanczos import RitzPairs
from milora_init.linalg.svd import singular_triplets, wanted_indices
from milora_init.methods import MODES, Mode

EPS = torch.finfo(torch.float64).eps
KRYLOV = replace(CPU, crossing="gpu")  # a Krylov space for smaller matrices than a CPU would take one for
FLOAT32_FIRST = replace(KRYLOV, mixed_entries=0)  # in float32 first for smaller matrices, too
ARITHMETIC = {"cpu": KRYLOV, "gpu": GPU}
SHAPES = [(64, 64), wide((65, 64)), (192, 64), (64, 192), wide((1600, 32))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", matrices.DISTINCT)
def test_distinct_singular_values_are_solved_to_the_certified_error(
    name: str, shape: tuple[int, int], mode: Mode
) -> None:
    W, r = matrices.DISTINCT[name](*shape), 8
    t = singular_triplets(W, r, mode=mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    check_component(W, t, r, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", matrices.AMBIGUOUS)
def test_equal_or_zero_singular_values_give_accurate_triplets(name: str, shape: tuple[int, int], mode: Mode) -> None:
    W, r = matrices.AMBIGUOUS[name](*shape), 8
    t = singular_triplets(W, r, mode=mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    # The component is not unique, so the test checks only that the triplets are accurate.
    assert t.certificate.residual <= 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("m", "n", "r"), [(1, 1, 1), (1, 7, 1), (7, 1, 1), (2, 3, 2), (9, 9, 8), (40, 30, 30)])
def test_tiny_matrices_and_full_ranks_are_solved(m: int, n: int, r: int, mode: Mode) -> None:
    W = matrices.gaussian(m, n)
    t = singular_triplets(W, r, mode=mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    if r == min(m, n):
        assert t.certificate.gap is None
        assert float((component(t) - W).norm()) <= 100 * EPS * float(W.norm())


@pytest.mark.parametrize(("mode", "expected"), [("min", [7, 8, 9]), ("max", [0, 1, 2]), ("mid", [3, 4, 5])], ids=str)
def test_each_mode_selects_its_indices(mode: Mode, expected: list[int]) -> None:
    assert wanted_indices(10, 3, mode, 0).tolist() == expected


def test_random_indices_are_sorted_distinct_and_set_by_the_seed() -> None:
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
def test_invalid_input_is_refused(W: Tensor, r: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        singular_triplets(W, r)


def test_signs_are_deterministic_and_the_input_is_unchanged() -> None:
    W = matrices.gaussian(50, 40).float()
    before = W.clone()
    a, b = singular_triplets(W, 5), singular_triplets(-W, 5)
    assert torch.equal(W, before)
    assert torch.allclose(a.V, b.V, atol=1e-10)
    assert torch.allclose(a.U, -b.U, atol=1e-10)


KRYLOV_NAMES = ["gaussian", "language_model_like", "steep", "power_law", "flat", "float16_near_overflow"]


@pytest.mark.parametrize("mode", ["min", wide("max")])
@pytest.mark.parametrize(
    ("name", "shape"), matrices.with_shapes(KRYLOV_NAMES, (600, 600), (560, 1700), (606, 600), (2600, 520)), ids=str
)
def test_the_krylov_solver_agrees_with_the_full_svd(name: str, shape: tuple[int, int], mode: Mode) -> None:
    W, r = matrices.DISTINCT[name](*shape), 12
    t = singular_triplets(W, r, mode=mode, arithmetic=KRYLOV)
    if name in ("language_model_like", "power_law"):
        assert t.certificate.path == ("mixed" if mode == "max" else "lanczos"), t.certificate.reason
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    check_component(W, t, r, mode)


@pytest.mark.parametrize(
    ("mode", "arithmetic"),
    [("min", KRYLOV), ("min", FLOAT32_FIRST), wide("max", KRYLOV)], ids=["min", "min-float32-first", "max"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["outlier", *mostly_wide(matrices.AMBIGUOUS, "clustered", "rank_deficient", "zero")])
def test_the_krylov_solver_handles_hard_spectra(name: str, mode: Mode, arithmetic: DeviceArithmetic) -> None:
    W, r = {**matrices.DISTINCT, **matrices.AMBIGUOUS}[name](600, 530), 10
    t = singular_triplets(W, r, mode=mode, arithmetic=arithmetic)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    assert t.certificate.residual <= 1e-9


def test_lanczos_without_convergence_falls_back_to_eigh(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrices.gaussian(600, 560)

    def fails(*_: object, **__: object) -> RitzPairs:
        raise NotConverged("no convergence")

    monkeypatch.setattr(svd, "largest_eigenpairs", fails)
    t = singular_triplets(W, 8)
    assert t.certificate.path == "eigh"
    assert "no convergence" in t.certificate.reason
    check_component(W, t, 8, "min")


@pytest.mark.parametrize("failing", [["eigh"], ["eigh", "svd"]], ids=str)
def test_a_lapack_failure_falls_back_or_is_a_clear_error(failing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise svd.LinAlgError("did not converge\nand more")

    W = matrices.gaussian(600, 560)
    for name in failing:
        monkeypatch.setattr(torch.linalg, name, fails)
    if "svd" in failing:
        with pytest.raises(ValueError, match="eigh failed: did not converge; svd failed: did not converge"):
            singular_triplets(W, 8)
        return
    t = singular_triplets(W, 8)
    assert t.certificate.path == "svd"
    assert t.certificate.reason == "did not converge; eigh failed: did not converge"
    check_component(W, t, 8, "min")


@pytest.mark.parametrize(
    ("name", "shape"),
    matrices.with_shapes(
        ["gaussian", "language_model_like", "subnormal", "huge"], (600, 600), (560, 1700), (1700, 560)
    ),
    ids=str,
)
def test_mixed_precision_works_with_the_arithmetic_of_a_cpu(name: str, shape: tuple[int, int]) -> None:
    W, r = matrices.DISTINCT[name](*shape), 12
    t = singular_triplets(W, r, arithmetic=replace(KRYLOV, mixed_precision="subspace"))
    assert t.certificate.path == "mixed", t.certificate.reason
    check_properties(W, t, r)
    check_values(W, t, r, "min")
    check_component(W, t, r, "min")


@pytest.mark.parametrize(
    ("name", "shape"),
    matrices.with_shapes(
        [*KRYLOV_NAMES, "subnormal", "huge"], (600, 600), (560, 1700), (1700, 560), (606, 600), (2600, 520)
    ),
    ids=str,
)
def test_the_smallest_triplets_are_found_in_float32_first(name: str, shape: tuple[int, int]) -> None:
    W, r = matrices.DISTINCT[name](*shape), 12
    t = singular_triplets(W, r, arithmetic=FLOAT32_FIRST)
    if name in ("gaussian", "language_model_like", "subnormal", "huge"):
        assert t.certificate.path == "mixed", t.certificate.reason
    check_properties(W, t, r)
    check_values(W, t, r, "min")
    check_component(W, t, r, "min")


@pytest.mark.parametrize("arithmetic", [replace(KRYLOV, mixed_precision="subspace"), GPU], ids=["cpu", "gpu"])
def test_mixed_precision_falls_back_if_the_probe_finds_a_missed_triplet(
    arithmetic: DeviceArithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corrections may converge to triplets that are not the smallest; only the probe detects this."""
    true_space = filtered_subspace.filtered_space
    W = matrices.gaussian(600, 560)
    inverse = float(torch.linalg.svdvals(W)[-8]) ** -2

    def with_missed_triplet(*args: Any, **kwargs: Any) -> FilteredSpace:
        return replace(true_space(*args, **kwargs), probe=1.5 * inverse * torch.eye(2).unsqueeze(0))

    monkeypatch.setattr(mixed_precision, "filtered_space", with_missed_triplet)
    t = singular_triplets(W, 8, arithmetic=arithmetic)
    assert t.certificate.path == "lanczos"
    assert "missed" in t.certificate.reason
    check_component(W, t, 8, "min")


@pytest.mark.parametrize("arithmetic", [replace(KRYLOV, mixed_precision="subspace"), FLOAT32_FIRST], ids=["s", "l"])
@pytest.mark.parametrize("error", [1e-5, 1e-1])
def test_mixed_precision_corrects_or_refuses_a_wrong_factor(
    error: float, arithmetic: DeviceArithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float32 inverse only guides the search. Even if it is wrong, the result is certified."""
    true_gram = blocked_matrix.gram_of_blocks

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        G = true_gram(*args, **kwargs)
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        diagonal.mul_(1 + error * torch.rand(diagonal.shape[-1], generator=torch.Generator().manual_seed(5)))
        return G

    W = matrices.gaussian(600, 560)
    for module in (mixed_precision, corrected_lanczos):
        monkeypatch.setattr(module, "gram_of_blocks", wrong)
    t = singular_triplets(W, 8, arithmetic=arithmetic)
    assert certified(t) <= 5e-8
    check_component(W, t, 8, "min")


@pytest.mark.parametrize(
    ("name", "shape"),
    matrices.with_shapes(
        ["gaussian", "language_model_like", "power_law", "subnormal", "huge"], (600, 560), (2600, 520), (520, 2600)
    ),
    ids=str,
)
def test_the_largest_triplets_are_found_in_float32_first(name: str, shape: tuple[int, int]) -> None:
    W, r = matrices.DISTINCT[name](*shape), 24
    t = singular_triplets(W, r, mode="max", arithmetic=KRYLOV)
    assert t.certificate.path == "mixed", t.certificate.reason
    check_properties(W, t, r)
    check_values(W, t, r, "max")
    check_component(W, t, r, "max")


@pytest.mark.parametrize("mode", ["min", "max"])
def test_corrected_triplets_fall_back_if_the_probe_finds_a_missed_one(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_pairs = lanczos.largest_eigenpairs

    def with_missed_triplet(*args: Any, **kwargs: Any) -> RitzPairs:
        pairs = true_pairs(*args, **kwargs)
        return replace(pairs, probe=1.5 * float(pairs.values[7]) * torch.eye(2))

    W = matrices.gaussian(600, 560)
    monkeypatch.setattr(corrected_lanczos, "largest_eigenpairs", with_missed_triplet)
    t = singular_triplets(W, 8, mode=mode, arithmetic=FLOAT32_FIRST)
    assert t.certificate.path == "lanczos"
    assert "missed" in t.certificate.reason
    check_component(W, t, 8, mode)


@pytest.mark.parametrize("error", [1e-5, 1e-2, 1.0])
def test_a_wrong_float32_product_only_misleads_the_search(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest triplets are corrected by residuals in float64, or by another algorithm."""
    true_operator = blocked_matrix.BlockedMatrix.float32_gram_operator

    def wrong(X: Any, columns: int) -> Callable[[Tensor], Tensor]:
        apply = true_operator(X, columns)
        factor = 1 + error * torch.rand(X.shape[1], 1, generator=torch.Generator().manual_seed(5))
        return lambda V: factor * apply(factor * V)

    W = matrices.language_model_like(600, 560)
    monkeypatch.setattr(blocked_matrix.BlockedMatrix, "float32_gram_operator", wrong)
    t = singular_triplets(W, 8, mode="max")
    assert certified(t) <= 5e-8
    if error == 1e-5:
        assert t.certificate.path == "mixed", t.certificate.reason
    check_component(W, t, 8, "max")


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1.0])
def test_a_wrong_basis_is_corrected_or_refused(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """A wrong basis is refined, or another algorithm is used."""

    def corrupted(*args: Any, **kwargs: Any) -> RitzPairs:
        pairs = lanczos.largest_eigenpairs(*args, **kwargs)
        wrong = pairs.vectors + noise * matrices.orthonormal(*pairs.vectors.shape)
        return replace(pairs, vectors=torch.linalg.qr(wrong).Q)

    W = matrices.gaussian(600, 560)
    monkeypatch.setattr(svd, "largest_eigenpairs", corrupted)
    t = singular_triplets(W, 8)
    if t.certificate.path == "lanczos":
        assert "refined" in t.certificate.reason
    else:
        assert "component error" in t.certificate.reason
    check_component(W, t, 8, "min")


@pytest.mark.parametrize("s_min", [1e-3, 1e-4])
def test_one_tiny_singular_value_causes_no_fallback(s_min: float) -> None:
    """The spectrum of the inverse Gram matrix then spans eight to ten orders of magnitude."""
    s = torch.cat([torch.linspace(30, 0.1, 599, dtype=torch.float64), torch.tensor([s_min], dtype=torch.float64)])
    W, r = matrices.with_spectrum(s, 600, 600), 32
    t = singular_triplets(W, r)
    assert t.certificate.path == "lanczos", t.certificate.reason
    check_properties(W, t, r)
    check_values(W, t, r, "min")
    check_component(W, t, r, "min")


def test_the_probe_finds_a_missed_triplet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triplets are exact but not the smallest. Every residual is small, so only the probe detects it."""
    monkeypatch.setattr(torch, "randn", _randn_without_last_coordinate(560))
    spectrum = torch.linspace(2.0, 1.0, 560, dtype=torch.float64)
    spectrum[-9:] = torch.linspace(0.3, 0.2, 9, dtype=torch.float64)
    W = torch.zeros(600, 560, dtype=torch.float64)
    W.diagonal().copy_(spectrum)
    t = singular_triplets(W, 8)
    assert t.certificate.path == "eigh"
    assert "missed" in t.certificate.reason
    check_component(W, t, 8, "min")


def _randn_without_last_coordinate(q: int) -> Callable[..., Tensor]:
    """torch.randn whose Krylov start block is zero in the last coordinate; the probe columns are unchanged."""
    true_randn = torch.randn

    def randn(*size: int, **options: Any) -> Tensor:
        out = true_randn(*size, **options)
        if out.shape[0] == q and out.shape[1] > lanczos.PROBE_COLUMNS:
            out[-1, : -lanczos.PROBE_COLUMNS] = 0
        return out

    return randn


@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    decades=st.floats(0, 14),
    rank=st.integers(0, 24),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_small_matrix_is_solved(
    m: int,
    n: int,
    seed: int,
    decades: float,
    rank: int,
    mode: Mode,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    q = min(m, n)
    s = torch.logspace(0, -decades, q, dtype=torch.float64)
    s[rank:] = 0
    W = matrices.with_spectrum(s, m, n, seed=seed).to(dtype)
    r = data.draw(st.integers(1, q))
    t = singular_triplets(W, r, mode=mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    if r == q:
        assert float((component(t) - W.double()).norm()) <= 1e-13 * q * max(float(W.double().norm()), 1e-300)


def test_a_looser_tolerance_is_met() -> None:
    W, r = matrices.language_model_like(900, 600), 12
    t = singular_triplets(W, r, mode="max", tolerance=1e-3)
    exact = singular_triplets(W, r, mode="max")
    assert certified(t) <= 1e-3
    assert float((component(t) - component(exact)).norm() / exact.s.norm()) <= 1e-3


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_several_row_blocks_give_the_result_of_one(arithmetic: str) -> None:
    W = matrices.language_model_like(700, 600)
    one_block: DeviceArithmetic = ARITHMETIC[arithmetic]
    whole = singular_triplets(W, 10, arithmetic=one_block)
    for X in (W, W.mT.contiguous().mT):
        t = singular_triplets(X, 10, arithmetic=replace(one_block, row_block_bytes=100 * 600 * 8))
        assert t.certificate.path == whole.certificate.path != "eigh"
        assert float((component(t) - component(whole)).norm() / whole.s.norm()) < 1e-8
