"""Initialise a tiny model of a family, train its adapter, and compute the model's output."""

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


def pattern_options(family: Family) -> dict[str, Any]:
    """Options with rsLoRA, a rank pattern for the last target, and alpha patterns for the first and the last."""
    first, last = family.targets[0], family.targets[-1]
    return {"rslora": True, "rank_pattern": {last: 3}, "alpha_pattern": {first: 5, last: 7}}


def initialize_family(name: str | Family, folder: Path, dtype: str, **options: Any) -> tuple[Path, Path, Manifest]:
    family = FAMILIES[name] if isinstance(name, str) else name
    source, out = architectures.save(folder / "source", family, dtype), folder / "out"
    asked = InitOptions(
        model=str(source), out=str(out), **{"rank": 4, "target": family.targets, "device": ("cpu",), **options}
    )
    return source, out, initialize(asked)


def load(family: Family, folder: Path, adapter: Path | None = None, *, trainable: bool = False) -> Any:
    model: Any = getattr(transformers, family.auto).from_pretrained(folder, dtype=torch.float32)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)


def load_on_original(family: Family, source: Path, adapter: Path, *, trainable: bool = False) -> Any:
    """The original model with an adapter of it, as the loading lines of a method without a base load them."""
    return peft.PeftModel.from_pretrained(
        load(family, source), str(adapter), is_trainable=trainable, low_cpu_mem_usage=True
    )


def model_output(family: Family, model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(**architectures.model_inputs(family))[0]
    return output


def train(family: Family, out: Path, to: Path) -> Path:
    """Train the pair in `out` with a few steps of AdamW and save the adapter in `to`."""
    return train_model(family, load(family, out, out / "lora", trainable=True), to)


def train_model(family: Family, model: Any, to: Path) -> Path:
    """Train the adapter of a model with a few steps of AdamW and save it in `to`."""
    torch.manual_seed(0)
    target_output = torch.randn_like(model_output(family, model))
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=4e-3)
    for _ in range(10):
        (model(**architectures.model_inputs(family))[0] - target_output).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(to)
    return to
