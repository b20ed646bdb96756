"""The solver and the split on a simulated GPU: correct on every spectrum, no mixed devices, bounded cost."""

from __future__ import annotations

import pytest
import torch
from support import matrices, reference, simulated_cuda
from support.marks import wide
from support.triplets import certified, check_component, check_properties, check_values

from milora_init.linalg.split import Split, split, split_batch
from milora_init.linalg.svd import Triplets, singular_triplets, triplets_of_batch
from milora_init.methods import MODES, Mode

HARD = {**matrices.DISTINCT, **matrices.AMBIGUOUS}
FIRST = ("gaussian", "language_model_like", "outlier", "rank_deficient")
GPU = "cuda:0"


def on_host(x: torch.Tensor) -> torch.Tensor:
    assert x.is_cuda, "a result is on the host"
    return x.as_subclass(torch.Tensor)


def solve_on_gpu(W: torch.Tensor, r: int, mode: Mode) -> Triplets:
    with simulated_cuda.simulated():
        t = singular_triplets(W.to(GPU), r, mode=mode)
    return Triplets(on_host(t.U), on_host(t.s), on_host(t.V), t.s_max, t.certificate)


def split_on_gpu(W: torch.Tensor, r: int, dtype: torch.dtype, mode: Mode = "min") -> Split:
    with simulated_cuda.simulated():
        made = split(W.to(GPU), r, mode=mode, dtype=dtype)
    return Split(on_host(made.residual), on_host(made.B), on_host(made.A), made.triplets, made.energy, made.rounding)


@pytest.mark.parametrize("mode", ["min", wide("max")])
@pytest.mark.parametrize(
    ("name", "shape"),
    matrices.with_shapes([*FIRST, *(name for name in HARD if name not in FIRST)], (540, 540), (530, 1000), (1000, 530)),
    ids=str,
)
def test_every_spectrum_is_solved_as_on_a_cpu(name: str, shape: tuple[int, int], mode: Mode) -> None:
    W, r = HARD[name](*shape), 10
    t = solve_on_gpu(W, r, mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    if name in matrices.DISTINCT and name != "outlier":  # float64 does not resolve its squared values
        check_component(W, t, r, mode)
    else:
        assert t.certificate.residual <= 1e-9 or certified(t) <= 5e-8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [wide((64, 48)), (48, 200)], ids=str)
@pytest.mark.parametrize("name", HARD)
def test_small_weights_are_solved_as_on_a_cpu(name: str, shape: tuple[int, int], mode: Mode) -> None:
    W, r = HARD[name](*shape), 8
    t = solve_on_gpu(W, r, mode)
    check_properties(W, t, r)
    check_values(W, t, r, mode)
    assert t.certificate.path == singular_triplets(W, r, mode=mode).certificate.path


@pytest.mark.parametrize("shape", [(640, 640), wide((560, 1400)), wide((1400, 560))], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "language_model_like", "float16_near_overflow"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_both_ends_are_found_in_mixed_precision(mode: Mode, name: str, shape: tuple[int, int]) -> None:
    t = solve_on_gpu(HARD[name](*shape), 10, mode)
    assert t.certificate.path == "mixed", t.certificate.reason
    assert t.certificate.component_error is not None
    assert t.certificate.component_error <= 5e-8


@pytest.mark.parametrize("name", [wide("steep"), "outlier"])
def test_float64_is_used_if_float32_does_not_resolve_the_smallest_values(name: str) -> None:
    """The certificate gives the reason why each of the three earlier algorithms was rejected."""
    t = solve_on_gpu(HARD[name](640, 640), 10, "min")
    assert t.certificate.path == "svd"
    assert t.certificate.reason.count(";") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, wide(torch.float16)])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("shape", [(600, 560), (40, 64)], ids=str)
def test_the_residual_is_rounded_once(shape: tuple[int, int], mode: Mode, dtype: torch.dtype) -> None:
    W = matrices.gaussian(*shape).to(dtype)
    made = split_on_gpu(W, 6, dtype, mode)
    exact = W.double() - made.B.double() @ made.A.double()
    noise = 8 * reference.EPS64 * float(W.double().abs().max())  # the two products sum in another order
    error = (exact - made.residual.double()).abs()
    assert bool((error <= reference.ulp(exact, dtype) / 2 + noise).all())


def test_the_same_weight_gives_the_same_bytes_twice() -> None:
    W = matrices.language_model_like(700, 640)
    one, again = split_on_gpu(W, 12, torch.bfloat16), split_on_gpu(W, 12, torch.bfloat16)
    assert one.triplets.certificate == again.triplets.certificate
    for name in ("residual", "A", "B"):
        assert reference.same_bytes(getattr(one, name), getattr(again, name))


