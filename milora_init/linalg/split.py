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
from milora_init.linalg.arithmetic import DeviceArithmetic, add_product, arithmetic_of
from milora_init.linalg.nf4 import nf4
from milora_init.linalg.rounding import round_once
from milora_init.linalg.svd import Triplets, singular_triplets, triplets_of_batch
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
    (made,) = _parts(W, [triplets], scale, factors, dtype, arithmetic)
    if made is None:
        raise ValueError(f"its residual overflows {str(dtype).removeprefix('torch.')}")
    return made


def split_batch(  # noqa: PLR0913
    W: Tensor,
    r: int,
    *,
    scale: float,
    mode: Mode,
    factors: Factors,
    dtype: torch.dtype,
    arithmetic: DeviceArithmetic | None = None,
) -> list[Split | None]:
    """Factor r singular triplets out of each of a batch of weights W (b, m, n), by the calls that one weight takes.

    Args: as those of `split`.

    Returns:
        For each weight its parts; None for one that `split` has to solve, or to refuse.

    Raises:
        torch.OutOfMemoryError: The device's memory is too small.
    """
    arithmetic = arithmetic or arithmetic_of(W.device)
    found = triplets_of_batch(W, r, mode=mode, arithmetic=arithmetic)
    solved = {item: triplets for item, triplets in enumerate(found) if triplets is not None}
    made: list[Split | None] = [None] * len(found)
    if solved:
        W = W if len(solved) == len(found) else W[list(solved)]
        parts = _parts(W, list(solved.values()), scale, factors, dtype, arithmetic)
        for item, part in zip(solved, parts, strict=True):
            made[item] = part
    return made


def _parts(
    W: Tensor,
    triplets: list[Triplets],
    scale: float,
    factors: Factors,
    dtype: torch.dtype,
    arithmetic: DeviceArithmetic,
) -> list[Split | None]:
    """The parts of W (m, n), or of each of a batch (b, m, n), with its triplets; None where the residual overflows."""
    batch = W.ndim == 3
    U, s, V = (
        torch.stack(parts) if batch else parts[0] for parts in zip(*((t.U, t.s, t.V) for t in triplets), strict=True)
    )
    B, A = _factors(U, s, V, scale, factors)
    made: list[Split | None] = []
    if factors in ("right", "left"):
        norms = torch.linalg.vector_norm(W, dim=(-2, -1), dtype=torch.float64).view(-1).tolist()
        for t, norm, one_W, one_B, one_A in zip(triplets, norms, *_each(W, B, A), strict=True):
            component = float(t.s.norm()) / norm if norm else 0.0
            nothing = Rounding(0.0, 0.0, 0.0, dict.fromkeys((*_CANDIDATES, "nf4"), 0.0))
            made.append(Split(one_W, one_B, one_A, t, component**2, nothing))
        return made
    residual, roundings = _residual(W, B, A, scale, dtype, arithmetic)
    s2 = s.square().sum(dim=-1).view(-1).tolist() if factors != "balanced" else [None] * len(triplets)
    for t, rounding, one_s2, R, one_B, one_A in zip(triplets, roundings, s2, *_each(residual, B, A), strict=True):
        if rounding is None:
            made.append(None)
            continue
        figures, W2 = rounding
        own = figures.component if one_s2 is None else _norm_ratio(one_s2, W2)
        made.append(Split(R, one_B, one_A, t, own**2, figures))
    return made


