"""Checks of singular triplets against a full float64 SVD."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from milora_init.linalg.svd import Triplets, wanted_indices
from milora_init.methods import Mode
from support import reference

EPS = torch.finfo(torch.float64).eps


def component(t: Triplets) -> Tensor:
    return (t.U * t.s) @ t.V.mT


def certified(t: Triplets) -> float:
    """The certified component error; inf if there is none."""
    return math.inf if t.certificate.component_error is None else t.certificate.component_error


def check_properties(W: Tensor, t: Triplets, r: int) -> None:
    """Shapes, order, orthonormality, residual and signs: these must hold for every matrix."""
    m, n = W.shape
    q = min(m, n)
    assert (t.U.shape, t.s.shape, t.V.shape) == ((m, r), (r,), (n, r))
    assert t.U.dtype == t.s.dtype == t.V.dtype == torch.float64
    assert bool((t.s[:-1] >= t.s[1:]).all())
    assert bool((t.s >= 0).all())
    eye = torch.eye(r, dtype=torch.float64)
    assert float((t.U.mT @ t.U - eye).abs().max()) < 10 * q * EPS
    assert float((t.V.mT @ t.V - eye).abs().max()) < 10 * q * EPS
    scale = float(W.double().abs().max()) or 1.0
    X, s, s_max = W.double() / scale, t.s / scale, t.s_max / scale
    residual = max(
        float((X @ t.V - t.U * s).norm(dim=0).max()),
        float((X.mT @ t.U - t.V * s).norm(dim=0).max()),
    )
    assert residual <= t.certificate.residual * s_max * 1.5 + q * EPS * s_max
    top = t.V.abs().max(dim=0)
    assert bool((t.V.gather(0, top.indices.unsqueeze(0)) > -2e-6).all())
    assert math.isfinite(t.certificate.residual)


def truth_of(W: Tensor) -> tuple[float, reference.Spectrum]:
    """The scale of W, its largest entry, and the full SVD of W / scale. The next test of the same matrix reuses it."""
    return _truth(W.dtype, tuple(W.shape), W.contiguous().view(torch.uint8).numpy().tobytes())


@functools.lru_cache(maxsize=1)
def _truth(dtype: torch.dtype, shape: tuple[int, ...], content: bytes) -> tuple[float, reference.Spectrum]:
    W = torch.frombuffer(bytearray(content), dtype=dtype).view(shape).double()
    scale = float(W.abs().max()) or 1.0
    return scale, reference.spectrum(W / scale)


def check_values(W: Tensor, t: Triplets, r: int, mode: Mode) -> None:
    """Compare s with the truth: within the bound that follows from the residual (Weyl), and with the right indices."""
    scale, truth = truth_of(W)
    q = truth.s.numel()
    s, s_max = truth.s[wanted_indices(q, r, mode, 0)], float(truth.s[0])
    assert float((t.s / scale - s).abs().max()) <= (10 * q * EPS + 2 * t.certificate.residual) * s_max
    rough = mode == "min" and t.certificate.path in ("mixed", "lanczos")  # these estimate s_max from below
    assert t.s_max / scale == pytest.approx(s_max, rel=0.1 if rough else 1e-6, abs=1e-300)


def check_component(W: Tensor, t: Triplets, r: int, mode: Mode) -> None:
    """Compare the component with the truth: within the certified error, and within 1e-7."""
    scale, whole = truth_of(W)
    s, wanted = whole.s, wanted_indices(whole.s.numel(), r, mode, 0)
    truth = whole.component(wanted.tolist())
    error = float((component(t) / scale - truth).norm() / truth.norm())
    # The reference has an error too: q * eps * s_max / gap in each vector.
    others = torch.tensor([x for i, x in enumerate(s.tolist()) if i not in wanted.tolist()], dtype=s.dtype)
    amplification = (s[wanted] / (s[wanted].unsqueeze(1) - others).abs().amin(dim=1)).clamp_min(1).norm()
    reference_error = s.numel() * EPS * float(s[0] * amplification / truth.norm())
    assert error <= 2 * certified(t) + reference_error
    assert error <= max(1e-7, reference_error)
