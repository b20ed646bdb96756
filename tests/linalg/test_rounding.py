"""One rounding, where two would end elsewhere: at and beside the middle of two short values."""

from __future__ import annotations

import pytest
import torch

from milora_init.linalg.rounding import add_once, round_once


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3e-5, 1e-7, 1e-40])  # 1e-7: float16 is subnormal there; 1e-40: bfloat16 is
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_the_middle(dtype: torch.dtype, scale: float, search: bool) -> None:
    """What differs from a middle by 2^-40 of it goes to the nearer value, and a middle to the even one."""
    generator = torch.Generator().manual_seed(0)
    below = torch.rand(64, 48, generator=generator).mul(scale).to(dtype)
    above = (below.view(torch.int16) + 1).view(dtype)
    middle = (below.double() + above.double()) / 2
    side = torch.randint(-1, 2, middle.shape, generator=generator).double()
    exact = middle * (1 + side * 2.0**-40)
    even = torch.where(below.view(torch.int16) % 2 == 0, below, above)
    expected = torch.where(side < 0, below, torch.where(side > 0, above, even))
    assert torch.equal(round_once(exact, dtype, search=search), expected)
    assert torch.equal(round_once(-exact, dtype, search=search), -expected)
    assert not torch.equal(exact.float().to(dtype), expected)  # two roundings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_beside_the_middle(dtype: torch.dtype) -> None:
    """The sum of two float32 numbers is rounded once, although float32 does not hold it."""
    generator = torch.Generator().manual_seed(0)
    below = (torch.rand(64, 48, generator=generator) + 1).to(dtype)
    above = (below.view(torch.int16) + 1).view(dtype)
    middle = (below.float() + above.float()) / 2
    side = torch.randint(0, 2, middle.shape, generator=generator).float() * 2 - 1
    assert torch.equal(add_once(middle, side * 2.0**-40, dtype), torch.where(side < 0, below, above))
