"""Find out from the weights alone which base an adapter was made for, where no manifest says it.

The directions of a component are singular directions of the original weight W. On the r directions of A and the r of
B, W equals the component, and the residual is zero; an unrelated matrix has its average size there. Training turns the
directions, so for an adapter after long training this test says nothing.
"""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.tensor_file import SafetensorsShard
from milora_init.lora.folder import LoraAdapter
from milora_init.model.adaptable import ModelStructure
from milora_init.verify.tensors import open_tensors

MATCHES_ORIGINAL, MATCHES_RESIDUAL, MATCHES_NEITHER = "original", "residual", "other"
_NEAR = 0.3  # training turns the directions a little, rounding leaves a little behind
_SAMPLE = 5


def match_by_weights(base: Checkpoint, structure: ModelStructure, lora: LoraAdapter) -> str:
    """Whether `base` holds the weights that an adapter's components were taken out of, their residuals, or others.

    Judged by the median of a few modules, the first and the last among them; experts are not looked at.

    Raises:
        CheckpointError: A tensor that cannot be read.
    """
    modules = [m for m in lora.modules if m in structure.adaptable and lora.modules[m].experts == 1]
    sample = {modules[i * (len(modules) - 1) // max(1, _SAMPLE - 1)] for i in range(_SAMPLE)} if modules else set()
    distances = []
    factors = SafetensorsShard(lora.weights)
    try:
        with open_tensors(base) as weights:
            for module in sorted(sample):
                weight, pair = structure.adaptable[module], lora.modules[module]
                W = weights.read(weight.tensor)
                W = W.mT if weight.transposed else W
                if tuple(W.shape) != pair.shape:
                    return MATCHES_NEITHER
                distances.append(_distances(W, factors.read(pair.B), factors.read(pair.A), pair.scale))
    finally:
        factors.close()
    if not distances:
        return MATCHES_NEITHER
    to_original, to_residual = (median(column) for column in zip(*distances, strict=True))
    if min(to_original, to_residual) > _NEAR:
        return MATCHES_NEITHER
    return MATCHES_ORIGINAL if to_original < to_residual else MATCHES_RESIDUAL


def _distances(W: Tensor, B: Tensor, A: Tensor, scale: float) -> tuple[float, float]:
    """How far W (m, n) is, on the directions of B (m, r) and A (r, n), from scale * B @ A, and from nothing.

    Relative to the norm of scale * B @ A; the second to what an unrelated matrix would have there, if that is less.
    """
    left, B_core = torch.linalg.qr(B.double())
    right, A_core = torch.linalg.qr(A.double().mT)
    component = scale * B_core @ A_core.mT
    found = (left.mT @ W.double()) @ right
    norm = float(component.norm())
    if not norm:
        return float("inf"), float("inf")
    anywhere = component.shape[0] * float(W.double().norm()) / W.numel() ** 0.5
    return float((found - component).norm()) / norm, float(found.norm()) / max(min(norm, anywhere), 1e-300)
