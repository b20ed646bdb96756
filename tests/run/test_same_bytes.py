"""Weights large enough for the Krylov solver: the same bytes of shards and adapter for any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support import fork_server
from support.runs import initialize
from support.tiny_models import contents

from milora_init.manifest import MANIFEST, Manifest
from milora_init.options import InitOptions

TARGET = ("q_proj", "k_proj", "up_proj")


def initialize_with_threads(model: str, threads: int) -> None:
    torch.set_num_threads(threads)
    initialize(InitOptions(model=model, out="out", rank=8, device=("cpu",), target=TARGET))


def test_any_number_of_threads_writes_the_same_bytes(
    start: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="900KB")
    made = {}
    for threads in (1, 2, 3):
        (tmp_path / str(threads)).mkdir()
    for threads in (2, 3):  # MKL is told to start 3 on 2 cores too
        done = fork_server.run(
            initialize_with_threads, str(tmp_path / "model"), threads,
            cwd=tmp_path / str(threads), environment={"MKL_DYNAMIC": "FALSE"},
        )  # fmt: skip
        assert done.returncode == 0, f"{threads} threads: {done.stderr}"
    monkeypatch.chdir(tmp_path / "1")
    assert torch.get_num_threads() == 1
    manifest = start(tmp_path / "model", out="out", rank=8, target=TARGET)
    assert {(record.shape, record.certificate.path) for record in manifest.weights} == {
        ((512, 512), "lanczos"),
        ((1024, 512), "eigh"),
        ((256, 512), "eigh"),
    }
    for threads in (1, 2, 3):
        made[threads] = contents(tmp_path / str(threads) / "out")
        del made[threads][MANIFEST]  # it holds times
    assert len([name for name in made[1] if name.endswith(".safetensors")]) >= 3
    assert made[1] == made[2] == made[3]
