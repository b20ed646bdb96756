"""Build tiny random models of the families, make inputs for them, and save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from support.families import IMAGE, Family

TOKENS = torch.tensor([[3, 5, 9, 13, 4, 7]])


def config_of(family: Family) -> Any:
    return getattr(transformers, family.config)(**family.sizes)


def build(family: Family) -> nn.Module:
    """A random model; its weights are large enough that a missing component changes the output."""
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, family.architecture)(config_of(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.copy_(torch.randn_like(parameter)).mul_(0.3)
    return model.eval()


def model_inputs(family: Family) -> dict[str, Tensor]:
    """Inputs for a forward pass, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    if family.inputs == "speech":
        features = torch.randn(1, 8, 32, generator=generator)
        return {"input_features": features, "decoder_input_ids": TOKENS}
    if family.inputs == "seq2seq":
        return {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    if family.inputs == "image":
        ids = torch.cat([torch.full((1, 4), IMAGE), TOKENS], dim=1)
        pixels = torch.randn(1, 3, 8, 8, generator=generator)
        more = {"token_type_ids": (ids == IMAGE).long()} if family.config == "Gemma3Config" else {}
        if family.config == "Mistral3Config":
            more = {"image_sizes": torch.tensor([[8, 8]])}
        return {"input_ids": ids, "pixel_values": pixels, **more}
    if family.inputs == "qwen image":
        ids = torch.cat([torch.tensor([[61]]), torch.full((1, 1), IMAGE), TOKENS], dim=1)
        patches = torch.randn(4, 3 * 2 * 4 * 4, generator=generator)
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2, 2]]),
                "mm_token_type_ids": (ids == IMAGE).long()}  # fmt: skip
    return {"input_ids": TOKENS}


def save(folder: Path, family: Family, dtype: str) -> Path:
    """Save the model in several shards."""
    transformers.utils.logging.disable_progress_bar()
    model: Any = build(family).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="12KB")
    return folder
