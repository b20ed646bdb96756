"""Write one shard of an output; `run` and `merge` both use it.

The file is laid out under a partial name. Tasks on the solver's threads write the weights at their offsets, and the
calling thread copies all other tensors as bytes. At the end the file gets its final name.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Generic, TypeVar

from milora_init.checkpoint.files import Stamp, file_mode, stamp
from milora_init.checkpoint.header import Header
from milora_init.checkpoint.tensor_file import SafetensorsShard, TensorSource, open_shard
from milora_init.checkpoint.writer import SafetensorsWriter, WriteTarget
from milora_init.errors import CheckpointError
from milora_init.run.pool import SolverPool, SolverTask
from milora_init.run.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")


class ShardWriter(Generic[Result]):
    """One shard that is being written, its source file, and its part of the adapter if it has one.

    In this order: `submit` every weight, `copy_other_tensors`, `wait`, `finish`. The `with` block owns the files; those
    that are not finished when it ends are removed.

    Args:
        source: The file of the model or of the residual base.
        source_stamp: Its stamp when it was planned.
        out: The output folder.
        name: The shard's name in it.
        header: The shard's layout; None to write only its part of the adapter.
        adapter_part: Path relative to `out`, and layout, of the shard's part of the adapter; None if it has none.

    Raises:
        CheckpointError: The source changed since it was planned, or cannot be read.
        OutputError: The output cannot be written.
    """

    def __init__(
        self,
        source: Path,
        source_stamp: Stamp,
        *,
        out: Path,
        name: str,
        header: Header | None,
        adapter_part: tuple[str, Header] | None = None,
    ) -> None:
        self.name = name
        self._path, self._stamp, self._header = source, source_stamp, header
        self._shard = SafetensorsWriter(out / name, header, mode=file_mode(source)) if header else None
        self._part = (
            SafetensorsWriter(out / adapter_part[0], adapter_part[1], mode=file_mode(source)) if adapter_part else None
        )
        # By their path relative to the output folder; the part is finished first.
        self._writers = {adapter_part[0]: self._part} if adapter_part and self._part else {}
        if self._shard:
            self._writers[name] = self._shard
        self._targets: dict[str, WriteTarget] = {}
        self._part_targets: dict[str, WriteTarget] = {}
        self._results: list[Future[Result]] = []
        self._others: list[Future[None]] = []

    def __enter__(self) -> ShardWriter[Result]:
        with ExitStack() as files:
            self._source = open_shard(self._path)
            files.enter_context(self._source)
            self._require_unchanged()
            for writer in self._writers.values():
                files.enter_context(writer)
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def locate(self, tensor: str) -> TensorSource:
        """Where a task reads a tensor of the source."""
        return self._source.locate(tensor)

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

    def submit(self, pool: SolverPool, task: SolverTask[Job, Result], job: Job) -> None:
        """Give a job to the pool. It writes to targets of this shard."""
        self._results.append(pool.submit(task, job))

    def submit_other(self, pool: SolverPool, task: SolverTask[Job, None], job: Job) -> None:
        """Give a job without a result to the pool: a tensor that is neither split nor copied as bytes."""
        self._others.append(pool.submit(task, job))

    def copy_other_tensors(self, progress: Progress) -> None:
        """Copy every tensor that no task writes, byte for byte; nothing if only a part of the adapter is written.

        Tensors of the source that the shard's layout does not have are left out.
        """
        if self._shard is None or self._header is None:
            return
        for name, info in self._source.header.tensors.items():
            if name in self._targets or name not in self._header.tensors:
                continue
            if isinstance(self._source, SafetensorsShard):
                self._shard.copy(name, self._source.fileno, self._source.offset(name), self._source.path)
            else:
                self._shard.write(name, self._source.read(name))
            progress.tensor(name, info.size_bytes)
        self._shard.flush()

    def wait(self) -> list[Result]:
        """Wait for the tasks; return their results in the order of submission. Raises what a task raised."""
        results = [future.result() for future in self._results]
        for other in self._others:
            other.result()
        if self._shard is not None:
            for name in self._targets:
                self._shard.mark_written(name)
        if self._part is not None:
            for name in self._part_targets:
                self._part.mark_written(name)
        return results

    def finish(self) -> dict[str, int]:
        """Give the files their final names and close them; return their sizes in bytes, by path relative to `out`."""
        self._require_unchanged()
        sizes = {path: writer.finish() for path, writer in self._writers.items()}
        self._files.close()
        return sizes

    def _require_unchanged(self) -> None:
        if stamp(self._path) != self._stamp:
            raise CheckpointError(
                f"{self._path} changed during the run", hint="wait until nobody writes to it, and run again"
            )
