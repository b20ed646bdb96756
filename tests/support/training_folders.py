"""One tiny Llama with a tokenizer, its pair, and data, for all tests of training and evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from milora_init.options import InitOptions
from support import tiny_models
from support.runs import initialize

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PROMPT_WORDS = ("Instruction", "Response", "Below", "Write", "a", "response", "task", "###", ":", ".", "step", "by")
WORDS = (*SPECIAL, *PROMPT_WORDS, *(f"w{number}" for number in range(61 - len(SPECIAL) - len(PROMPT_WORDS))))


@dataclass(frozen=True)
class TrainingFolders:
    """Folders and files that the tests read and never write.

    Attributes:
        source: The original model.
        pair: An output of mode min.
        data, held: JSON lines with `query` and `response`.
        problems: JSON lines with `question` and `answer`, as GSM8K.
    """

    source: Path
    pair: Path
    data: Path
    held: Path
    problems: Path


@pytest.fixture
def training_folders(
    shared_training_folders: TrainingFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainingFolders:
    """The shared one, with a cache of `datasets` for each test, and no way to the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return shared_training_folders


@pytest.fixture(scope="session")
def shared_training_folders(tmp_path_factory: pytest.TempPathFactory) -> TrainingFolders:
    """All of it, in a folder whose name has "min" in it: no code may look for a mode in a path."""
    folder = tmp_path_factory.mktemp("admin")
    source = tiny_models.save(folder / "source", "llama", torch.float32)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    tokenizer(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(source)
    initialize(InitOptions(model=str(source), out=str(folder / "svd_init"), rank=4, device=("cpu",)))
    return TrainingFolders(
        source,
        folder / "svd_init",
        lines(folder / "data.jsonl", [row(number) for number in range(16)]),
        lines(folder / "held.jsonl", [row(number) for number in range(20, 24)]),
        lines(folder / "problems.jsonl", [{"question": sentence(n, 4), "answer": f"w1\n#### {n}"} for n in range(3)]),
    )


def sentence(number: int, length: int) -> str:
    first = len(SPECIAL) + len(PROMPT_WORDS)
    return " ".join(WORDS[first + (number * 7 + place * (number + 3)) % (61 - first)] for place in range(length))


def row(number: int) -> dict[str, str]:
    return {"query": sentence(number, 4), "response": sentence(number + 30, 5)}


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in rows), encoding="utf-8")
    return path
