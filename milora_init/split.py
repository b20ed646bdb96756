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
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.svd import Mode, Triplets, singular_triplets

CANDIDATES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # 2 MiB of float64 stays in a core's cache; a GPU wants large ones


@dataclass(frozen=True, slots=True)
class Rounding:
    """What storing the residual in a short dtype costs. D = scale * B @ A, E = W - (stored residual + D).

    Attributes:
        component: ||D|| / ||W||, Frobenius norms here and below. 0 for a zero weight.
        error: ||E|| / ||W||, how far the pair is from the source.
        leak: ||E|| / ||D||, how much of the component stays in the base, or of its opposite. 0 where D is zero.
        leak_if: The leak that `bfloat16`, `float16` and `float32` would have; None where the residual overflows.
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
    # Squared norms of W, D and E, then of E for each candidate; kept on the device, read once.
    sums = torch.zeros(3 + len(CANDIDATES), dtype=torch.float64, device=exact)
    rows = max(1, _BLOCK_ELEMENTS.get(exact.type, 1 << 18) // n)
    for top in range(0, m, rows):
        block = slice(top, top + rows)
        w = W[block].to(exact, torch.float64)
        D = B[block].to(exact, torch.float64) @ A64
        R = w - D
        stored = _round_once(R, dtype)
        residual[block] = stored
        roundings = [stored, *(R.to(candidate) for candidate in CANDIDATES.values())]
        sums += torch.stack([x.square().sum() for x in (w, D, *(s.double() - R for s in roundings))])
    W2, D2, E2, *candidates2 = sums.tolist()
    if not math.isfinite(E2):
        raise ValueError(f"its residual overflows {str(dtype).removeprefix('torch.')}")
    return residual, Rounding(
        component=_ratio(D2, W2),
        error=_ratio(E2, W2),
        leak=_ratio(E2, D2),
        leak_if={
            name: _ratio(e2, D2) if math.isfinite(e2) else None
            for name, e2 in zip(CANDIDATES, candidates2, strict=True)
        },
    )


def _round_once(R: Tensor, dtype: torch.dtype) -> Tensor:
    """R (float64) to the nearest value of dtype."""
    if dtype.itemsize > 2:
        return R.to(dtype)
    # torch goes by way of float32, which can round to the middle of two 16-bit values and then to the farther one.
    # So round to odd there: what float32 does not hold exactly keeps an odd last bit and is never a middle.
    nearest = R.float()
    bits = nearest.view(torch.int32)
    odd = (bits - (nearest.double().abs() > R.abs()).int()) | 1
    return torch.where(nearest.double() == R, bits, odd).view(torch.float32).to(dtype)


def _ratio(squared: float, squared_whole: float) -> float:
    return float((squared / squared_whole) ** 0.5) if squared_whole > 0 else 0.0
