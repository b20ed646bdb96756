"""Tests that need a CUDA device: its results agree with the CPU's, and a whole run works on it.

python -m pytest -m gpu
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import matrices
from support.tiny_models import TARGETS, contents

from milora_init.linalg.svd import singular_triplets
from milora_init.manifest import MANIFEST, Manifest
from milora_init.methods import Mode
from milora_init.verification.verify import verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("shape", [(600, 600), (560, 1700), (1700, 560), (200, 300)], ids=str)
@pytest.mark.parametrize("mode", ["min", "max", "mid"])
def test_the_component_on_a_gpu_is_that_of_the_cpu(shape: tuple[int, int], mode: Mode) -> None:
    W = matrices.language_model_like(*shape)
    here, there = singular_triplets(W, 10, mode=mode), singular_triplets(W.cuda(), 10, mode=mode)
    assert there.U.is_cuda
    D, E = ((t.U * t.s).cpu() @ t.V.mT.cpu() for t in (here, there))
    assert float((D - E).norm() / D.norm()) < 2 * 5e-8  # each result is within the solver's tolerance


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_run_on_a_gpu_makes_a_valid_pair_and_the_same_bytes_twice(
    kind: str, start: Callable[..., Manifest], checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    made = []
    for folder in ("once", "twice"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        manifest = start(checkpoint(kind, "bfloat16"), out="out", target=TARGETS[kind], device=("cuda",))
        assert all(record.device.startswith("cuda") for record in manifest.weights)
        made.append(contents(Path("out")))
        del made[-1][MANIFEST]  # it holds times
    assert made[0] == made[1]
    assert verify("out", model=str(checkpoint(kind, "bfloat16")), all_components=True).ok
