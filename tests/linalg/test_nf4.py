"""NF4 and the splits for a base in it: against bitsandbytes, and against QLoRA's own error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from milora_init.linalg.nf4 import VALUES, nf4
from milora_init.linalg.split import split


@pytest.mark.parametrize("shape", [(96, 64), (50, 37), (3, 5)])
def test_a_round_trip_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    W = torch.randn(shape)
    with torch.compiler.set_stance("force_eager"):  # compiling it takes ten seconds and more
        codes, state = bnb.functional.quantize_4bit(W, quant_type="nf4")
        expected = bnb.functional.dequantize_4bit(codes, state)
    assert torch.equal(nf4(W), expected)


def test_every_entry_goes_to_the_nearest_number_of_its_block() -> None:
    torch.manual_seed(0)
    W = torch.randn(7, 30)
    found = nf4(W).reshape(-1)
    for start in range(0, W.numel(), 64):
        block = W.reshape(-1)[start : start + 64]
        numbers = block.abs().max() * torch.tensor(VALUES)
        nearest = (block[:, None] - numbers).abs().amin(1)
        assert torch.allclose((block - found[start : start + 64]).abs(), nearest, atol=1e-7)
    assert not nf4(torch.zeros(4, 16)).any()


def heavy(m: int, n: int) -> Tensor:
    """A matrix with a few large singular values and a bulk, as weights of language models have."""
    torch.manual_seed(0)
    head = torch.randn(m, 8) @ torch.diag(torch.linspace(3, 1, 8)) @ torch.randn(8, n)
    return 0.02 * (torch.randn(m, n) + 0.3 * head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_corrected_pair_is_nearer_than_nf4_alone_and_the_base_is_fixed(dtype: torch.dtype) -> None:
    W = heavy(128, 192)
    made = split(W, 16, mode="max", dtype=dtype, nf4_rounds=5)
    Q, D = made.residual.float(), made.B @ made.A
    assert torch.equal(nf4(Q).to(dtype), made.residual)  # QLoRA's rounding at load changes nothing
    error = float((W - Q - D).norm() / W.norm())
    assert error == pytest.approx(made.rounding.error, rel=1e-4)
    alone = float((W - nf4(W)).norm() / W.norm())
    once = split(W, 16, mode="max", dtype=dtype, nf4_rounds=1).rounding.error
    assert error < once < alone
    U, _, _ = torch.linalg.svd(W.double())
    overlap = (U[:, :8].mT @ torch.linalg.qr(made.B.double()).Q).square().sum() / 8
    assert overlap > 0.99  # the largest directions are still the weight's
