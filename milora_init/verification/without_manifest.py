"""Judge a folder that has no milora_init.json: find out from the weights alone what an adapter belongs to.

The columns of B and the rows of A are singular directions of the original weight W. Between these directions W is
equal to the component, the residual is zero, and an unrelated matrix has entries of its average size. Training turns
the directions, so the test says nothing about an adapter after long training.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from milora_init.checkpoint.dequantise import locate
from milora_init.checkpoint.folder import Checkpoint, open_checkpoint
from milora_init.checkpoint.tensor_file import SafetensorsShard
from milora_init.errors import MiloraError
from milora_init.lora.folder import CONFIG_FILE, LORA_CONFIG, LORA_FOLDER, LoraAdapter, read_lora
from milora_init.manifest import MANIFEST
from milora_init.model.adaptable import ModelStructure, read_structure
from milora_init.records import MERGED, unfinished_output
from milora_init.verification.verdict import Finding, Verdict, note

_CLOSE = 0.3  # training turns the directions a little, and rounding leaves a part of the component in the residual
_SAMPLE = 5  # modules
BaseWeights = Literal["original", "residual", "other"]


def verify_without_manifest(given: str, folder: Path, adapter: Path | None, *, trust_remote_code: bool) -> Verdict:
    """The verdict on a folder without a manifest.

    Args:
        given: The folder as the user wrote it.
        folder: The folder.
        adapter: An adapter; the one in the folder if None.
        trust_remote_code: Run the code in the folder if its config.json names it.
    """
    checked = {"files": 0}
    if unfinished := unfinished_output(folder):
        what = f"neither {MANIFEST} nor {MERGED}: the record is written last, so this run has not finished"
        missing = Finding(given, what + unfinished[0], unfinished[1])
        return Verdict(given, "unfinished", (missing,), checked)
    hint = "if milora-init made this folder, copy milora_init.json from where it was made"
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        hint = f"if this adapter was trained: milora-init verify PAIR --adapter {given}"
    missing = Finding(MANIFEST, "missing: nothing says what was written", hint)
    lora_folder = folder / LORA_FOLDER if (folder / LORA_CONFIG).is_file() else folder
    lora_folder = adapter or lora_folder
    weights: BaseWeights = "other"
    with suppress(MiloraError):  # a folder that cannot be read is unknown
        base = open_checkpoint(folder)
        shapes = {name: info.shape for name, info in base.tensors.items()}
        lora = read_lora(lora_folder)
        structure = read_structure(folder, base.config, shapes, trust_remote_code=trust_remote_code)
        if structure.other_class and lora.modules.keys().isdisjoint(structure.modules):
            structure = read_structure(folder, base.config, shapes, trust_remote_code=trust_remote_code, text_only=True)
        weights = find_base_weights(base, structure, lora)
    if weights == "original":
        what = "the base still holds the components that this adapter adds: they would count twice"
        hint = (
            "use it with the residual base it was made with; to use it, trained, on the original: milora-init convert"
        )
        return Verdict(given, "original_with_adapter", (Finding(str(lora_folder), what, hint), missing), checked)
    nothing_else = note(MANIFEST, "without it nothing else was compared")
    return Verdict(given, "no_manifest" if weights == "residual" else "unknown", (missing, nothing_else), checked)


def find_base_weights(base: Checkpoint, structure: ModelStructure, lora: LoraAdapter) -> BaseWeights:
    """Whether `base` holds the weights that an adapter's components were taken from, their residuals, or others.

    Decided by the median over a few modules, with the first and the last one. Experts are left out.

    Raises:
        CheckpointError: A tensor that cannot be read.
    """
    modules = [m for m in lora.modules if m in structure.adaptable and lora.modules[m].experts == 1]
    sample = {modules[i * (len(modules) - 1) // max(1, _SAMPLE - 1)] for i in range(_SAMPLE)} if modules else set()
    distances = []
    adapter_weights = SafetensorsShard(lora.weights)
    try:
        for module in sorted(sample):
            weight, factors = structure.adaptable[module], lora.modules[module]
            W = locate(base, weight.tensor).read()
            W = W.mT if weight.transposed else W
            if tuple(W.shape) != factors.shape:
                return "other"
            B, A = adapter_weights.read(factors.B), adapter_weights.read(factors.A)
            distances.append(_distances(W, B, A, factors.scale))
    finally:
        adapter_weights.close()
    if not distances:
        return "other"
    to_original, to_residual = (median(column) for column in zip(*distances, strict=True))
    if min(to_original, to_residual) > _CLOSE:
        return "other"
    return "original" if to_original < to_residual else "residual"


def _distances(W: Tensor, B: Tensor, A: Tensor, scale: float) -> tuple[float, float]:
    """Distances of Q_B^T W Q_A from that of the component D = scale * B @ A, and from zero.

    Q_B and Q_A are orthonormal bases of the columns of B (m, r) and of the rows of A (r, n); W is (m, n). The first
    distance is relative to ||D||_F. The second is relative to ||D||_F, or to what Q_B^T W Q_A would have if W were
    unrelated to D, whichever is less.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    component = scale * R_B @ R_A.mT
    found = (Q_B.mT @ W.double()) @ Q_A
    norm = float(component.norm())
    if not norm:
        return float("inf"), float("inf")
    unrelated = component.shape[0] * float(W.double().norm()) / W.numel() ** 0.5
    return float((found - component).norm()) / norm, float(found.norm()) / max(min(norm, unrelated), 1e-300)
