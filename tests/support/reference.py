"""The paper's method in float64, independent of milora_init. The tests compare every fast path with it.

MiLoRA, arXiv 2406.09044: W = sum s_i u_i v_i^T; the adapter takes the r components of one end, B = U sqrt(s / scale),
A = sqrt(s / scale) V^T, and the base keeps W - scale * B @ A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Spectrum:
    """W (m, n) as U (m, k), s (k,) descending, V (n, k), all in float64."""

    U: Tensor
    s: Tensor
    V: Tensor

    def component(self, indices: list[int]) -> Tensor:
        """The sum of the components with these indices, (m, n)."""
        return (self.U[:, indices] * self.s[indices]) @ self.V[:, indices].T

    def tolerance(self, indices: list[int]) -> float:
        """Bound on the error of scale * B @ A in the Frobenius norm, with B and A stored in float32.

        Rounding changes B by at most eps/2 * ||B||_F and A by at most eps/2 * ||A||_F, so the product changes by at
        most eps * sqrt(sum s) * sqrt(max s). The relative error of the float64 solver is at most eps64 * s_max**2 /
        gap(s**2), as for an eigenproblem of the Gram matrix. The factor 2 covers second-order terms.
        """
        taken = self.s[indices]
        rest = self.s[[i for i in range(len(self.s)) if i not in set(indices)]]
        gap = float((taken[:, None] ** 2 - rest[None, :] ** 2).abs().min()) if len(rest) else float("inf")
        solver = len(self.s) * EPS64 * float(self.s[0]) ** 2 / gap * float(taken.norm())
        return 2 * (EPS32 * float((taken.sum() * taken.max()).sqrt()) + solver)


def spectrum(W: Tensor) -> Spectrum:
    """Full SVD in float64."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return Spectrum(U, s, Vh.T)


def wanted(k: int, r: int, mode: str) -> list[int]:
    """Indices into the descending spectrum of length k that a mode other than random takes."""
    start = {"min": k - r, "max": 0, "mid": (k - r) // 2}[mode]
    return list(range(start, start + r))


def drawn(spectrum: Spectrum, D: Tensor, r: int) -> list[int]:
    """Indices of the r components whose sum is D (m, n): those where u^T D v is more than half of s."""
    share = torch.einsum("mk,mn,nk->k", spectrum.U, D.double(), spectrum.V) / spectrum.s
    indices: list[int] = torch.nonzero(share > 0.5).flatten().tolist()
    assert len(indices) == r, f"D is the sum of {len(indices)} components, not of {r}"
    return indices


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit in the last place of x in dtype, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp_min(info.smallest_normal))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1)


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (float64) rounded to the nearest value of dtype, ties to even, without an intermediate float32."""
    if dtype == torch.float64:
        return x.double()
    unit = ulp(x, dtype)
    return (torch.round(x.double() / unit) * unit).to(dtype)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8),
        b.contiguous().reshape(-1).view(torch.uint8),
    )
