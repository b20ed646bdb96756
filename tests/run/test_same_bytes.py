"""Weights large enough for the Krylov solver: the same bytes of shards and adapter for any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_models import contents

from milora_init.manifest import MANIFEST, Manifest

RUN = """
import sys, torch
from milora_init import InitOptions, initialize

assert torch.get_num_threads() == int(sys.argv[2]), torch.get_num_threads()
options = InitOptions(model=sys.argv[1], out="out", rank=8, device=("cpu",), target=("q_proj", "k_proj", "up_proj"))
initialize(options)
"""


def test_any_number_of_threads_writes_the_same_bytes(
    start: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="900KB")
    made, processes = {}, {}
    for threads in (1, 2, 3):
        (tmp_path / str(threads)).mkdir()
    for threads in (2, 3):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"}  # 3 on 2 cores too
        command = [sys.executable, "-c", RUN, str(tmp_path / "model"), str(threads)]
        processes[threads] = subprocess.Popen(
            command, cwd=tmp_path / str(threads), env=environment, stderr=subprocess.PIPE, text=True
        )
    monkeypatch.chdir(tmp_path / "1")
    assert torch.get_num_threads() == 1
    manifest = start(tmp_path / "model", out="out", rank=8, target=("q_proj", "k_proj", "up_proj"))
    assert {(record.shape, record.certificate.path) for record in manifest.weights} == {
        ((512, 512), "lanczos"),
        ((1024, 512), "eigh"),
        ((256, 512), "eigh"),
    }
    for threads, process in processes.items():
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, f"{threads} threads: {stderr}"
    for threads in (1, 2, 3):
        made[threads] = contents(tmp_path / str(threads) / "out")
        del made[threads][MANIFEST]  # it holds times
    assert len([name for name in made[1] if name.endswith(".safetensors")]) >= 3
    assert made[1] == made[2] == made[3]
