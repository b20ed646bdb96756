"""Merge one weight: W' = round(residual + scale * B @ A), in the dtype of the original model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milora_init.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.checkpoint.writer import WriteTarget
from milora_init.errors import SolveError
from milora_init.linalg.rounding import add_once, round_once
from milora_init.lora.folder import FactorReader, open_factors
from milora_init.manifest import WeightRecord
from milora_init.run.pool import DeviceLock
from milora_init.run.progress import Progress

_BLOCK_ELEMENTS = 1 << 19  # of a block of rows, which fits into a CPU's cache


@dataclass(frozen=True, slots=True)
class MergeJob:
    """Merge the weights of one stored tensor.

    Attributes:
        residual: Where the tensor is read.
        merged: Where it is written.
        weights: The weights in it, with the scale of each one's B @ A. Experts are several weights in one tensor.
        factors: The adapter's file.
    """

    residual: TensorSource
    merged: WriteTarget
    weights: tuple[tuple[WeightRecord, float], ...]
    factors: Path


def run(job: MergeJob, device: torch.device, device_lock: DeviceLock, progress: Progress) -> None:
    """Do a job on the CPU: a task of the `SolverPool`.

    Raises:
        CheckpointError: The residual or the factors cannot be read.
        SolveError: A merged weight that does not fit its dtype.
        OutputError: The merged weight cannot be written.
    """
    with device_lock, open_factors(job.factors) as factors:
        for record, scale in job.weights:
            progress.solving(record.module, str(device))
            residual, merged = job.residual, job.merged
            if record.row is not None:
                residual, merged = residual.at(record.row), merged.at(record.row)
            _merge(residual, merged, factors, record, scale)
    progress.tensor(job.residual.name, job.residual.size_bytes)


def _merge(
    residual: TensorSource, merged: WriteTarget, factors: FactorReader, record: WeightRecord, scale: float
) -> None:
    """Merge one weight, one block of its stored rows at a time; a pickled weight is read as a whole."""
    B, A = factors.read(record)
    left, right = (A.mT, B.mT) if record.transposed else (B, A)
    dtype = TORCH_DTYPES[merged.dtype]
    whole = residual.read() if residual.offset is None else None
    count = max(1, _BLOCK_ELEMENTS // residual.shape[1])
    for start in range(0, residual.shape[0], count):
        stop = min(start + count, residual.shape[0])
        try:
            rows = residual.rows(start, stop).read() if whole is None else whole[start:stop]
            block = merged_weight(rows, left[start:stop], right, scale, dtype)
        except ValueError as error:
            hint = "look at the training: an adapter with NaN or Inf cannot be merged"
            raise SolveError(f"{record.module} cannot be merged: {error}", hint=hint) from error
        with merged.rows(start, stop).opened() as write:
            write(block)


def merged_weight(residual: Tensor, B: Tensor, A: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """residual (m, n) + scale * B (m, r) @ A (r, n), rounded once to dtype.

    For a 16-bit dtype the product is computed in float32: its rounding error is about 2^-16 of that of the dtype.

    Raises:
        ValueError: An entry of the result is not finite in dtype.
    """
    if dtype.itemsize > 2 or max(tensor.dtype.itemsize for tensor in (residual, B, A)) > 4:
        merged = round_once(residual.double().addmm_(B.double(), scale * A.double()), dtype)
    else:
        merged = add_once(residual, B.float() @ (scale * A.float()), dtype)
    if not bool(torch.stack(merged.aminmax()).isfinite().all()):
        raise ValueError(f"it overflows {torch_name(DTYPE_NAMES[dtype])}, or the adapter is not finite")
    return merged
