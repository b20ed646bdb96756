"""Progress events of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from milora_init.manifest import WeightRecord
from milora_init.plan.output_files import ShardJob
from milora_init.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What came of a ShardJob: sizes of the files it made, relative to the output folder, and its weights' records."""

    shard: str
    files: dict[str, int]
    records: tuple[WeightRecord, ...]


class Progress(Protocol):
    """Who wants to know how far the run is. Called from the workers' threads."""

    def begin(self, plan: Plan, done: Sequence[ShardJob]) -> None:
        """The run starts; these of `plan.jobs` were finished by an earlier one."""

    def remaking(self, name: str) -> None:
        """A file of the output stands, and the journal has no record of these bytes: it is made again."""

    def solving(self, module: str, device: str) -> None:
        """A device has taken a module up."""

    def fetching(self, name: str, size_bytes: int) -> None:
        """A file of the source is being fetched from the Hub."""

    def tensor(self, name: str, size_bytes: int) -> None:
        """A tensor of the source has been dealt with."""

    def shard(self, result: ShardResult, finished: int, of: int, elapsed_s: float) -> None:
        """A file of the output has its name."""

    def pushing(self, repo: str) -> None:
        """The output is finished and goes to a repository on the Hub."""


class Silent:
    """Progress that nobody watches."""

    def begin(self, plan: Plan, done: Sequence[ShardJob]) -> None: ...
    def remaking(self, name: str) -> None: ...
    def solving(self, module: str, device: str) -> None: ...
    def fetching(self, name: str, size_bytes: int) -> None: ...
    def tensor(self, name: str, size_bytes: int) -> None: ...
    def shard(self, result: ShardResult, finished: int, of: int, elapsed_s: float) -> None: ...
    def pushing(self, repo: str) -> None: ...
