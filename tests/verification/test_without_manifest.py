"""A folder without a manifest: its weights show whether the adapter belongs to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.marks import wide
from support.tiny_models import TARGETS
from support.training import train

from milora_init.manifest import MANIFEST
from milora_init.verification.verify import verify

Built = Callable[..., Path]


@pytest.mark.parametrize("mode", ["min", wide("max"), "mid", wide("random")])
@pytest.mark.parametrize("kind", ["llama", wide("gpt2")])
@pytest.mark.parametrize("steps", [0, 2])
def test_without_a_manifest_the_weights_show_which_adapter_fits(
    mode: str, kind: str, steps: int, checkpoint: Built, start: Callable[..., Any], own: Built, tmp_path: Path
) -> None:
    """The adapter, trained or not, in the residual's folder, in the original's, and in another model's."""
    start(checkpoint(kind), mode=mode, target=TARGETS[kind])
    out, lora = tmp_path / "out", tmp_path / "out" / "lora"
    if steps:
        shutil.copytree(train(out, tmp_path / "trained", steps), lora, dirs_exist_ok=True)
    (out / MANIFEST).unlink()
    assert verify(str(out)).code == "no_manifest"
    original = own(kind)
    shutil.copytree(lora, original / "lora")
    verdict = verify(str(original))
    assert verdict.code == "original_with_adapter"
    assert "would count twice" in verdict.differences[0].what
    assert "milora-init convert" in verdict.differences[0].hint
    torch.manual_seed(3)
    for path in original.glob("*.safetensors"):
        save_file({k: torch.randn_like(v) * v.std() for k, v in load_file(path).items()}, path, {"format": "pt"})
    assert verify(str(original)).code == "unknown"