def _each(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The matrices of each tensor: (m, n) is one, (b, m, n) are several."""
    return [tensor.unbind() if tensor.ndim == 3 else (tensor,) for tensor in tensors]


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
        triplets = singular_triplets(rest, r, mode=mode, seed=seed, arithmetic=arithmetic)
        B, A = _factors(triplets.U, triplets.s, triplets.V, scale, "balanced")
        Q = nf4(W.to(kind) - scale * (B.to(kind) @ A.to(kind)), dtype).to(dtype)
        rest = W.to(kind) - Q.to(kind)
    triplets = singular_triplets(rest, r, mode=mode, seed=seed, arithmetic=arithmetic)
    B, A = _factors(triplets.U, triplets.s, triplets.V, scale, "balanced")
    if not bool(Q.isfinite().all()):
        raise ValueError(f"its residual overflows {str(dtype).removeprefix('torch.')}")
    D = scale * (B.to(kind) @ A.to(kind))
    norm, E, own = (float(torch.linalg.vector_norm(X, dtype=torch.float64)) for X in (W, rest - D, D))
    leak = E / own if own else 0.0
    component, error = (own / norm, E / norm) if norm else (0.0, 0.0)
    return Split(Q, B, A, triplets, component**2, Rounding(component, error, leak, {"nf4": leak}))


def _factors(U: Tensor, s: Tensor, V: Tensor, scale: float, factors: Factors) -> tuple[Tensor, Tensor]:
    """B (..., m, r) and A (..., r, n) in float32, of U (..., m, r), s (..., r) and V (..., n, r)."""
    if factors == "balanced":
        root = (s / scale).sqrt()
        return (U * root.unsqueeze(-2)).float(), (root.unsqueeze(-1) * V.mT).float()
    B, A = U.float(), V.mT.float().contiguous()
    if factors == "right":
        return torch.zeros_like(B), A
    return (B, torch.zeros_like(A)) if factors == "left" else (B, A)


def _residual(
    W: Tensor, B: Tensor, A: Tensor, scale: float, dtype: torch.dtype, arithmetic: DeviceArithmetic
) -> tuple[Tensor, list[tuple[Rounding, float] | None]]:
    """W - scale * B @ A (..., m, n) in dtype, for W (..., m, n), B (..., m, r) and A (..., r, n).

    And for each matrix the figures of its rounding and ||W||^2; None where the residual overflows.
    """
    m, n = W.shape[-2:]
    exact = B.device  # W's, or the CPU where W's has no float64
    B64, A64 = B.to(torch.float64), scale * A.to(torch.float64)
    residual = torch.empty(W.shape, dtype=dtype, device=W.device)
    rows = max(1, arithmetic.residual_block_bytes // (8 * n * math.prod(W.shape[:-2])))
    step = _SAMPLE if m * n > _SMALL else 1
    others = {name: candidate for name, candidate in _CANDIDATES.items() if candidate != dtype}
    # For each block the norms of W and E, and over the sample those of D and of each other candidate's E. They stay on
    # the device, and are read once.
    norms: list[Tensor] = []
    in_nf4: list[Tensor] = []  # the norms of E and D of the first rows, if the residual were quantised to NF4
    for top in range(0, m, rows):
        block = slice(top, top + rows)
        R = W[..., block, :].to(exact, torch.float64, copy=True)
        norms.append(_norm(R))
        add_product(R, B64[..., block, :], A64, -1)
        stored = round_once(R, dtype, search=arithmetic.search_ties)
        residual[..., block, :] = stored
        norms.append(_norm(R - stored.to(exact)))
        sample = R[..., ::step, :]
        norms.append(_norm(B64[..., block, :][..., ::step, :] @ A64))
        if top == 0:
            in_nf4 = [_norm(sample.float() - nf4(sample.float())).to(torch.float64), norms[-1]]
        norms += [_norm(sample - sample.to(candidate)) for candidate in others.values()]
    product = ((B64.mT @ B64) * (A64 @ A64.mT)).sum(dim=(-2, -1))  # ||B A||^2 = tr(B^T B A A^T)
    figures = torch.stack([product, *in_nf4, *norms]).view(3 + len(norms), -1).mT.tolist()
    return residual, [_rounding(own, list(others)) for own in figures]


def _norm(R: Tensor) -> Tensor:
    """The Frobenius norm of each matrix."""
    norm: Tensor = torch.linalg.vector_norm(R, dim=(-2, -1))
    return norm


def _rounding(figures: list[float], others: list[str]) -> tuple[Rounding, float] | None:
    """Of one matrix the figures of its rounding and ||W||^2, from what `_residual` measures; None if it overflows."""
    D2, nf4_E, nf4_D, *of_blocks = figures
    sums = torch.tensor(of_blocks, dtype=torch.float64).view(-1, 3 + len(others)).square().sum(dim=0)
    W2, E2, sampled_D2, *sampled_E2 = sums.tolist()
    if not math.isfinite(E2):
        return None
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
    return rounding, W2


def _norm_ratio(squared: float, squared_whole: float) -> float:
    """The ratio of two norms, from their squares; 0 where the second is 0."""
    return float((squared / squared_whole) ** 0.5) if squared_whole > 0 else 0.0
