"""Measure what dropout does to a pair before the first training step, on SmolLM2-135M-Instruct.

    python scripts/measure_dropout.py FOLDER [--methods milora pissa olora-tail] [--rank 64]

Prints the mean loss per token of 1,024 tokens of generated word problems (word_problems.py): of the original model; of
each method's output in evaluation mode; and in training mode with dropout 0.05, with several draws. In training mode
with dropout 0 nothing is random, so the loss is that of evaluation mode: SmolLM2 has no dropout of its own. The weights
are stored in bfloat16 and computed with in float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from smollm2 import convert
from word_problems import split

from milora_init import InitOptions, initialize
from milora_init.methods import METHODS

DROPOUT = 0.05  # of the MiLoRA authors' recipe
TOKENS = 1024
DRAWS = 3


def main() -> int:
    """Measure and print a table in Markdown."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="for the model and the outputs")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=["milora", "pissa", "olora-tail", "rlmo"])
    options.add_argument("--rank", type=int, default=64)
    args = options.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args.folder.mkdir(parents=True, exist_ok=True)
    source = convert(args.folder / "smollm2")
    rows = [problem.training_row() for problem in split(100, 0, seed=0)[0]]
    text = "\n\n".join(f"{row['query']}\n{row['response']}" for row in rows)
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids[:, :TOKENS]
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    print(f"{ids.shape[1]} tokens, rank {args.rank}; original: {loss(original, ids, training=False):.3f}\n")
    print("| method | evaluation mode | training mode, dropout 0.05 |\n|---|---|---|")
    for name in args.methods:
        model = load(source, name, args)
        quiet = loss(model, ids, training=False)
        draws = [loss(model, ids, training=True, seed=seed) for seed in range(DRAWS)]
        print(f"| {name} | {quiet:.3f} | {', '.join(f'{draw:.3f}' for draw in draws)} |", flush=True)
    return 0


def load(source: Path, name: str, args: argparse.Namespace) -> Any:
    """The output of a method, made now, on its base, with dropout."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = args.folder / f"{name}-{args.rank}"
    request = InitOptions(model=str(source), out=str(out), method=name, rank=args.rank, dropout=DROPOUT, overwrite=True)
    has_base = initialize(request, progress=False).manifest.method.writes_base
    base = AutoModelForCausalLM.from_pretrained(out if has_base else source, dtype=torch.float32)
    folder = out / "lora" if has_base else out
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True, low_cpu_mem_usage=name == "mica")


def loss(model: Any, ids: torch.Tensor, *, training: bool, seed: int = 0) -> float:
    """The mean loss per token."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return float(model.train(training)(input_ids=ids, labels=ids).loss)


if __name__ == "__main__":
    sys.exit(main())