@pytest.mark.parametrize(
    ("name", "shape", "launches", "waits", "gigabytes", "float64_gflop"),
    [
        wide("moderate_head", (2048, 2048), 400, 12, 3.1, 9),
        ("language_model_like", (1024, 1024), 400, 12, 1.2, 4),
        wide("moderate_head", (5632, 2048), 500, 12, 5.7, 17),
        pytest.param("moderate_head", (4096, 4096), 360, 12, 10, 25, marks=pytest.mark.slow),
        pytest.param("moderate_head", (11008, 4096), 450, 12, 22, 70, marks=pytest.mark.slow),
        pytest.param("language_model_like", (4096, 4096), 410, 12, 11.5, 30, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_cost_of_a_weight_is_bounded(
    name: str, shape: tuple[int, int], launches: int, waits: int, gigabytes: float, float64_gflop: float
) -> None:
    """With float64 only and the block sizes of a CPU, 2048 x 2048 took 1031 launches, 23 waits, 6.3 GB, 26 GFLOP."""
    W = getattr(matrices, name)(*shape)
    with simulated_cuda.simulated() as counts:
        made = split(W.to(GPU), 64, dtype=torch.bfloat16)
    assert made.triplets.certificate.path == "mixed", made.triplets.certificate.reason
    assert counts.launches.total() <= launches
    assert counts.waits.total() <= waits
    assert counts.bytes_touched <= gigabytes * 1e9
    assert counts.flops["float64"] <= float64_gflop * 1e9


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(("shape", "count"), [((520, 1040), 3), pytest.param((768, 2048), 8, marks=pytest.mark.slow)])
def test_a_batch_of_equal_weights_costs_little_more_than_one(shape: tuple[int, int], count: int, mode: Mode) -> None:
    weights = [matrices.moderate_head(*shape, seed=seed) for seed in range(count)]
    with simulated_cuda.simulated() as of_one:
        alone = split(weights[0].to(GPU), 16, mode=mode, dtype=torch.bfloat16)
    with simulated_cuda.simulated() as of_batch:
        W = torch.stack([W.to(GPU) for W in weights])
        made = split_batch(W, 16, scale=1.0, mode=mode, factors="balanced", dtype=torch.bfloat16)
    assert of_batch.launches.total() <= 1.5 * of_one.launches.total()
    assert of_batch.waits.total() <= of_one.waits.total() + 4  # all get as many corrections as the one with most
    assert made[0] is not None
    assert made[0].rounding.leak == pytest.approx(alone.rounding.leak, rel=1e-3)
    for W, part in zip(weights, made, strict=True):
        assert part is not None
        assert certified(part.triplets) <= 5e-8
        exact = W.double() - on_host(part.B).double() @ on_host(part.A).double()
        error = (exact - on_host(part.residual).double()).abs()
        assert bool((error <= 1.001 * reference.ulp(exact, torch.bfloat16) / 2).all())


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((530, 900), "min"),
        pytest.param((540, 540), "min", marks=pytest.mark.wide),
        pytest.param((900, 530), "max", marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_a_batch_solves_each_weight_or_leaves_it_to_be_solved_alone(shape: tuple[int, int], mode: Mode) -> None:
    names = [
        "gaussian",
        "steep",
        "zero",
        "outlier",
        "language_model_like",
        "clustered",
        "dead_rows_and_columns",
        "huge",
    ]
    weights = [HARD[name](*shape) for name in names]
    weights.append(torch.full(shape, torch.nan, dtype=torch.float64))
    with simulated_cuda.simulated():
        found = triplets_of_batch(torch.stack(weights).to(GPU), 10, mode=mode)
    solved = dict(zip(names, found, strict=False))
    assert found[-1] is None
    assert solved["huge"] is None
    assert solved["gaussian"] is not None
    assert solved["language_model_like"] is not None
    for name, W in zip(names, weights, strict=False):
        t = solved[name]
        if t is None:
            continue
        t = Triplets(on_host(t.U), on_host(t.s), on_host(t.V), t.s_max, t.certificate)
        check_properties(W, t, 10)
        check_values(W, t, 10, mode)
        if name in matrices.DISTINCT:
            check_component(W, t, 10, mode)


def test_an_operation_on_two_devices_raises() -> None:
    with simulated_cuda.simulated():
        here, there, elsewhere = torch.ones(3), torch.ones(3).to("cuda:0"), torch.ones(3).to("cuda:1")
        for other in (here, elsewhere):
            with pytest.raises(RuntimeError, match="same device"):
                there + other
        assert str((there.cpu() + here).device) == "cpu"
        assert str((there * torch.tensor(2.0)).device) == "cuda:0"


def test_a_view_counts_no_launch_and_reading_a_value_counts_a_wait() -> None:
    with simulated_cuda.simulated() as counts:
        x = torch.ones(4, 4).to("cuda:0")
        before = counts.launches.total()
        assert x.mT[1:].shape == (3, 4)
        assert counts.launches.total() == before
        x[0] = 2
        assert float((x @ x).sum()) > 0
    assert counts.launches.total() == before + 4  # the copy of the value is one
    assert counts.waits.total() == 1
    assert counts.flops == {"float32": 2 * 4**3}
