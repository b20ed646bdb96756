"""Interrupt a run in a test, and watch one that is resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from milora_init.manifest import WORK_FOLDER, Manifest
from milora_init.plan.output_files import ShardJob
from milora_init.plan.plan import Plan
from milora_init.run.progress import Progress, ShardResult


class PulledPlugError(Exception):
    """Raised to interrupt a run."""


class PullThePlug(Progress):
    """Raises when a given shard begins (0 is the first), or when it is done."""

    def __init__(self, at: int, *, when: str) -> None:
        self.at, self.when, self.seen = at, when, 0

    def tensor(self, name: str, size_bytes: int) -> None:
        if self.when == "inside" and self.seen == self.at:
            raise PulledPlugError

    def shard(self, result: ShardResult, finished: int, of: int, elapsed_s: float) -> None:
        if self.when == "after" and self.seen == self.at:
            raise PulledPlugError
        self.seen += 1


class Count(Progress):
    """Remembers which shards were made, and how much an earlier run had done."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.done_bytes = -1

    def begin(self, plan: Plan, done: Sequence[ShardJob]) -> None:
        self.done_bytes = sum(plan.checkpoint.headers[job.source.name].data_bytes for job in done)

    def shard(self, result: ShardResult, finished: int, of: int, elapsed_s: float) -> None:
        self.made.append(result.shard)


def shards(source: Path) -> list[str]:
    """Names of a checkpoint's files of weights, in order."""
    return sorted(path.name for path in source.glob("*.safetensors"))


def halfway(start: Callable[..., Manifest], source: Path, out: Path) -> Path:
    """An output with two shards done; returns its journal."""
    with pytest.raises(PulledPlugError):
        start(source, progress=PullThePlug(1, when="after"))
    return out / WORK_FOLDER / "journal.jsonl"
