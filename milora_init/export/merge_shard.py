"""Write one shard of a merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from milora_init.checkpoint.files import file_mode, stamp
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import Header
from milora_init.checkpoint.tensor_file import SafetensorsShard, TensorSource
from milora_init.checkpoint.writer import SafetensorsWriter, WriteTarget
from milora_init.errors import CheckpointError, SolveError
from milora_init.linalg.rounding import add_once, round_once
from milora_init.lora.folder import FactorReader, LoraAdapter, open_factors
from milora_init.manifest import WeightRecord
from milora_init.run.pool import DeviceLock, SolverPool

_BLOCK_ELEMENTS = 1 << 19  # of a block of rows, which fits a cache


class MergeShard:
    """One file of the output on its way.

    Args:
        source: The file of the residual base; `digest`: the SHA-256 that it must have.
        target: What to write, laid out by `header`.
        records: The weights to merge, by their tensor; those of other files are passed over.
        lora: The adapter.

    Raises:
        CheckpointError: The source is not the file that it was, or cannot be read.
        OutputError: The output cannot be written.
        SolveError: A merged weight that does not fit its dtype.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        header: Header,
        *,
        digest: str | None,
        records: Mapping[str, Sequence[WeightRecord]],
        lora: LoraAdapter,
    ) -> None:
        self.name = target.name
        self._path, self._digest = source, digest
        self._writer = SafetensorsWriter(target, header, mode=file_mode(source))
        self._records, self._lora = records, lora
        self._sums: dict[str, Future[None]] = {}

    def __enter__(self) -> MergeShard:
        with ExitStack() as stack:
            self._stamp = stamp(self._path)
            self._source = SafetensorsShard(self._path)
            stack.callback(self._source.close)
            stack.enter_context(self._writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, pool: SolverPool, hashing: Executor) -> None:
        """Give every weight to the crew, those of one tensor together, and have the source hashed meanwhile."""
        self._found = hashing.submit(sha256, self._path)
        for name in self._source.header.tensors:
            if name in self._records:
                places = self._source.locate(name), self._writer.place(name)
                self._sums[name] = pool.submit(self._sum, (*places, self._records[name]))

    def copy_the_rest(self) -> None:
        """Copy what is not adapted, byte for byte."""
        for name in self._source.header.tensors:
            if name not in self._records:
                self._writer.copy(name, self._source.fileno, self._source.offset(name), self._path)
        self._writer.flush()

    def finish(self) -> int:
        """Wait for the weights, see that the source is what was recorded, name the file; return its size in bytes."""
        for name, summed in self._sums.items():
            summed.result()
            self._writer.written(name)
        if self._found.result() != self._digest:
            hint = f"milora-init verify {self._path.parent}"
            raise CheckpointError(f"{self._path} is not the file that milora-init wrote", hint=hint)
        if stamp(self._path) != self._stamp:
            raise CheckpointError(f"{self._path} changed during the run", hint="run again when nobody writes to it")
        size_bytes = self._writer.finish()
        self._stack.close()
        return size_bytes

    def _sum(
        self,
        job: tuple[TensorSource, WriteTarget, Sequence[WeightRecord]],
        _device: torch.device,
        device_lock: DeviceLock,
    ) -> None:
        source, place, records = job
        with device_lock, open_factors(self._lora.weights) as factors:
            for record in records:
                row = record.row
                if row is None:
                    self._sum_one(source, place, factors, record)
                else:
                    self._sum_one(source.at(row), place.at(row), factors, record)

    def _sum_one(self, source: TensorSource, place: WriteTarget, factors: FactorReader, record: WeightRecord) -> None:
        """Merge one weight, a block of the rows that it is stored in at a time."""
        B, A = factors.read(record)
        left, right = (A.mT, B.mT) if record.transposed else (B, A)
        scale = self._lora.modules[record.key].scale
        dtype: torch.dtype = getattr(torch, record.source_dtype)
        count = max(1, _BLOCK_ELEMENTS // source.shape[1])
        for top in range(0, source.shape[0], count):
            rows = top, min(top + count, source.shape[0])
            try:
                merged = merged_weight(source.rows(*rows).read(), left[slice(*rows)], right, scale, dtype)
            except ValueError as error:
                hint = "look at the training: an adapter with NaN or Inf cannot be merged"
                raise SolveError(f"{record.module} cannot be merged: {error}", hint=hint) from error
            with place.rows(*rows).opened() as write:
                write(merged)


def merged_weight(residual: Tensor, B: Tensor, A: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """residual (m, n) + scale * B (m, r) @ A (r, n), rounded once to dtype.

    For a 16-bit dtype the product is taken in float32, whose rounding is some 2^-16 of what is kept of it.

    Raises:
        ValueError: An entry that dtype does not hold, or none.
    """
    if dtype.itemsize > 2 or max(tensor.dtype.itemsize for tensor in (residual, B, A)) > 4:
        merged = round_once(residual.double().addmm_(B.double(), scale * A.double()), dtype)
    else:
        merged = add_once(residual, B.float() @ (scale * A.float()), dtype)
    if not bool(torch.stack(merged.aminmax()).isfinite().all()):
        raise ValueError(f"it overflows {str(dtype).removeprefix('torch.')}, or the adapter is not finite")
    return merged
