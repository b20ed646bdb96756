"""Split a weight into a residual and the two factors of a LoRA adapter.

    W = residual + scale * B @ A,     B = U sqrt(s / scale),     A = sqrt(s / scale) V^T

Those are the `balanced` factors. `orthonormal` ones are B = U and A = V^T. `right` is B = 0 and A = V^T, `left` is
B = U and A = 0: then the product is zero, and W stays as it is.

B and A are rounded to float32 first. The residual is computed in float64 from those stored values and rounded once. So
what the factors lost by rounding stays in the residual, and the pair adds up to W within half a unit in the last place
of the residual's dtype.

That last place can be coarse: the minor component of a square weight is about 2e-3 of its norm, bfloat16 has 8 bits,
and half of what was to leave the base is rounded away again. `Rounding` measures it, for the dtype written and for
those that could have been.

Cost: 2 m n r operations and a few passes over W, beside the solver's.

Sources: MiLoRA, https://arxiv.org/abs/2406.09044, equations 4 and 5; for the principal end PiSSA,
https://arxiv.org/abs/2404.02948. Those of the other factors are in `methods`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.accuracy import Rounding as Rounding
from milora_init.linalg.arithmetic import DeviceArithmetic, arithmetic_of
from milora_init.linalg.nf4 import nf4
from milora_init.linalg.rounding import round_once
from milora_init.linalg.svd import Triplets, singular_triplets
from milora_init.methods import Factors, Mode

_CANDIDATES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAMPLE = 8  # one row in so many is rounded to every candidate
_SMALL = 1 << 18  # entries: a smaller weight is its own sample


@dataclass(frozen=True, slots=True)
class Split:
    """The parts of a weight W (m, n).

    Attributes:
        residual: (m, n) in the dtype asked for; W itself where the factors leave the weight as it is.
        B, A: (m, r) and (r, n) in float32.
        triplets: The r triplets.
        energy: Their share of W's squared Frobenius norm.
        rounding: What the dtype of the residual costs.
    """

    residual: Tensor
    B: Tensor
    A: Tensor
    triplets: Triplets
    energy: float
    rounding: Rounding


def split(  # noqa: PLR0913  the parameters of the method
    W: Tensor,
    r: int,
    *,
    scale: float = 1.0,
    mode: Mode = "min",
    factors: Factors = "balanced",
    dtype: torch.dtype,
    seed: int = 0,
    nf4_rounds: int = 0,
    arithmetic: DeviceArithmetic | None = None,
) -> Split:
    """Factor r singular triplets out of W.

    Args:
        W: (m, n), any floating dtype, any device.
        r: Number of triplets, 1 <= r <= min(m, n).
        scale: What the adapter's product is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA.
        mode: Which triplets; see `svd.singular_triplets`.
        factors: What B and A are; see `methods`.
        dtype: Of the residual.
        seed: As in `svd.singular_triplets`.
        nf4_rounds: For a base that QLoRA quantises: make the residual of numbers that NF4 has, and let the factors
            make up for the rounding, in so many rounds; see `_split_for_nf4`. 0 for an ordinary residual.
        arithmetic: The algorithms to use; None for those of W's device.

    Raises:
        ValueError: As `svd.singular_triplets`; or a residual that overflows dtype.
    """
    arithmetic = arithmetic or arithmetic_of(W.device)
    if nf4_rounds:
        return _split_for_nf4(W, r, nf4_rounds, scale=scale, mode=mode, dtype=dtype, seed=seed, arithmetic=arithmetic)
    triplets = singular_triplets(W, r, mode=mode, seed=seed, arithmetic=arithmetic)
    B, A = _factors(triplets, scale, factors)
    if factors in ("right", "left"):
        norm = float(torch.linalg.vector_norm(W, dtype=torch.float64))
        component = float(triplets.s.norm()) / norm if norm else 0.0
        return Split(
            W, B, A, triplets, component**2, Rounding(0.0, 0.0, 0.0, dict.fromkeys((*_CANDIDATES, "nf4"), 0.0))
        )
    residual, rounding, norm = _residual(W, B, A, scale, dtype, arithmetic)
    own = rounding.component if factors == "balanced" else _norm_ratio(float(triplets.s.square().sum()), norm**2)
    return Split(residual, B, A, triplets, own**2, rounding)


def _split_for_nf4(  # noqa: PLR0913
    W: Tensor,
    r: int,
    rounds: int,
    *,
    scale: float,
    mode: Mode,
    dtype: torch.dtype,
    seed: int,
    arithmetic: DeviceArithmetic,
) -> Split:
    """A residual Q of numbers that NF4 has, and factors of W - Q.

    In turn B A is the best approximation of W - Q of rank r, and Q the rounding of W - B A to NF4: QPiSSA with several
    rounds, arXiv 2404.02948. The triplets and their certificate are those of W - Q after the last round.
    """
    kind = torch.promote_types(W.dtype, torch.float32)
    rest = W
    for _ in range(rounds):
        B, A = _factors(singular_triplets(rest, r, mode=mode, seed=seed, arithmetic=arithmetic), scale, "balanced")
        Q = nf4(W.to(kind) - scale * (B.to(kind) @ A.to(kind)), dtype).to(dtype)
        rest = W.to(kind) - Q.to(kind)
    triplets = singular_triplets(rest, r, mode=mode, seed=seed, arithmetic=arithmetic)
    B, A = _factors(triplets, scale, "balanced")
    if not bool(Q.isfinite().all()):
        raise ValueError(f"its residual overflows {str(dtype).removeprefix('torch.')}")
    D = scale * (B.to(kind) @ A.to(kind))
    norm, E, own = (float(torch.linalg.vector_norm(X, dtype=torch.float64)) for X in (W, rest - D, D))
    leak = E / own if own else 0.0
    component, error = (own / norm, E / norm) if norm else (0.0, 0.0)
    return Split(Q, B, A, triplets, component**2, Rounding(component, error, leak, {"nf4": leak}))


def _factors(triplets: Triplets, scale: float, factors: Factors) -> tuple[Tensor, Tensor]:
    """B (m, r) and A (r, n) in float32."""
    U, Vh = triplets.U, triplets.V.mT
    if factors == "balanced":
        root = (triplets.s / scale).sqrt()
        return (U * root).float(), (root[:, None] * Vh).float()
    B, A = U.float(), Vh.float().contiguous()
    if factors == "right":
        return torch.zeros_like(B), A
    return (B, torch.zeros_like(A)) if factors == "left" else (B, A)


def _residual(
    W: Tensor, B: Tensor, A: Tensor, scale: float, dtype: torch.dtype, arithmetic: DeviceArithmetic
) -> tuple[Tensor, Rounding, float]:
    """W - scale * B @ A (m, n) in dtype, for W (m, n), B (m, r), A (r, n); the figures of its rounding; ||W||."""
    m, n = W.shape
    exact = B.device  # W's, or the CPU where W's has no float64
    B64, A64 = B.to(torch.float64), scale * A.to(torch.float64)
    residual = torch.empty(m, n, dtype=dtype, device=W.device)
    rows = max(1, arithmetic.residual_block_bytes // (8 * n))
    step = _SAMPLE if m * n > _SMALL else 1
    others = {name: candidate for name, candidate in _CANDIDATES.items() if candidate != dtype}
    # For each block the norms of W and E, and over the sample those of D and of each other candidate's E. They stay on
    # the device, and are read once.
    norms: list[Tensor] = []
    in_nf4: list[Tensor] = []  # the norms of E and D of the first rows, if the residual were quantised to NF4
    for top in range(0, m, rows):
        block = slice(top, top + rows)
        R = W[block].to(exact, torch.float64, copy=True)
        norms.append(torch.linalg.vector_norm(R))
        R.addmm_(B64[block], A64, alpha=-1)
        stored = round_once(R, dtype, search=arithmetic.search_ties)
        residual[block] = stored
        norms.append(torch.linalg.vector_norm(R - stored.to(exact)))
        sample = R[::step]
        norms.append(torch.linalg.vector_norm(B64[block][::step] @ A64))
        if top == 0:
            in_nf4 = [torch.linalg.vector_norm(sample.float() - nf4(sample.float())).to(torch.float64), norms[-1]]
        norms += [torch.linalg.vector_norm(sample - sample.to(candidate)) for candidate in others.values()]
    product = ((B64.mT @ B64) * (A64 @ A64.mT)).sum()  # ||B A||^2 = tr(B^T B A A^T)
    D2, nf4_E, nf4_D, *of_blocks = torch.stack([product, *in_nf4, *norms]).tolist()
    sums = torch.tensor(of_blocks, dtype=torch.float64).view(-1, 3 + len(others)).square().sum(dim=0)
    W2, E2, sampled_D2, *sampled_E2 = sums.tolist()
    if not math.isfinite(E2):
        raise ValueError(f"its residual overflows {str(dtype).removeprefix('torch.')}")
    leak = _norm_ratio(E2, D2)
    leaks = {
        name: _norm_ratio(e2, sampled_D2) if math.isfinite(e2) else None
        for name, e2 in zip(others, sampled_E2, strict=True)
    }
    rounding = Rounding(
        component=_norm_ratio(D2, W2),
        error=_norm_ratio(E2, W2),
        leak=leak,
        leak_if={name: leaks.get(name, leak) for name in _CANDIDATES} | {"nf4": _norm_ratio(nf4_E**2, nf4_D**2)},
    )
    return residual, rounding, W2**0.5


def _norm_ratio(squared: float, squared_whole: float) -> float:
    """The ratio of two norms, from their squares; 0 where the second is 0."""
    return float((squared / squared_whole) ** 0.5) if squared_whole > 0 else 0.0
