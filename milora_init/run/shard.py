"""Write one shard of an output; `run` and `merge` both use it.

The files of a shard are made in a folder of their own, that of the attempt. Tasks on the solver's threads write the
weights at their offsets, and the calling thread copies all other tensors as bytes. `OutputFolder.commit` gives finished
files their final names: so an attempt that ends late, or twice, replaces nothing.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from pathlib import Path
from typing import Generic, TypeVar

from milora_init.checkpoint.files import Stamp, file_mode, stamp
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import Header
from milora_init.checkpoint.tensor_file import PickleShard, SafetensorsShard, TensorSource, open_shard
from milora_init.checkpoint.writer import SafetensorsWriter, WriteTarget, writing
from milora_init.errors import CheckpointError
from milora_init.run.pool import SolverPool, SolverTask
from milora_init.run.progress import Progress, ShardResult

Job = TypeVar("Job")
Result = TypeVar("Result")


class ShardWriter(Generic[Result]):
    """One shard that is being written, its source files, and its part of the adapter if it has one.

    In this order: `submit` every weight, `copy_other_tensors`, `finish`. The `with` block owns the files: without
    `finish`, the folder of the attempt is removed when it ends.

    Args:
        sources: The files of the model or of the residual base that it is made from, each with its stamp when it was
            planned. It gets the permissions of the first.
        attempt: The folder to make the files in. It is created, and nobody else writes there.
        name: The shard's name in the output folder.
        header: The shard's layout; None to write only its part of the adapter.
        adapter_part: Path relative to the output folder, and layout, of its part of the adapter; None if it has none.
        companions: Further files that tasks read, each with its stamp: they must not change either.

    Raises:
        CheckpointError: A file that is read changed since it was planned, or cannot be read.
        OutputError: The output cannot be written.
    """

    def __init__(
        self,
        sources: Mapping[Path, Stamp],
        *,
        attempt: Path,
        name: str,
        header: Header | None,
        adapter_part: tuple[str, Header] | None = None,
        companions: Mapping[Path, Stamp] = {},
    ) -> None:
        self.name = name
        self._header, self._attempt, self._finished = header, attempt, False
        self._paths, self._stamps = tuple(sources), {**sources, **companions}
        mode = file_mode(next(iter(sources)))
        # By their path relative to the output folder; the part is finished first.
        layouts: dict[str, Header] = dict([adapter_part] if adapter_part else [])
        if header:
            layouts[name] = header
        self._writers = {
            path: SafetensorsWriter(attempt / Path(path).name, layout, mode=mode) for path, layout in layouts.items()
        }
        self._shard = self._writers.get(name)
        self._part = self._writers.get(adapter_part[0]) if adapter_part else None
        self._targets: dict[str, WriteTarget] = {}
        self._part_targets: dict[str, WriteTarget] = {}
        self._results: list[Future[Sequence[Result]]] = []
        self._others: list[Future[None]] = []

    def __enter__(self) -> ShardWriter[Result]:
        with ExitStack() as files:
            self._sources: dict[str, SafetensorsShard | PickleShard] = {}
            for path in self._paths:
                shard = open_shard(path)
                files.enter_context(shard)
                self._sources |= dict.fromkeys(shard.header.tensors, shard)
            self._require_unchanged()
            files.callback(self._remove_unfinished)
            with writing(self._attempt):
                self._attempt.mkdir(parents=True)
            for writer in self._writers.values():
                files.enter_context(writer)
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def locate(self, tensor: str) -> TensorSource:
        """Where a task reads a tensor of the source."""
        return self._sources[tensor].locate(tensor)

    def target(self, tensor: str) -> WriteTarget:
        """Where tasks write a tensor of the shard: one task all of it, or several tasks a row each."""
        assert self._shard is not None, "only a part of the adapter is written"
        if tensor not in self._targets:
            self._targets[tensor] = self._shard.target(tensor)
        return self._targets[tensor]

    def part_target(self, tensor: str) -> WriteTarget:
        """Where a task writes a tensor of the adapter's part."""
        assert self._part is not None, "this shard has no part of the adapter"
        self._part_targets[tensor] = self._part.target(tensor)
        return self._part_targets[tensor]

    def submit(self, pool: SolverPool, task: SolverTask[Job, Sequence[Result]], job: Job) -> Future[Sequence[Result]]:
        """Give a job to the pool. It writes to targets of this shard, and returns a result for each of its weights."""
        self._results.append(pool.submit(task, job))
        return self._results[-1]

    def submit_other(self, pool: SolverPool, task: SolverTask[Job, None], job: Job) -> Future[None]:
        """Give a job without a result to the pool: a tensor that is neither split nor copied as bytes."""
        self._others.append(pool.submit(task, job))
        return self._others[-1]

    def copy_other_tensors(self, progress: Progress, cancelled: threading.Event | None = None) -> None:
        """Copy every tensor that no task writes, byte for byte; nothing if only a part of the adapter is written.

        Raises:
            CancelledError: `cancelled` was set.
        """
        if self._shard is None or self._header is None:
            return
        for name, info in self._header.tensors.items():
            if cancelled is not None and cancelled.is_set():
                raise CancelledError
            if name in self._targets:
                continue
            source = self._sources[name]
            if isinstance(source, SafetensorsShard):
                self._shard.copy(name, source.fileno, source.offset(name), source.path)
            else:
                self._shard.write(name, source.read(name))
            progress.tensor(name, info.size_bytes)
        self._shard.flush()

    def finish(self, cancelled: threading.Event | None = None) -> ShardResult[Result]:
        """Wait for the tasks, finish and hash the files, and close them.

        Whoever makes a file hashes it, while its bytes are in the page cache and other files are being made.

        Raises:
            CancelledError: `cancelled` was set.
            Exception: What a task raised.
        """
        records = tuple(record for future in self._results for record in future.result())
        for other in self._others:
            other.result()
        for writer, targets in ((self._shard, self._targets), (self._part, self._part_targets)):
            if writer is not None:
                for name in targets:
                    writer.mark_written(name)
        self._require_unchanged()
        files = {path: writer.finish() for path, writer in self._writers.items()}
        hashes = {path: sha256(writer.path, cancelled=cancelled) for path, writer in self._writers.items()}
        self._finished = True
        self._files.close()
        return ShardResult(self.name, files, records, hashes, self._attempt.name)

    def _remove_unfinished(self) -> None:
        if not self._finished:
            shutil.rmtree(self._attempt, ignore_errors=True)

    def _require_unchanged(self) -> None:
        for path, expected in self._stamps.items():
            if stamp(path) != expected:
                raise CheckpointError(
                    f"{path} changed during the run", hint="wait until nobody writes to it, and run again"
                )
