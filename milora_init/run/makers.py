"""Make the files of an output on this machine, as many at a time as keep every solver thread busy.

A file goes through four steps: its source is fetched if it is on the Hub; its weights are given to the solver pool and
its other tensors are copied; its weights are waited for; it is synced and hashed. The second and the fourth step run
on threads of the `FilePool`. The thread that calls `run` only waits for events, so no file waits for the copy or the
hash of another.

The oldest file with unsolved weights may be slow. Therefore new files are begun until the files after it have enough
unsolved weights for all devices. A file of a checkpoint holds between none and some hundred weights.
"""

from __future__ import annotations

import queue
import resource
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from milora_init.linalg.cost import MOST_AT_ONCE
from milora_init.run.pool import FilePool, SolverPool
from milora_init.run.progress import Progress, ShardResult
from milora_init.run.shard import ShardWriter

Job = TypeVar("Job")
Record = TypeVar("Record")
Made = TypeVar("Made", covariant=True)

_FILES_OF_A_SHARD = 3  # its source, the shard, its part of the adapter
_FILES_OF_A_WEIGHT = 4  # its source, residual, A and B
_OTHER_FILES = 64


class Makers(Protocol[Job, Made]):
    """Makes files, on this machine or on others. The caller gives them their final names."""

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, ShardResult[Made]]]:
        """Make the file of each job; yield those that are finished. Raises the first error of any of them."""


@dataclass(eq=False)
class _File(Generic[Job, Record]):
    """A file that was begun and not yet yielded.

    Attributes:
        job: What to make.
        unfinished: How many of its weights are not solved yet.
        step: What is being done. `solving` lasts until all weights are solved and the other tensors are copied.
        copied: Whether the other tensors are copied.
    """

    job: Job
    unfinished: int
    step: Literal["fetching", "solving", "hashing", "finished"] = "fetching"
    copied: bool = False
    writer: ShardWriter[Record] | None = None
    result: ShardResult[Record] | None = None


class LocalMakers(Generic[Job, Record]):
    """Makes files in the pools of this process. Use it with `with`: what is unfinished when it ends is removed.

    Args:
        solvers: Solves weights.
        files: Copies and hashes.
        open_shard: Returns the writer of a job's file.
        submit: Gives the weights of a job's file to the solver pool; returns their futures.
        count: The number of those futures.
        fetch: Returns a future of the job with its source on the disk; None where all sources are there.
        most_files: The most files that are begun and not yet yielded; None for `MOST_FILES`.
        progress: Receives the tensors that are copied.
    """

    MOST_FILES: int | None = None  # the default of `most_files`; None for no such limit

    def __init__(  # noqa: PLR0913
        self,
        solvers: SolverPool,
        files: FilePool,
        *,
        open_shard: Callable[[Job], ShardWriter[Record]],
        submit: Callable[[Job, ShardWriter[Record]], Sequence[Future[Record]]],
        count: Callable[[Job], int],
        fetch: Callable[[Job], Future[Job]] | None = None,
        most_files: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._solvers, self._pool = solvers, files
        self._open, self._submit, self._count, self._fetch = open_shard, submit, count, fetch
        self._most_files = self.MOST_FILES if most_files is None else most_files
        weights = solvers.threads * (MOST_AT_ONCE if solvers.on_gpus else 1)
        self._most_open = _most_open_files(weights, solvers.wanted_jobs + 2)
        self._progress = progress or Progress()
        self._events: queue.SimpleQueue[tuple[_File[Job, Record], Future[Any]]] = queue.SimpleQueue()
        self._writers: set[ShardWriter[Record]] = set()  # those that are open

    def __enter__(self) -> LocalMakers[Job, Record]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.stop(cancel=kind is not None)  # first: its threads open writers
        for writer in self._writers:
            writer.__exit__()

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, ShardResult[Record]]]:
        """See `Makers`. The files are yielded in the order of their jobs."""
        waiting, begun = deque(jobs), deque[_File[Job, Record]]()
        while waiting or begun:
            while waiting and self._has_room(begun):
                begun.append(self._begin(waiting.popleft()))
            if begun[0].result is None:
                self._advance(*self._events.get())
            else:
                file = begun.popleft()
                assert file.result is not None
                yield file.job, file.result

    def _has_room(self, begun: Sequence[_File[Job, Record]]) -> bool:
        """Whether another file is to be begun."""
        if not begun:
            return True
        if self._most_files is not None and len(begun) >= self._most_files:
            return False
        open_files = [file for file in begun if file.step != "finished"]
        behind_first = sum([file.unfinished for file in begun if file.unfinished][1:])
        return len(open_files) < self._most_open and behind_first < self._solvers.wanted_jobs

    def _begin(self, job: Job) -> _File[Job, Record]:
        file: _File[Job, Record] = _File(job, self._count(job))
        if self._fetch is None:
            self._start_solving(file, job)
        else:
            self._watch(file, self._fetch(job))
        return file

    def _watch(self, file: _File[Job, Record], future: Future[Any]) -> None:
        """Let `_advance` be called when the future is done."""
        future.add_done_callback(lambda future: self._events.put((file, future)))

    def _advance(self, file: _File[Job, Record], future: Future[Any]) -> None:
        """Start the next step of a file if this was the last future of its step. Raises the future's error."""
        result = future.result()
        if file.step == "fetching":
            self._start_solving(file, result)
        elif file.step == "solving":
            if result is _COPIED:
                file.copied = True
            else:
                file.unfinished -= 1
            if file.copied and not file.unfinished:
                assert file.writer is not None
                file.step = "hashing"
                self._watch(file, self._pool.submit(file.writer.finish, self._pool.cancelled))
        elif file.writer is not None:
            self._writers.remove(file.writer)
            file.step, file.result, file.writer = "finished", result, None

    def _start_solving(self, file: _File[Job, Record], job: Job) -> None:
        file.step, file.job = "solving", job
        self._watch(file, self._pool.submit(self._solve_and_copy, file))

    def _solve_and_copy(self, file: _File[Job, Record]) -> object:
        """Give a file's weights to the solver pool and copy its other tensors. Runs on a thread of the file pool."""
        writer = self._open(file.job)
        file.writer = writer.__enter__()
        self._writers.add(writer)
        for future in self._submit(file.job, writer):
            self._watch(file, future)
        writer.copy_other_tensors(self._progress, self._pool.cancelled)
        return _COPIED


_COPIED = object()


def _most_open_files(weights: int, wanted: int) -> int:
    """How many shards may be open at a time while so many weights are being solved; at most `wanted`.

    Raises this process's limit on open files where it is too low for that.
    """
    of_weights = _OTHER_FILES + _FILES_OF_A_WEIGHT * weights
    needed = of_weights + _FILES_OF_A_SHARD * wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, (soft - of_weights) // _FILES_OF_A_SHARD)
