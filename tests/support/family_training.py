"""Train the adapter of a tiny model of a family, and read the model's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from support import architectures
from support.families import FAMILIES, Family
from support.runs import initialize

NAMES = ["llama", "qwen2", "gpt2", "mixtral", "deepseek_v3", "gpt_oss", "llava", "t5"]
# With rsLoRA, a rank of its own for one target and an alpha of its own for another.
PLAIN: dict[str, Any] = {"alpha": 6}


def patterned(family: Family) -> dict[str, Any]:
    first, last = family.targets[0], family.targets[-1]
    return {"rslora": True, "rank_pattern": {last: 3}, "alpha_pattern": {first: 5, last: 7}}


def start(name: str, folder: Path, dtype: str, **options: Any) -> tuple[Path, Path, Manifest]:
    family = FAMILIES[name]
    source, out = architectures.save(folder / "source", family, dtype), folder / "out"
    asked = InitOptions(
        model=str(source), out=str(out), **{"rank": 4, "target": family.targets, "device": ("cpu",), **options}
    )
    return source, out, initialize(asked)


def load(family: Family, folder: Path, adapter: Path | None = None, *, trainable: bool = False) -> Any:
    model: Any = getattr(transformers, family.auto).from_pretrained(folder, dtype=torch.float32)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)


def answer(family: Family, model: Any) -> Tensor:
    with torch.no_grad():
        said: Tensor = model.eval()(**architectures.feed(family))[0]
    return said


def train(family: Family, out: Path, to: Path) -> Path:
    """Twenty steps of AdamW on the pair, all of the adapter's tensors moving."""
    torch.manual_seed(0)
    model = load(family, out, out / "lora", trainable=True).train()
    goal = torch.randn_like(answer(family, model))
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(20):
        (model(**architectures.feed(family))[0] - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(to)
    return to
