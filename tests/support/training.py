"""Train a pair with PEFT and compute logits, for the tests of merge and convert."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor

TOKENS = torch.tensor([[1, 5, 9, 13, 2, 7]])


def load(base: Path, adapter: Path | None = None, *, trainable: bool = False) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def train(out: Path, to: Path, steps: int = 8) -> Path:
    """Train the pair in `out` with AdamW; save the adapter in `to`."""
    torch.manual_seed(0)
    model = load(out, out / "lora", trainable=True).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(to)
    return to


def digests(*folders: Path) -> dict[Path, str]:
    """SHA-256 of every file in these folders."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }
