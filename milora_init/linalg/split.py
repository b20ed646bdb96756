"""Split a weight into a residual and the two factors of a LoRA adapter.

    W = residual + scale * B @ A,     B = U sqrt(s / scale),     A = sqrt(s / scale) V^T

(MiLoRA, arXiv 2406.09044, equations 4 and 5; PiSSA, arXiv 2404.02948, for the principal end.) B and A are rounded to
float32 first, and the residual is computed in float64 against those stored values, then rounded once. So whatever
the factors lost to rounding stays in the residual, and the pair adds up to W to within half a unit in the last place
of the residual's dtype.

That last place can be coarse: the minor component of a square weight is about 2e-3 of its norm, a bfloat16 carries
8 bits, and half of what was meant to leave the base is rounded away again. `Rounding` measures it, for the dtype
written and for those that could have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.svd import Mode, Triplets, singular_triplets

CANDIDATES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAMPLE = 8
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # 2 MiB of float64 stays in a core's cache; a GPU wants large ones


@dataclass(frozen=True, slots=True)
class Rounding:
    """What storing the residual in a short dtype costs. D = scale * B @ A, E = W - (stored residual + D).

    Attributes:
        component: ||D|| / ||W||, Frobenius norms here and below. 0 for a zero weight.
        error: ||E|| / ||W||, how far the pair is from the source.
        leak: ||E|| / ||D||, how much of the component stays in the base, or of its opposite. 0 where D is zero.
        leak_if: The leak that `bfloat16`, `float16` and `float32` would have, measured on an eighth of the rows; None
            where the residual overflows.
    """

    component: float
    error: float
    leak: float
    leak_if: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Split:
    """A weight taken apart: residual (m, n) in the dtype asked for, B (m, r) and A (r, n) in float32."""

    residual: Tensor
    B: Tensor
    A: Tensor
    triplets: Triplets
    rounding: Rounding


def split(W: Tensor, r: int, *, scale: float = 1.0, mode: Mode = "min", dtype: torch.dtype, seed: int = 0) -> Split:
    """Factor r singular triplets out of W.

    Args:
        W: (m, n), any floating dtype, any device.
        r: Number of triplets, 1 <= r <= min(m, n).
        scale: What the adapter's product is multiplied with: alpha / r, or alpha / sqrt(r) with rsLoRA.
        mode: Which triplets; see `svd.singular_triplets`.
        dtype: Of the residual.
        seed: For mode `random` and for the solver's start vectors.

    Raises:
        ValueError: As `svd.singular_triplets`; or a residual that overflows dtype.
    """
    triplets = singular_triplets(W, r, mode=mode, seed=seed)
    root = (triplets.s / scale).sqrt()
    B = (triplets.U * root).float()
    A = (root[:, None] * triplets.V.mT).float()
    residual, rounding = _residual(W, B, A, scale, dtype)
    return Split(residual, B, A, triplets, rounding)


def _residual(W: Tensor, B: Tensor, A: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Rounding]:
    m, n = W.shape
    exact = B.device if B.device.type != "mps" else torch.device("cpu")  # Apple's GPUs have no float64
    A64 = scale * A.to(exact, torch.float64)
    residual = torch.empty(m, n, dtype=dtype, device=W.device)
    # Squared norms of W, D and E; of D and of each candidate's E over the sample. On the device, and read once.
    sums = torch.zeros(3, dtype=torch.float64, device=exact)
    sample = torch.zeros(1 + len(CANDIDATES), dtype=torch.float64, device=exact)
    rows = max(1, _BLOCK_ELEMENTS.get(exact.type, 1 << 18) // n)
    for number, top in enumerate(range(0, m, rows)):
        block = slice(top, top + rows)
        w = W[block].to(exact, torch.float64)
        D = B[block].to(exact, torch.float64) @ A64
        R = w - D
        stored = round_once(R, dtype)
        residual[block] = stored
        sums += _squares(w, D, stored.double() - R)
        if number % _SAMPLE == 0:
            sample += _squares(D, *(R.to(candidate).double() - R for candidate in CANDIDATES.values()))
    W2, D2, E2 = sums.tolist()
    sampled_D2, *sampled_E2 = sample.tolist()
    if not math.isfinite(E2):
        raise ValueError(f"its residual overflows {str(dtype).removeprefix('torch.')}")
    leak = _ratio(E2, D2)
    return residual, Rounding(
        component=_ratio(D2, W2),
        error=_ratio(E2, W2),
        leak=leak,
        leak_if={
            name: leak if CANDIDATES[name] == dtype else _ratio(e2, sampled_D2) if math.isfinite(e2) else None
            for name, e2 in zip(CANDIDATES, sampled_E2, strict=True)
        },
    )


def _squares(*tensors: Tensor) -> Tensor:
    """The squared Frobenius norm of each."""
    return torch.stack([torch.dot(tensor.flatten(), tensor.flatten()) for tensor in tensors])


def round_once(R: Tensor, dtype: torch.dtype) -> Tensor:
    """R (m, n), in float64, to the nearest value of dtype."""
    return R.to(dtype) if dtype.itemsize > 2 else _to_16_bits(R.float(), lambda at: R[at], dtype)


def add_once(R: Tensor, P: Tensor, dtype: torch.dtype) -> Tensor:
    """R, at most as long as float32, plus P in float32, to the nearest value of a 16-bit dtype.

    Faster than all of it in float64.
    """
    return _to_16_bits(R + P, lambda at: R[at].double() + P[at].double(), dtype)


def _to_16_bits(nearest: Tensor, exact: Callable[[tuple[Tensor, ...]], Tensor], dtype: torch.dtype) -> Tensor:
    """The nearest values of dtype to those that `nearest` has in float32 and `exact` in float64."""
    # By way of float32 torch can round to the middle of two 16-bit values and then to the farther one. A middle ends
    # in twelve zero bits at least; what does is rounded again, to odd, which is never a middle.
    stored = nearest.to(dtype)
    low = nearest.view(torch.int32) & 0xFFF
    columns = low.amin(0).eq(0).nonzero().squeeze(1)  # few of a block's: only these are looked at entry by entry
    rows, which = low[:, columns].eq(0).nonzero(as_tuple=True)
    suspects = rows, columns[which]
    stored[suspects] = _round_to_odd(exact(suspects)).to(dtype)
    return stored


def _round_to_odd(R: Tensor) -> Tensor:
    """R (float64) to float32; what that does not hold exactly goes to the neighbour whose last bit is odd."""
    nearest = R.float()
    bits = nearest.view(torch.int32)
    odd = (bits - (nearest.double().abs() > R.abs()).int()) | 1
    return torch.where(nearest.double() == R, bits, odd).view(torch.float32)


def _ratio(squared: float, squared_whole: float) -> float:
    return float((squared / squared_whole) ** 0.5) if squared_whole > 0 else 0.0
