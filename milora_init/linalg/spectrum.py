"""All singular values of a weight, in float64, without vectors; and what rounding would do to a component of it.

How. The eigenvalues of the Gram matrix X^T X (q, q) are the squares of the singular values of X (p, q), p >= q. LAPACK
finds them without eigenvectors in two stages, nearly all in matrix products. Squaring costs digits at the small end: a
value s gets a relative error of about eps * (s_max / s)^2. Values below 2^-13 of the largest are therefore computed
again, from the weight itself: from a Krylov space where they are few, by a full float64 SVD without vectors else.

Precision. Relative errors are below 1e-8, as far as float64 resolves them at all: a backward stable SVD has an error of
a few eps * s_max in every value.

Cost. p q^2 operations for the Gram matrix, 4 q^3 / 3 for its eigenvalues; 3 q^2 float64 numbers of memory.

Sources: the rounding of a component: `split`; the effective rank: O. Roy and M. Vetterli (2007), EUSIPCO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic
from milora_init.linalg.certificate import NotConverged
from milora_init.linalg.cost import uses_krylov
from milora_init.linalg.svd import LibraryFailure, krylov_triplets, library_failures, readable

_RESOLVED = 2.0**-13  # times s_max: above it the Gram matrix gives a value to 1e-8, with a margin of 10
_SPARE = 4  # more values than are needed: the cut is then less often inside a cluster
_TOLERANCE = 5e-8  # of the component of the small values; the values themselves are better by its square
_SAMPLE = 1 << 18  # entries of the weight on which a rounding is tried
CANDIDATES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
}  # fmt: skip


def singular_values(W: Tensor, *, arithmetic: DeviceArithmetic | None = None) -> Tensor:
    """All min(m, n) singular values of W (m, n), descending, in float64 on the CPU.

    Args:
        W: (m, n), of any floating dtype, on any device.
        arithmetic: The algorithms to use; None for those of W's device.

    Raises:
        ValueError: W is not a floating-point matrix, or has NaN or Inf entries; or LAPACK does not converge.
        torch.OutOfMemoryError: The device's memory is too small.
    """
    if W.ndim != 2 or not W.is_floating_point():
        raise ValueError(f"W is {W.dtype} of shape {tuple(W.shape)}, expected a floating-point matrix")
    X = readable(W, arithmetic)
    p, q = X.shape
    try:
        with library_failures():
            G = X.gram()
            s = torch.linalg.eigvalsh(G).clamp_(min=0).sqrt_().flip(0)
            small = int((s < _RESOLVED * s[0]).sum())
            wanted = min(q, small + _SPARE)
            if small and uses_krylov(p, q, wanted, "min"):
                s[q - wanted :] = krylov_triplets(X, wanted, "min", _TOLERANCE, G)[0].s
                small = 0
    except (LibraryFailure, NotConverged):
        small = q
    if small:
        try:
            with library_failures():
                s = torch.linalg.svdvals(X.to_float64())
        except LibraryFailure as failure:
            raise ValueError(f"no algorithm converges on it: {failure}") from failure
    ordered: Tensor = s.cpu().sort(descending=True).values
    return ordered * math.ldexp(1.0, X.exponent)


def stable_rank(s: Tensor) -> float:
    """||W||_F^2 / s_max^2 of a spectrum s (q,), between 1 and q; 0 of a zero matrix."""
    return float((s / s[0]).square().sum()) if s[0] > 0 else 0.0


def effective_rank(s: Tensor) -> float:
    """exp(H) of a spectrum s (q,), with the entropy H of s / sum(s) (Roy and Vetterli); 0 of a zero matrix."""
    if not s[0] > 0:
        return 0.0
    share = s / s.sum()
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def energy(s: Tensor, part: slice) -> float:
    """The share of a part of the spectrum s (q,) in the squared Frobenius norm; 0 of a zero matrix."""
    squares = (s / s[0]).square() if s[0] > 0 else s
    total = float(squares.sum())
    return float(squares[part].sum()) / total if total else 0.0


def gap(s: Tensor, cut: int) -> float | None:
    """The gap between s[cut - 1] and s[cut] of a spectrum s (q,), relative to the larger; None where nothing is cut."""
    if not 0 < cut < s.numel():
        return None
    return float(1 - s[cut] / s[cut - 1]) if s[cut - 1] > 0 else 0.0


def estimated_leaks(W: Tensor, component_norms: Sequence[float], seed: int) -> list[dict[str, float | None]]:
    """The leak that components of W (m, n) with these Frobenius norms would have, by dtype of the residual.

    A component of minor triplets is dense, and its entries are spread like Gaussian ones. So a Gaussian matrix of the
    same norm takes its place, on a sample of the rows; `split` measures the real one. None: the residual overflows.
    The estimate is 0 for a component of zero.

    Args:
        W: The weight, of any floating dtype, on any device.
        component_norms: ||D||_F of each component.
        seed: Draws the Gaussian matrix.
    """
    m, n = W.shape
    step = max(1, -(-m * n // _SAMPLE))
    sample = W[::step].to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(sample.shape, generator=generator, dtype=torch.float64)
    noise /= torch.linalg.vector_norm(noise)
    found: list[dict[str, float | None]] = []
    for norm in component_norms:
        sampled_norm = norm * (sample.shape[0] / m) ** 0.5
        if not sampled_norm:
            found.append(dict.fromkeys(CANDIDATES, 0.0))
            continue
        residual = torch.add(sample, noise, alpha=-sampled_norm)
        leaks: dict[str, float | None] = {}
        for name, dtype in CANDIDATES.items():
            error = float(torch.linalg.vector_norm(residual - residual.to(dtype)))
            leaks[name] = error / sampled_norm if math.isfinite(error) else None
        found.append(leaks)
    return found
