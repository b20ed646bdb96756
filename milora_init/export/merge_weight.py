"""Make one tensor of a merged model: W' = round(residual + scale * B @ A), or trained values, in the dtype to write.

With DoRA each row of residual + scale * B @ A is scaled to the trained length: W' = m / |V| * V, with the magnitudes m
and the row norms |V| of V = residual + scale * B @ A (https://arxiv.org/abs/2402.09353, equation 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milora_init.checkpoint.dequantise import QuantisedSource
from milora_init.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.checkpoint.writer import WriteTarget
from milora_init.errors import SolveError
from milora_init.export.trained_parameters import NewTensor
from milora_init.linalg.rounding import add_once, round_once
from milora_init.lora.folder import FactorReader, open_factors
from milora_init.manifest import WeightRecord
from milora_init.run.pool import DeviceLock
from milora_init.run.progress import Progress

_BLOCK_ELEMENTS = 1 << 19  # of a block of rows, which fits into a CPU's cache


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """A weight that is merged.

    Attributes:
        record: The weight.
        scale: The factor of B @ A.
        magnitude: The name of DoRA's vector in the adapter's file; None without DoRA.
    """

    record: WeightRecord
    scale: float
    magnitude: str | None = None


@dataclass(frozen=True, slots=True)
class MergeJob:
    """Make one tensor.

    Attributes:
        residual: Where the base's tensor is read; None if the adapter's file has all of it.
        merged: Where it is written.
        weights: The adapted weights in it. Experts are several weights in one tensor.
        new: The trained values that replace it; None where there are none.
        factors: The adapter's file.
    """

    residual: TensorSource | QuantisedSource | None
    merged: WriteTarget
    weights: tuple[MergedWeight, ...]
    new: NewTensor | None
    factors: Path


def run(job: MergeJob, device: torch.device, device_lock: DeviceLock, progress: Progress) -> None:
    """Do a job on the CPU: a task of the `SolverPool`.

    Raises:
        CheckpointError: The residual or the factors cannot be read.
        SolveError: A merged weight that does not fit its dtype.
        OutputError: The merged weight cannot be written.
    """
    residual = job.residual
    with device_lock, open_factors(job.factors) as factors:
        if job.new or not job.weights:
            progress.solving(job.merged.name, str(device))
            _replace(residual, job.merged, job.new, factors)
        for weight in job.weights:
            assert residual is not None
            progress.solving(weight.record.module, str(device))
            row = weight.record.row
            places = (residual, job.merged) if row is None else (residual.at(row), job.merged.at(row))
            _merge(*places, factors, weight)
    progress.tensor(job.merged.name, residual.size_bytes if residual else 0)


def _replace(
    residual: TensorSource | QuantisedSource | None, merged: WriteTarget, new: NewTensor | None, factors: FactorReader
) -> None:
    """Write trained values, or the base's values in another dtype, one block of rows at a time."""
    whole = factors.read_tensor(new.whole) if new and new.whole else None
    rows = factors.read_tensor(new.rows) if new and new.rows else None
    if not merged.shape:  # a scalar
        assert whole is not None or residual is not None
        with _named(merged.name), merged.opened() as write:
            write(_cast(whole if whole is not None else residual.read(), merged))  # type: ignore[union-attr]
        return
    source = residual if whole is None else whole
    assert source is not None
    read = _row_reader(source)
    for start, stop in _blocks(merged):
        block = read(start, stop)
        if rows is not None and new is not None:
            block = block.to(torch.promote_types(block.dtype, rows.dtype), copy=True)
            for number, row in enumerate(new.row_numbers):
                if start <= row < stop:
                    block[row - start] = rows[number]
        target = merged.rows(start, stop)
        with _named(merged.name), target.opened() as write:
            write(_cast(block, target))


