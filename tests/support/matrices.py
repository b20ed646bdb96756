"""Matrices with hard spectra, small enough that a full float64 SVD gives the truth.

Every generator is seeded: the same arguments give the same matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from support.marks import wide

F64 = torch.float64
Shape = tuple[int, int]


def gaussian(m: int, n: int, *, seed: int = 0) -> Tensor:
    """Independent normal entries, (m, n) float64."""
    return torch.randn(m, n, dtype=F64, generator=torch.Generator().manual_seed(seed))


def orthonormal(m: int, n: int, *, seed: int = 0) -> Tensor:
    """(m, n) with orthonormal columns, m >= n."""
    Q: Tensor = torch.linalg.qr(gaussian(m, n, seed=seed)).Q
    return Q


def with_spectrum(s: Tensor, m: int, n: int, *, seed: int = 0) -> Tensor:
    """(m, n) with the singular values s (min(m, n),) and random singular vectors."""
    q = min(m, n)
    W: Tensor = (orthonormal(m, q, seed=seed) * s.to(F64)) @ orthonormal(n, q, seed=seed + 1).mT
    return W


def language_model_like(m: int, n: int, *, seed: int = 0) -> Tensor:
    """A Gaussian bulk and a power-law head of one eighth of the directions, bfloat16."""
    k = max(1, min(m, n) // 8)
    head = 30.0 / torch.arange(1, k + 1, dtype=F64) ** 0.8
    bulk = gaussian(m, n, seed=seed) * 0.02
    left, right = orthonormal(m, k, seed=seed + 1), orthonormal(n, k, seed=seed + 2)
    edge = 0.02 * (m**0.5 + n**0.5)
    W: Tensor = bulk + (left * (head * edge)) @ right.mT
    return W.to(torch.bfloat16)


def moderate_head(m: int, n: int, *, seed: int = 1) -> Tensor:
    """A Gaussian bulk and 48 directions of up to four times its edge, bfloat16; the cost tests use it."""
    generator = torch.Generator().manual_seed(seed)
    k = min(48, m // 4, n // 4)
    bulk = torch.randn(m, n, generator=generator).mul_(0.02)
    sizes = 0.16 * (m * n) ** 0.25 * torch.arange(1, k + 1).float() ** -0.7
    left, right = torch.randn(m, k, generator=generator) / m**0.5, torch.randn(n, k, generator=generator) / n**0.5
    return bulk.addmm_(left * sizes, right.mT).to(torch.bfloat16)


def flat(m: int, n: int) -> Tensor:
    return with_spectrum(torch.linspace(1.0, 0.9, min(m, n)), m, n)


def power_law(m: int, n: int) -> Tensor:
    return with_spectrum(torch.arange(1, min(m, n) + 1, dtype=F64) ** -1.0, m, n)


def steep(m: int, n: int) -> Tensor:
    """Singular values from 1 to 1e-6, evenly spaced in the logarithm."""
    return with_spectrum(torch.logspace(0, -6, min(m, n), dtype=F64), m, n)


def clustered(m: int, n: int, *, lo: int = 6, hi: int = 14) -> Tensor:
    """Singular values lo to hi, from either end, agree to twelve digits: a cut at rank 8 is inside the cluster."""
    q = min(m, n)
    s = torch.linspace(2.0, 1.0, q, dtype=F64)
    for part in (slice(lo, hi), slice(q - hi, q - lo)):
        s[part] = s[part].mean() * (1 + 1e-12 * torch.arange(hi - lo, 0, -1, dtype=F64))
    return with_spectrum(s, m, n)


def rank_deficient(m: int, n: int) -> Tensor:
    """Exact rank q/2: the factors are small integers, so that every product is exact."""
    k = max(1, min(m, n) // 2)
    left = gaussian(m, k).mul(3).round()
    return left @ gaussian(k, n, seed=1).mul(3).round()


def zero(m: int, n: int) -> Tensor:
    return torch.zeros(m, n, dtype=F64)


def dead_rows_and_columns(m: int, n: int) -> Tensor:
    W = gaussian(m, n)
    W[1 : 1 + m // 12] = 0
    W[:, n // 3 : n // 3 + max(1, n // 16)] = 0
    return W


def duplicated_rows(m: int, n: int) -> Tensor:
    W = gaussian(m, n)
    k = m // 3
    W[:k] = W[k : 2 * k]
    return W


def outlier(m: int, n: int) -> Tensor:
    """One singular value is 1e8 times the smallest; float64 does not resolve the squared ratio."""
    s = torch.linspace(2.0, 1.0, min(m, n), dtype=F64)
    s[0] = 1e8
    return with_spectrum(s, m, n)


def orthogonal(m: int, n: int) -> Tensor:
    return with_spectrum(torch.ones(min(m, n), dtype=F64), m, n)


def float16_near_overflow(m: int, n: int) -> Tensor:
    return (gaussian(m, n) * 3e4).clamp(-65504, 65504).to(torch.float16)


def subnormal(m: int, n: int) -> Tensor:
    """float32 entries of 1e-40: below the smallest normal number."""
    return (gaussian(m, n) * 1e-40).to(torch.float32)


def huge(m: int, n: int) -> Tensor:
    """float64 entries whose squares overflow."""
    return gaussian(m, n) * 1e200


# The cut is between distinct singular values, so the component is unique.
DISTINCT: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": gaussian,
    "language_model_like": language_model_like,
    "flat": flat,
    "power_law": power_law,
    "steep": steep,
    "outlier": outlier,
    "float16_near_overflow": float16_near_overflow,
    "subnormal": subnormal,
    "huge": huge,
}

# The cut is between equal or zero singular values, so many components are right.
AMBIGUOUS: dict[str, Callable[[int, int], Tensor]] = {
    "clustered": clustered,
    "rank_deficient": rank_deficient,
    "zero": zero,
    "dead_rows_and_columns": dead_rows_and_columns,
    "duplicated_rows": duplicated_rows,
    "orthogonal": orthogonal,
}


def with_shapes(names: Iterable[str], shape: Shape, other: Shape, *further: Shape) -> list[Any]:
    """Cases (name, shape): four spectra in one shape, a language model's in another; all further ones are wide."""
    names, like = tuple(names), "language_model_like"
    four = [(name, shape) for name in names[:4]]
    rest = [*((name, shape) for name in names[4:]), *((name, other) for name in names if name != like)]
    return [*four, (like, other), *(wide(*case) for case in rest), *(wide(n, one) for one in further for n in names)]
