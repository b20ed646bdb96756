"""One rounding to a short dtype: the nearest value, from float64 or from a sum of two terms.

torch converts float64 to bfloat16 or float16 by way of float32, and so rounds twice: the first rounding can end in the
middle of two short values, and the second then goes to the farther one. The last 16 bits of a middle are 0x8000 for
bfloat16, and the last 12 are zero for float16. So everything is converted by way of float32, fast, and the few entries
that end so are rounded again: to odd, which is never a middle.

Source: S. Boldo and G. Melquiond (2008), https://doi.org/10.1109/TC.2007.70819.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def round_once(R: Tensor, dtype: torch.dtype, *, search: bool = True) -> Tensor:
    """R (m, n), in float64, to the nearest value of dtype.

    Without `search` every entry is rounded to odd, and not only those that need it: a GPU has no need to look for them,
    and the host would wait for what it found.
    """
    if dtype.itemsize > 2:
        return R.to(dtype)
    if not search:
        return _round_to_odd(R).to(dtype)
    return _to_16_bits(R.float(), lambda at: R[at], dtype)


def add_once(R: Tensor, P: Tensor, dtype: torch.dtype) -> Tensor:
    """R + P (m, n) to the nearest value of a 16-bit dtype, for R in float32 or shorter and P in float32.

    Faster than the sum in float64.
    """
    return _to_16_bits(R + P, lambda at: R[at].double() + P[at].double(), dtype)


def _to_16_bits(nearest: Tensor, exact: Callable[[tuple[Tensor, ...]], Tensor], dtype: torch.dtype) -> Tensor:
    """The values of dtype (m, n) nearest to those that `nearest` has in float32, and `exact(indices)` in float64."""
    stored = nearest.to(dtype)
    bits = nearest.view(torch.int32)
    # The last bits alone, such that those of a middle are the least integer of all.
    last, middle = (bits << 16, -1 << 31) if dtype == torch.bfloat16 else (bits & 0xFFF, 0)
    columns = last.amin(0).eq(middle).nonzero().squeeze(1)  # few: only these are looked at entry by entry
    rows, which = last[:, columns].eq(middle).nonzero(as_tuple=True)
    suspects = rows, columns[which]
    stored[suspects] = _round_to_odd(exact(suspects)).to(dtype)
    return stored


def _round_to_odd(R: Tensor) -> Tensor:
    """R (float64) to float32; what that does not hold exactly goes to the neighbour whose last bit is odd."""
    nearest = R.to(torch.float32)
    error = nearest - R  # exact
    bits = nearest.view(torch.int32)
    passed = (error > 0) ^ (bits < 0)  # by the nearest value, away from 0: then the other neighbour is one bit below
    odd = torch.add(bits, passed, alpha=-1).bitwise_or_(1)
    return torch.where(error == 0, bits, odd).view(torch.float32)
