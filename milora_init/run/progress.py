"""Progress events of a run. This file imports no torch, so that the command line can start without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from milora_init.plan.output_files import ShardJob
    from milora_init.plan.plan import Plan


Record = TypeVar("Record", covariant=True)


@dataclass(frozen=True)
class ShardResult(Generic[Record]):
    """A finished shard: a value that another process can send.

    Attributes:
        shard: Its name.
        files: Size in bytes of each file that was written for it, by the path relative to the output folder.
        records: What each of its weights returned; for a run, the record of the weight.
        hashes: SHA-256 of each of `files`.
        attempt: Name of the folder that holds the files until they get their final names.
        uploaded: Whether the shard itself was uploaded by its maker, and is not in that folder.
    """

    shard: str
    files: dict[str, int]
    records: tuple[Record, ...]
    hashes: dict[str, str]
    attempt: str
    uploaded: bool = False


class Progress:
    """Receives the events of a run. These methods do nothing; a subclass overrides those that it needs.

    `solving`, `tensor`, `fetching` and `note` are called from other threads than the run's.

    Attributes:
        started: When the user began to wait, by `time.monotonic`; None means when the run begins.
    """

    started: float | None = None

    def begin(self, plan: Plan, done: Sequence[ShardJob]) -> None:
        """The run starts; an earlier run has finished the jobs `done` of `plan.jobs`."""

    def remaking(self, name: str) -> None:
        """A shard exists, but the journal does not have its hash: it is made again."""

    def solving(self, module: str, device: str) -> None:
        """A device starts to solve a module."""

    def fetching(self, name: str, size_bytes: int) -> None:
        """A file of the model is being downloaded from the Hub."""

    def note(self, text: str) -> None:
        """Something that the user should know, and that ends nothing."""

    def tensor(self, name: str, size_bytes: int) -> None:
        """A tensor of the model was copied, or one of its weights split; `size_bytes` is the size of what was read."""

    def shard(self, result: ShardResult[Any], finished: int, of: int, elapsed_s: float) -> None:
        """A shard has its final name: number `finished` of `of`, after `elapsed_s` seconds."""

    def scanning(self) -> None:
        """The run that has just begun finds the spectra of the weights, and splits none."""

    def scanned(self, name: str, weights: int, finished: int, of: int, elapsed_s: float) -> None:
        """`scan` has read the last of a file's weights: number `finished` of `of` files, after `elapsed_s` seconds."""

    def pushing(self, repo: str) -> None:
        """The output is finished and its upload to a repository on the Hub starts."""
