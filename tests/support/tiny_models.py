"""Tiny random checkpoints in the usual form: several shards, an index, config.json, side files.

The weights have a standard deviation of 0.3, so that a missing component changes the model's output. With the much
smaller initial weights of transformers, a model without its adapter would give almost the same output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from milora_init.manifest import fingerprint

_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT2 = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

KINDS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "tied llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "bert": ("BertModel", "BertConfig", _BERT),
    "bert classifier": ("BertForSequenceClassification", "BertConfig", {**_BERT, "num_labels": 3}),
    "llama classifier": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_LLAMA, "num_labels": 3, "pad_token_id": 0},
    ),
}

# Targets for each kind; other architectures have other module names than the default recipe.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "tied llama": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "gemma": ("q_proj", "v_proj", "up_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "bert": ("query", "value", "intermediate.dense"),
    "bert classifier": ("query", "value"),
    "llama classifier": ("q_proj", "v_proj"),
}

VOCABULARY = 61


def build(kind: str) -> nn.Module:
    """A random model of this kind in float32."""
    cls, config, sizes = KINDS[kind]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.copy_(torch.randn_like(parameter)).mul_(0.3)
    return model.eval()


def on_meta(kind: str) -> nn.Module:
    """The model of this kind on the meta device."""
    cls, config, sizes = KINDS[kind]
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    return model


def save(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    """Save the model of this kind in several shards, with side files."""
    transformers.utils.logging.disable_progress_bar()
    model: Any = build(kind).to(dtype)
    model.save_pretrained(folder, max_shard_size="12KB")
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_bytes(b"{}\r\n")  # a copy must keep the CRLF line ending
    (folder / "LICENSE").write_bytes(b"as you like it\n")
    (folder / "README.md").write_bytes(b"# a model card of the source\n")
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files in a folder, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def as_single_file(source: Path, folder: Path) -> Path:
    """The same checkpoint as one model.safetensors."""
    _copy_side_files(source, folder)
    save_file(tensors(source), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_pickles(source: Path, folder: Path, *, shards: int) -> Path:
    """The same checkpoint as pytorch_model*.bin, the format before transformers 5; several shards have an index."""
    _copy_side_files(source, folder)
    content = tensors(source)
    if shards == 1:
        torch.save(content, folder / "pytorch_model.bin")
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: content[name] for name in list(content)[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in content.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of every file in a folder and its subfolders, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_inputs(manifest: Path, **changes: Any) -> None:
    """Change inputs in a manifest and update its fingerprint, as if the run had had these inputs."""
    inputs = json.loads(manifest.read_text())["inputs"] | changes
    edit_json(manifest, inputs=inputs, fingerprint=fingerprint(inputs))


def _copy_side_files(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            (folder / path.name).write_bytes(path.read_bytes())


def zero_rows(folder: Path, part: str, rows: slice) -> None:
    """Set rows of all tensors with this part in their names to zero."""
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        for name in weights:
            if part in name:
                weights[name][rows] = 0
        save_file(weights, path, metadata={"format": "pt"})
