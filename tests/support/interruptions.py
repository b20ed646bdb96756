"""Progress callbacks that interrupt a run at a given shard, and that record the work of a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from milora_init.manifest import WORK_FOLDER, Manifest, WeightRecord
from milora_init.plan.output_files import ShardJob
from milora_init.plan.plan import Plan
from milora_init.run.progress import Progress, ShardResult


class InterruptedRunError(Exception):
    """Raised to interrupt a run."""


class InterruptAt(Progress):
    """Raises InterruptedRunError in shard `at` (from 0): `when` is "inside" (at a tensor) or "after" (at its end)."""

    def __init__(self, at: int, *, when: str) -> None:
        self.at, self.when, self.seen = at, when, 0

    def tensor(self, name: str, size_bytes: int) -> None:
        if self.when == "inside" and self.seen == self.at:
            raise InterruptedRunError

    def shard(self, result: ShardResult[WeightRecord], finished: int, of: int, elapsed_s: float) -> None:
        if self.when == "after" and self.seen == self.at:
            raise InterruptedRunError
        self.seen += 1


class ShardLog(Progress):
    """Records the shards that this run wrote, and the bytes that an earlier run had finished."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.done_bytes = -1

    def begin(self, plan: Plan, done: Sequence[ShardJob]) -> None:
        self.done_bytes = sum(plan.checkpoint.headers[job.source.name].data_bytes for job in done)

    def shard(self, result: ShardResult[WeightRecord], finished: int, of: int, elapsed_s: float) -> None:
        self.made.append(result.shard)


def shards(source: Path) -> list[str]:
    """Names of the safetensors files of a checkpoint, sorted."""
    return sorted(path.name for path in source.glob("*.safetensors"))


def interrupt_after_two_shards(start: Callable[..., Manifest], source: Path, out: Path) -> Path:
    """Interrupt a run after two finished shards; returns the path of its journal."""
    with pytest.raises(InterruptedRunError):
        start(source, progress=InterruptAt(1, when="after"))
    return out / WORK_FOLDER / "journal.jsonl"
