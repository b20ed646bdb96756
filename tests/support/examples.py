"""The folders of the documentation's examples: a small Llama, its pair, a trained adapter, what is made of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from milora_init import api
from support import quantised

HUB_MODEL = "meta-llama/Llama-2-7b-hf"
FP8_MODEL = "my-fp8-model"
MODELS = ("my-model", FP8_MODEL, HUB_MODEL, "HuggingFaceTB/SmolLM2-135M")  # each a folder with the small Llama
RECIPE = "target: [q_proj, v_proj, down_proj]\nrank: 32\n"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]


def make(folder: Path) -> None:
    """Write ./my-model, ./my-fp8-model, ./svd_init, ./trained, ./merged, ./plain and ./mine.yaml into a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _make()


def _make() -> None:
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    config: Any = transformers.LlamaConfig
    cls: Any = transformers.LlamaForCausalLM
    # Wide enough for the rank of the examples, 64.
    model = cls(
        config(
            vocab_size=64, hidden_size=96, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    for name in MODELS:
        model.to(torch.bfloat16).save_pretrained(name)
        tokenizer(
            tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(name)
    quantised.rewrite(
        Path(FP8_MODEL),
        lambda name, W: quantised.fp8_blocks(name, W) if quantised.is_projection(name) else None,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    )
    api.initialize(HUB_MODEL, "./svd_init", rank=64, progress=False)
    shutil.copytree("svd_init/lora", "trained")
    tensors = load_file("trained/adapter_model.safetensors")
    moved = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(moved, "trained/adapter_model.safetensors", metadata={"format": "pt"})
    api.merge("./svd_init", "./merged", adapter="./trained", progress=False)
    api.convert("./svd_init", "./trained", "./plain")
    Path("mine.yaml").write_text(RECIPE, encoding="utf-8")
