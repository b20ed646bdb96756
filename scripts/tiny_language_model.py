"""Pre-train a tiny Llama on the docstrings of installed packages, for `make compare`: no download, a few minutes.

The result is a language model in the sense that it has something to forget: its loss on held-out docstrings is far
below that of an untrained one.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import multiprocessing
import random
import shutil
import time
from itertools import chain
from pathlib import Path
from typing import Any

from word_problems import write_lines

PACKAGES = ("torch", "numpy", "pandas", "networkx")
VOCABULARY = 2048
LENGTH = 128  # tokens of a sequence
BATCH = 32  # sequences of a step
HELD_OUT = 200  # docstrings
SHAPE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def pretrain(folder: Path, *, tokens: int, seed: int = 0) -> Path:
    """Write the model, its tokenizer and held-out.jsonl to `folder`, unless they are there with the same settings.

    Args:
        folder: The output.
        tokens: How many to train on, with repetition if the docstrings have fewer.
        seed: Of the weights and of the order.
    """
    settings = {"tokens": tokens, "seed": seed, "vocabulary": VOCABULARY, "packages": list(PACKAGES), **SHAPE}
    record = folder / "pretraining.json"
    if record.is_file() and json.loads(record.read_text())["settings"] == settings:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    texts = docstrings()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    random.Random(seed).shuffle(texts)
    held, known = sorted(texts[:HELD_OUT], key=len), texts[HELD_OUT:]  # by length: batches have little padding
    tokenizer = train_tokenizer(known)
    tokenizer.save_pretrained(folder)
    write_lines(folder / "held-out.jsonl", [{"text": text} for text in held])
    ids = [token for row in tokenizer(known)["input_ids"] for token in [*row, tokenizer.eos_token_id]]
    data = torch.tensor(ids)

    torch.manual_seed(seed)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **special))
    count = tokens // (BATCH * LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / count))
    )
    start, loss = time.monotonic(), math.nan
    for step in range(count):
        places = torch.randint(len(data) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([data[place : place + LENGTH] for place in places])
        result = model(input_ids=batch, labels=batch).loss
        result.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = result.item()
        if step % 100 == 0:
            print(f"    step {step} of {count}: loss {loss:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    model.save_pretrained(folder)
    figures = {"parameters": model.num_parameters(), "corpus_tokens": len(ids), "last_loss": loss}
    record.write_text(json.dumps({"settings": settings, **figures}, indent=2) + "\n")
    return folder


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer with single digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts[:5000], trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def docstrings() -> list[str]:
    """The docstrings of PACKAGES with 200 to 2,000 characters, each once, in the order of their files."""
    files: list[Path] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            files += sorted(Path(spec.origin).parent.rglob("*.py"))
    with multiprocessing.Pool() as pool:
        return list(dict.fromkeys(chain.from_iterable(pool.imap(_docstrings_of, files, chunksize=16))))


def _docstrings_of(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in texts if 200 <= len(text) <= 2000]
