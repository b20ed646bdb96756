"""Checks of singular triplets against a full float64 SVD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from milora_init.linalg.svd import Triplets, wanted_indices
from milora_init.methods import Mode

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


def check_values(W: Tensor, t: Triplets, r: int, mode: Mode) -> None:
    """Compare s with the truth: within the bound that follows from the residual (Weyl), and with the right indices."""
    truth = torch.linalg.svdvals(W.double())
    wanted = truth[wanted_indices(truth.numel(), r, mode, 0)]
    q = truth.numel()
    assert float((t.s - wanted).abs().max()) <= (10 * q * EPS + 2 * t.certificate.residual) * float(truth[0])
    rough = mode == "min" and t.certificate.path in ("mixed", "lanczos")  # these estimate s_max from below
    assert t.s_max == pytest.approx(float(truth[0]), rel=0.1 if rough else 1e-6, abs=1e-300)


def check_component(W: Tensor, t: Triplets, r: int, mode: Mode) -> None:
    """Compare the component with the truth: within the certified error, and within 1e-7."""
    scale = float(W.double().abs().max())
    U, s, Vh = torch.linalg.svd(W.double() / scale, full_matrices=False)
    wanted = wanted_indices(s.numel(), r, mode, 0)
    truth = (U[:, wanted] * s[wanted]) @ Vh[wanted]
    error = float((component(t) / scale - truth).norm() / truth.norm())
    # The reference has an error too: q * eps * s_max / gap in each vector.
    others = torch.tensor([x for i, x in enumerate(s.tolist()) if i not in wanted.tolist()], dtype=s.dtype)
    amplification = (s[wanted] / (s[wanted].unsqueeze(1) - others).abs().amin(dim=1)).clamp_min(1).norm()
    reference = s.numel() * EPS * float(s[0] * amplification / truth.norm())
    assert error <= 2 * certified(t) + reference
    assert error <= max(1e-7, reference)
