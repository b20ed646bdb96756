"""split: factors and residual against the paper's method in float64. Every tolerance follows from an eps."""

from __future__ import annotations

import pytest
import torch
from support import reference
from torch import Tensor

from milora_init.linalg.split import Rounding, Split, split
from milora_init.methods import MODES, Mode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}


def weight(m: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(made: Split, scale: float) -> Tensor:
    """scale * B @ A of the stored factors, in float64."""
    return scale * (made.B.double() @ made.A.double())


def true_spectrum(W: Tensor, D: Tensor, r: int, mode: Mode) -> tuple[reference.Spectrum, list[int]]:
    truth = reference.spectrum(W)
    return truth, reference.drawn(truth, D, r) if mode == "random" else reference.wanted(len(truth.s), r, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", DTYPES)
def test_the_product_is_the_component_that_the_mode_names(mode: Mode, shape: str, source: str) -> None:
    W, r = weight(*SHAPES[shape], DTYPES[source]), 5
    made = split(W, r, mode=mode, dtype=torch.float32)
    D = product(made, 1.0)
    truth, indices = true_spectrum(W, D, r, mode)
    assert (D - truth.component(indices)).norm() <= truth.tolerance(indices)
    assert torch.allclose(made.triplets.s, truth.s[indices], rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25, 16 / 5**0.5])
def test_the_scale_changes_the_factors_and_not_the_component(mode: Mode, scale: float) -> None:
    W, r = weight(24, 40), 5
    made = split(W, r, mode=mode, scale=scale, dtype=torch.float32)
    D = product(made, scale)
    truth, indices = true_spectrum(W, D, r, mode)
    assert (D - truth.component(indices)).norm() <= truth.tolerance(indices)


@pytest.mark.parametrize("scale", [1.0, 2.0, 16 / 5**0.5])
def test_each_factor_carries_the_square_root_of_the_spectrum(scale: float) -> None:
    """B^T B = A A^T = diag(s / scale): orthogonal directions with norms sqrt(s / scale)."""
    W, r = weight(24, 40), 5
    made = split(W, r, scale=scale, dtype=torch.float32)
    expected = torch.diag(reference.spectrum(W).s[-r:] / scale)
    # Float32 rounding changes each entry of a Gram matrix by at most eps times the product of the two norms.
    tolerance = 2 * reference.EPS32 * expected.max()
    assert (made.B.double().T @ made.B.double() - expected).abs().max() <= tolerance
    assert (made.A.double() @ made.A.double().T - expected).abs().max() <= tolerance
    assert (made.B.dtype, made.A.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_and_pair_agree_to_half_a_unit_in_the_last_place(mode: Mode, dtype: str, shape: str) -> None:
    W = weight(*SHAPES[shape])
    made = split(W, 5, mode=mode, scale=0.5, dtype=DTYPES[dtype])
    exact = W.double() - product(made, 0.5)
    # The float64 product in the test may sum in another order.
    noise = 8 * reference.EPS64 * W.abs().max()
    off = (exact - made.residual.double()).abs()
    assert made.residual.dtype == DTYPES[dtype]
    assert (off <= reference.ulp(exact, DTYPES[dtype]) / 2 + noise).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_rounded_once(dtype: str) -> None:
    """Rounding through float32 would round a value near the midpoint of two neighbours to the wrong one."""
    info = torch.finfo(DTYPES[dtype])
    W = torch.ones(8, 8, dtype=torch.float64)
    W[0, 0] = 1 + info.eps / 2 + 2.0**-45  # just above the midpoint of 1 and its neighbour
    W[1, 1] = 1 + 3 * info.eps / 2 - 2.0**-45  # just below the next midpoint
    made = split(W, 1, dtype=DTYPES[dtype])  # W has rank 3 at most, so the minor component is only noise
    exact = W - product(made, 1.0)
    assert torch.equal(made.residual, reference.round_once(exact, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_the_rounding_figures_match_their_definitions(mode: Mode, dtype: str) -> None:
    W = weight(32, 32)
    made = split(W, 4, mode=mode, dtype=DTYPES[dtype])
    D = product(made, 1.0)
    E = W.double() - (made.residual.double() + D)
    figures = made.rounding
    close = 1e-6  # sums of some thousand squares, in another order
    assert figures.component == pytest.approx(float(D.norm() / W.double().norm()), rel=close)
    assert figures.error == pytest.approx(float(E.norm() / W.double().norm()), rel=close)
    assert figures.leak == pytest.approx(float(E.norm() / D.norm()), rel=close)
    assert figures.leak_if[dtype] == pytest.approx(figures.leak, rel=close)


def test_leak_if_is_the_leak_of_a_split_in_that_dtype() -> None:
    W = weight(32, 32)
    figures = split(W, 4, dtype=torch.float32).rounding
    for name, dtype in DTYPES.items():
        assert figures.leak_if[name] == pytest.approx(split(W, 4, dtype=dtype).rounding.leak, rel=1e-6)


def test_a_shorter_mantissa_leaks_more() -> None:
    """bfloat16 keeps 8 bits, float16 11, float32 24: so the ratios are about 2**3 and 2**13."""
    leak = split(weight(32, 32), 4, dtype=torch.bfloat16).rounding.leak_if
    assert leak["bfloat16"] is not None
    assert leak["float16"] is not None
    assert leak["float32"] is not None
    assert leak["bfloat16"] / leak["float16"] == pytest.approx(2**3, rel=0.2)
    assert leak["float16"] / leak["float32"] == pytest.approx(2**13, rel=0.2)


@pytest.mark.parametrize("large", [7e4, 1e30])
def test_a_residual_that_overflows_float16_is_refused_and_has_no_leak_figure(large: float) -> None:
    W = weight(16, 16)
    W[3, 5] = large
    with pytest.raises(ValueError, match="overflows float16"):
        split(W, 2, dtype=torch.float16)
    figures = split(W, 2, dtype=torch.float32).rounding
    assert figures.leak_if["float16"] is None
    assert figures.leak_if["bfloat16"] is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    W = weight(16, 16)
    W[7, 7] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        split(W, 2, dtype=torch.float32)


def test_a_zero_weight_has_zero_figures() -> None:
    made = split(torch.zeros(8, 12), 3, dtype=torch.bfloat16)
    assert made.rounding == Rounding(0.0, 0.0, 0.0, dict.fromkeys(("bfloat16", "float16", "float32", "nf4"), 0.0))
    assert not made.residual.any()
    assert not product(made, 1.0).any()


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_orthonormal_factors_are_the_singular_vectors(mode: Mode, shape: str, dtype: str) -> None:
    W, r, scale = weight(*SHAPES[shape]), 5, 2.0
    made = split(W, r, scale=scale, mode=mode, factors="orthonormal", dtype=DTYPES[dtype])
    truth = reference.spectrum(W)
    indices = reference.wanted(len(truth.s), r, mode)
    true_product = truth.U[:, indices] @ truth.V[:, indices].T
    # A factor's rounding changes it by at most eps/2 * sqrt(r) in Frobenius norm; the other one has norm 1.
    assert (product(made, 1.0) - true_product).norm() <= 2 * reference.EPS32 * r**0.5
    exact = W.double() - product(made, scale)
    noise = 8 * reference.EPS64 * W.abs().max()
    assert ((exact - made.residual.double()).abs() <= reference.ulp(exact, DTYPES[dtype]) / 2 + noise).all()
    assert made.energy == pytest.approx(float(truth.s[indices].square().sum() / truth.s.square().sum()), rel=1e-9)
    norm = float(product(made, scale).norm())
    assert made.rounding.component == pytest.approx(norm / float(W.double().norm()), rel=1e-9)
    error = float((W.double() - made.residual.double() - product(made, scale)).norm())
    assert made.rounding.leak == pytest.approx(error / norm, rel=1e-6)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_one_sided_factors_leave_the_weight_as_it_is(mode: Mode) -> None:
    W, r = weight(24, 40, torch.bfloat16), 5
    both, right, left = (
        split(W, r, mode=mode, factors=factors, dtype=torch.bfloat16) for factors in ("orthonormal", "right", "left")
    )
    assert right.residual is W
    assert left.residual is W
    assert torch.equal(right.A, both.A)
    assert torch.equal(left.B, both.B)
    assert not right.B.any()
    assert not left.A.any()
    assert right.rounding.error == right.rounding.leak == right.rounding.component == 0
    assert right.energy == pytest.approx(both.energy, rel=1e-9)


def test_the_vectors_of_a_zero_weight_are_orthonormal_too() -> None:
    made = split(torch.zeros(8, 12), 3, factors="orthonormal", dtype=torch.float32)
    assert torch.allclose(made.B.T @ made.B, torch.eye(3), atol=1e-6)
    assert torch.allclose(made.A @ made.A.T, torch.eye(3), atol=1e-6)
    assert made.energy == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_full_rank_component_is_the_whole_weight(mode: Mode) -> None:
    W = weight(6, 9)
    made = split(W, 6, mode=mode, dtype=torch.float32)
    truth = reference.spectrum(W)
    assert (product(made, 1.0) - W.double()).norm() <= truth.tolerance(list(range(6)))


def test_a_transposed_weight_gives_the_transposed_parts() -> None:
    """GPT-2 stores (in, out): a view that is not contiguous gives the same result as a copy."""
    W = weight(40, 24)
    view, copy = split(W.T, 4, dtype=torch.bfloat16), split(W.T.contiguous(), 4, dtype=torch.bfloat16)
    assert torch.equal(view.residual, copy.residual)
    assert torch.equal(view.B, copy.B)
    assert torch.equal(view.A, copy.A)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_draw() -> None:
    W = weight(24, 40)
    one, again, other = (split(W, 4, mode="random", dtype=torch.bfloat16, seed=seed) for seed in (1, 1, 2))
    assert reference.same_bytes(one.B, again.B)
    assert reference.same_bytes(one.residual, again.residual)
    assert not torch.equal(one.triplets.s, other.triplets.s)


def test_a_split_in_row_blocks_equals_the_whole_split() -> None:
    """The weight has more elements than one row block."""
    W = weight(700, 400)
    made = split(W, 3, mode="max", dtype=torch.bfloat16)
    assert torch.equal(made.residual, reference.round_once(W.double() - product(made, 1.0), torch.bfloat16))
