"""Write a random Llama checkpoint of a given size, one layer at a time, with spectra like a language model's.

    python scripts/make_checkpoint.py FOLDER --size 1b

Every matrix is Gaussian noise plus a power-law head: a few large singular values, and a bulk that reaches down to zero.
A solver for the smallest values meets such spectra in practice. One shard a layer; the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SIZES = {
    "tiny": (128, 352, 2, 4, 2, 512),
    "160m": (768, 2048, 12, 12, 12, 32000),
    "1b-layer": (2048, 5632, 1, 32, 4, 512),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
HEAD = 48  # number of large singular values


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="160m")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.folder, size=args.size, dtype=args.dtype, seed=args.seed)


def make(folder: Path, *, size: str, dtype: str = "bfloat16", seed: int = 0) -> None:
    """Write a checkpoint of one of SIZES to a new folder."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    kv = kv_heads * hidden // heads
    generator = torch.Generator().manual_seed(seed)
    stored: torch.dtype = getattr(torch, dtype)

    def weight(m: int, n: int) -> torch.Tensor:
        W = torch.randn(m, n, generator=generator) * 0.02
        k = min(HEAD, m // 4, n // 4)
        strength = 0.16 * (m * n) ** 0.25 / torch.arange(1, k + 1) ** 0.7
        left = torch.randn(m, k, generator=generator) / m**0.5
        right = torch.randn(n, k, generator=generator) / n**0.5
        W += (left * strength) @ right.T
        return W.to(stored)

    folder.mkdir(parents=True)
    count, total = layers + 2, 0
    weight_map: dict[str, str] = {}
    for number in range(count):
        if 0 < number <= layers:
            prefix = f"model.layers.{number - 1}."
            shapes = {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
            }
            shard = {f"{prefix}{name}.weight": weight(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=stored)
        elif number:
            shard = {
                "model.norm.weight": torch.ones(hidden, dtype=stored),
                "lm_head.weight": weight(vocabulary, hidden),
            }
        else:
            shard = {"model.embed_tokens.weight": weight(vocabulary, hidden)}
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