def _cast(values: Tensor, target: WriteTarget) -> Tensor:
    """Values in the dtype of a target, rounded once. Raises ValueError where one does not fit."""
    dtype = TORCH_DTYPES[target.dtype]
    if values.dtype == dtype or not values.dtype.is_floating_point:
        return values.to(dtype)
    if values.dtype.itemsize > 4:
        cast = round_once(values.reshape(1, -1), dtype).reshape(values.shape)
    else:
        cast = values.to(dtype)  # one rounding
    if bool(values.isfinite().all()) and not bool(cast.isfinite().all()):
        raise ValueError(f"it overflows {torch_name(target.dtype)}")
    return cast


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn a ValueError of the block into a SolveError that names the tensor."""
    try:
        yield
    except ValueError as error:
        hint = "choose another --dtype, or look at the training: NaN or Inf cannot be merged"
        raise SolveError(f"{name} cannot be merged: {error}", hint=hint) from error


def _row_reader(source: Tensor | TensorSource | QuantisedSource) -> Callable[[int, int], Tensor]:
    """A function that returns the rows from `start` to `stop`. A pickled or quantised tensor is read as a whole."""
    if isinstance(source, TensorSource) and source.offset is not None:
        return lambda start, stop: source.rows(start, stop).read()
    whole = source if isinstance(source, Tensor) else source.read()
    return lambda start, stop: whole[start:stop]


def _merge(
    residual: TensorSource | QuantisedSource, merged: WriteTarget, factors: FactorReader, weight: MergedWeight
) -> None:
    """Merge one weight, one block of its stored rows at a time."""
    record, scale = weight.record, weight.scale
    B, A = factors.read(record)
    left, right = (A.mT, B.mT) if record.transposed else (B, A)
    dtype = TORCH_DTYPES[merged.dtype]
    read = _row_reader(residual)
    if weight.magnitude is None:
        adds_nothing = not (bool(left.any()) and bool(right.any()))  # a sum with 0 would change the sign of -0
        for start, stop in _blocks(merged):
            target = merged.rows(start, stop)
            with _named(record.module), target.opened() as write:
                if adds_nothing:
                    write(_finite(_cast(read(start, stop), target)))
                else:
                    write(merged_weight(read(start, stop), left[start:stop], right, scale, dtype))
        return
    magnitude = factors.read_tensor(weight.magnitude).double()

    def adapted(start: int, stop: int) -> Tensor:
        return read(start, stop).double().addmm_(left[start:stop].double(), scale * right.double())

    norms = None
    if record.transposed:  # the rows of the weight are the columns of the tensor
        squares = [adapted(start, stop).square().sum(dim=0) for start, stop in _blocks(merged)]
        norms = torch.stack(squares).sum(dim=0).sqrt()
    for start, stop in _blocks(merged):
        V = adapted(start, stop)
        factor = magnitude / norms if norms is not None else (magnitude[start:stop] / V.norm(dim=1))[:, None]
        with _named(record.module), merged.rows(start, stop).opened() as write:
            write(_finite(round_once(V * factor, dtype)))


def _blocks(target: WriteTarget) -> Iterator[tuple[int, int]]:
    """The first and the last row of each block of a target."""
    rows, *others = target.shape
    width = 1
    for length in others:
        width *= length
    count = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, count):
        yield start, min(start + count, rows)


def merged_weight(residual: Tensor, B: Tensor, A: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """residual (m, n) + scale * B (m, r) @ A (r, n), rounded once to dtype.

    For a 16-bit dtype the product is computed in float32: its rounding error is about 2^-16 of that of the dtype.

    Raises:
        ValueError: An entry of the result is not finite in dtype.
    """
    if dtype.itemsize > 2 or max(tensor.dtype.itemsize for tensor in (residual, B, A)) > 4:
        return _finite(round_once(residual.double().addmm_(B.double(), scale * A.double()), dtype))
    return _finite(add_once(residual, B.float() @ (scale * A.float()), dtype))


def _finite(merged: Tensor) -> Tensor:
    """The tensor itself. Raises ValueError if an entry is not finite."""
    if not bool(torch.stack(merged.aminmax()).isfinite().all()):
        raise ValueError(f"it overflows {torch_name(DTYPE_NAMES[merged.dtype])}, or the adapter is not finite")
    return merged
