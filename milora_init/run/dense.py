"""Write the values of a quantised tensor that is not adapted: dequantised, and rounded to the dtype of the base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from milora_init.checkpoint.dequantise import QuantisedSource
from milora_init.checkpoint.dtypes import TORCH_DTYPES
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.quantised_tensors import QuantisedTensor
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.checkpoint.writer import WriteTarget
from milora_init.errors import SolveError
from milora_init.manifest import WeightRecord
from milora_init.plan.output_files import ShardJob
from milora_init.run.pool import DeviceLock
from milora_init.run.progress import Progress
from milora_init.run.shard import ShardWriter


@dataclass(frozen=True, slots=True)
class DenseJob:
    """Dequantise the tensor at `source` and write it to `target`."""

    source: QuantisedSource
    target: WriteTarget


class Located(Protocol):
    """An open file of weights, or the writer of a shard that is made of it."""

    def locate(self, name: str, /) -> TensorSource:
        """Where a stored tensor of the file can be read."""


def locate(tensor: str, job: ShardJob, shard: Located) -> TensorSource | QuantisedSource:
    """Where a tensor of the model is read; its parts may be in other files than the shard's."""
    quantised = job.quantised.get(tensor)
    if quantised is None:
        return shard.locate(tensor)
    parts = {role: job.elsewhere.get(p.name) or shard.locate(p.name) for role, p in quantised.parts.items()}
    return QuantisedSource(quantised, parts)


def tensors(job: ShardJob) -> list[QuantisedTensor]:
    """The quantised tensors of a shard that become dense and are not split, the largest first."""
    if job.header is None:
        return []
    others = [tensor for name, tensor in job.quantised.items() if name not in job.weights]
    return sorted(others, key=lambda tensor: -math.prod(tensor.shape))


def jobs(job: ShardJob, shard: ShardWriter[WeightRecord]) -> Iterator[DenseJob]:
    """One job for each tensor that `tensors` returns."""
    for tensor in tensors(job):
        source = locate(tensor.name, job, shard)
        assert isinstance(source, QuantisedSource)
        yield DenseJob(source, shard.target(tensor.name))


def run(job: DenseJob, _device: torch.device, _device_lock: DeviceLock, progress: Progress) -> None:
    """Do a job on the CPU, a block of rows at a time: a task of the `SolverPool`.

    Raises:
        CheckpointError: The tensor cannot be read, or holds NaN or Inf.
        SolveError: A value does not fit the dtype of the base.
        OutputError: It cannot be written.
    """
    shape = job.source.shape
    places = [(job.source, job.target)]
    if len(shape) > 2:
        places = [(job.source.at(row), job.target.at(row)) for row in range(shape[0])]
    for source, target in places:
        for start, stop, values in source.blocks():
            rounded = values.to(TORCH_DTYPES[target.dtype])
            # The sum is fast, and finite unless it is very large itself.
            if not bool(rounded.sum().isfinite()) and not bool(rounded.isfinite().all()):
                hint = "--dtype bfloat16" if target.dtype == "F16" else "--dtype float32"
                raise SolveError(f"{source.name} overflows {torch_name(target.dtype)}", hint=hint)
            with target.rows(start, stop).opened() as write:
                write(rounded)
    progress.tensor(job.source.name, job.source.size_bytes)
