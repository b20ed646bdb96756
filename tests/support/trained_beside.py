"""Train a pair with more than factors (modules, embeddings, tokens, biases, a head, DoRA), as PEFT's users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from support import architectures
from support.families import Family


def load(family: Family, folder: Path, *, rows: int | None = None, auto: str = "", **options: Any) -> Any:
    """The model of a folder, with this many rows of the vocabulary."""
    model: Any = getattr(transformers, auto or family.auto).from_pretrained(folder, dtype=torch.float32, **options)
    if rows:
        model.resize_token_embeddings(rows)
    return model


def with_settings(out: Path, base: Any, **settings: Any) -> Any:
    """The pair, ready to train with more settings of PEFT; docs/trainers.md has these lines."""
    config = peft.LoraConfig.from_pretrained(str(out), subfolder="lora")
    for name, value in settings.items():
        setattr(config, name, value)
    model = peft.get_peft_model(base, config)
    start = peft.load_peft_weights(str(out), subfolder="lora")
    named = {key.replace(".weight", ".default.weight"): value for key, value in start.items()}
    assert not model.load_state_dict(named, strict=False).unexpected_keys
    for module in model.modules():
        for variant in getattr(module, "lora_variant", {}).values():  # DoRA: the lengths with the initial factors
            variant.init(module, "default", **config.to_dict())
    return model


def outputs(family: Family, model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**architectures.model_inputs(family))[0]
    return found


def train(family: Family, model: Any, to: Path, steps: int = 3, **saving: Any) -> Path:
    """Train what requires a gradient for a few steps, and save the adapter."""
    torch.manual_seed(0)
    goal = torch.randn_like(outputs(family, model))
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        (model(**architectures.model_inputs(family))[0] - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(to, **saving)
    return to
