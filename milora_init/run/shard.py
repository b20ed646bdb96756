"""Write one shard of the output and its part of the adapter.

The file is laid out under a partial name, and each thread writes its tensors at their offsets. The factors go into a
part file of the adapter in the work folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from milora_init.checkpoint.files import file_mode, stamp
from milora_init.checkpoint.tensor_file import SafetensorsShard, open_shard
from milora_init.checkpoint.writer import SafetensorsWriter, extended
from milora_init.errors import CheckpointError
from milora_init.manifest import WORK_FOLDER, WeightRecord
from milora_init.plan.output_files import ShardJob
from milora_init.run import weight as weight_run
from milora_init.run.adapter_file import part_header, part_key
from milora_init.run.pool import SolverPool
from milora_init.run.progress import Progress, ShardResult
from milora_init.run.weight import WeightJob


def adapter_part_name(job: ShardJob) -> str:
    """Where a shard's factors wait for the others."""
    return f"{WORK_FOLDER}/{extended(job.target, '.adapter')}"


class OpenShard:
    """One file of the output on its way, and its piece of the adapter.

    Raises:
        CheckpointError: The source changed since it was planned, or cannot be read.
        OutputError: The output cannot be written.
        SolveError: A weight that cannot be decomposed.
    """

    def __init__(self, job: ShardJob, out: Path, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._base = SafetensorsWriter(out / job.target, job.header, mode=file_mode(job.source))
        self._factors = SafetensorsWriter(out / adapter_part_name(job), part_header(job.splits))
        self._files = {adapter_part_name(job): self._factors} if job.splits else {}
        self._files[job.target] = self._base
        self._running: list[Future[WeightRecord]] = []

    def __enter__(self) -> OpenShard:
        with ExitStack() as stack:
            self._source = open_shard(self._job.source)
            stack.callback(self._source.close)
            self._require_unchanged()
            for writer in self._files.values():
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, pool: SolverPool) -> None:
        """Give every weight to the crew, the largest first."""
        places = {tensor: self._base.place(tensor) for tensor in self._job.weights}
        for plan in sorted(self._job.splits, key=lambda plan: -math.prod(plan.weight.shape)):
            weight = plan.weight
            source, residual = self._source.locate(weight.tensor), places[weight.tensor]
            job = WeightJob(
                plan=plan,
                source=source if weight.row is None else source.at(weight.row),
                residual=residual if weight.row is None else residual.at(weight.row),
                A=self._factors.place(part_key(weight.module, "A")),
                B=self._factors.place(part_key(weight.module, "B")),
                mode=self._job.mode,
            )
            self._running.append(pool.submit(self._split, job))

    def copy_the_rest(self) -> None:
        """Copy what is not adapted, byte for byte."""
        for name, info in self._source.header.tensors.items():
            if name in self._job.weights:
                continue
            if isinstance(self._source, SafetensorsShard):
                self._base.copy(name, self._source.fileno, self._source.offset(name), self._source.path)
            else:
                self._base.write(name, self._source.read(name))
            self._progress.tensor(name, info.size_bytes)
        self._base.flush()

    def finish(self) -> ShardResult:
        """Wait for the weights, account for them, and give the files their names."""
        records = []
        for future in self._running:
            record = future.result()
            for factor in "AB":
                self._factors.written(part_key(record.module, factor))
            records.append(record)
        for tensor in self._job.weights:
            self._base.written(tensor)
        self._require_unchanged()
        files = {name: writer.finish() for name, writer in self._files.items()}
        self._stack.close()
        return ShardResult(self._job.target, files, tuple(records))

    def _split(self, job: WeightJob, device: torch.device, device_lock: AbstractContextManager[Any]) -> WeightRecord:
        @contextmanager
        def announced() -> Iterator[None]:
            with device_lock:
                self._progress.solving(job.plan.weight.module, str(device))
                yield

        record = weight_run.run(job, device, announced())
        self._progress.tensor(job.source.name, job.source.size_bytes)
        return record

    def _require_unchanged(self) -> None:
        if stamp(self._job.source) != self._job.stamp:
            raise CheckpointError(
                f"{self._job.source} changed during the run", hint="wait until nobody writes to it, and run again"
            )
