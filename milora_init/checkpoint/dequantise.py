"""Compute the values of quantised tensors: float32(code) * float32(scale), one product in float32.

This is what transformers computes when it loads such a checkpoint with `dequantize=True`, before it rounds the product
to the dtype of the model. Here the product itself is the weight: its components are taken out of it, and only the
result is rounded.

Codes become numbers by a table: a byte indexes 256 values, or 256 pairs of values where it holds two codes. Only one
block of rows is in memory beside the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from milora_init.checkpoint.dtypes import TORCH_DTYPES
from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.quantised_tensors import QuantisedTensor
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.errors import CheckpointError

_BLOCK_ELEMENTS = 1 << 18  # of a block of rows, which fits into a CPU's cache
# The values of E2M1, a 4-bit float with a sign, two bits of exponent and one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class QuantisedSource:
    """Where a quantised tensor can be read: a value that another thread or process can use, like a `TensorSource`.

    Attributes:
        tensor: The tensor.
        parts: Where its parts are, by role. They may be in several files.
        row: The one entry of the first dimension that is read; None for the whole tensor.
    """

    tensor: QuantisedTensor
    parts: Mapping[str, TensorSource]
    row: int | None = None

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def path(self) -> Path:
        """The file that holds the codes."""
        return self.parts["codes"].path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.row is None else self.tensor.shape[1:]

    @property
    def size_bytes(self) -> int:
        """How many bytes are read."""
        return sum(part.size_bytes for part in self.parts.values())

    def at(self, row: int) -> QuantisedSource:
        """One entry of the tensor's first dimension. A part without that dimension is shared by all entries."""
        count = self.tensor.shape[0]
        parts = {role: part.at(row) if part.shape[:1] == (count,) else part for role, part in self.parts.items()}
        return QuantisedSource(self.tensor, parts, row)

    def read(self, *, pinned: bool = False) -> Tensor:
        """The values in float32, in memory of their own on the CPU, page-locked if `pinned`.

        Raises:
            CheckpointError: A part cannot be read, holds NaN or Inf, or contradicts the others.
        """
        if len(self.shape) > 2:
            return torch.stack([self.at(row).read() for row in range(self.shape[0])])
        values = torch.empty(self.tensor.matrix, pin_memory=pinned)
        for _ in self._fill(values):
            pass
        return values.mT if self.tensor.rule.transposed else values.reshape(self.shape)

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """The values of a tensor of two dimensions, a block of rows at a time: first row, last row + 1, values.

        The next block overwrites the last one. Raises CheckpointError as `read`.
        """
        assert len(self.shape) == 2
        if self.tensor.rule.transposed or self.tensor.matrix != self.shape:
            yield 0, self.shape[0], self.read()
            return
        rows = _rows_at_a_time(self.tensor.matrix)
        buffer = torch.empty(min(rows, self.shape[0]), self.shape[1])
        for start, block in self._fill(buffer, reuse=True):
            yield start, start + block.shape[0], block

    def _fill(self, values: Tensor, *, reuse: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Fill `values` a block of rows at a time, and yield the first row and the values of each block.

        With `reuse`, `values` has the size of one block and every block is written there.
        """
        m, n = self.tensor.matrix
        others = {role: part.read() for role, part in self.parts.items() if role != "codes"}
        self._require_consistent(others)
        factors = _Factors(self.tensor, others)
        decode = _decoder(self.tensor, self.parts["codes"].dtype, others)
        codes = _code_reader(self.parts["codes"], m)
        step = _rows_at_a_time((m, n))
        for start in range(0, m, step):
            stop = min(start + step, m)
            block = values[: stop - start] if reuse else values[start:stop]
            decode(codes(start, stop), block)
            factors.apply(block, start)
            if not bool(block.sum().isfinite()) and not bool(block.isfinite().all()):
                raise CheckpointError(
                    f"{self.path}: {self.name} holds NaN or Inf: a code, or a scale such as "
                    f"{self.parts['scale'].name}, is no finite number",
                    hint="fetch the model again; if that does not help, its maker has to repair it",
                )
            yield start, block

    def _require_consistent(self, others: Mapping[str, Tensor]) -> None:
        """The stored shape of packed integers must be the one that planning derived, and each column have a group."""
        if "shape" in others and tuple(others["shape"].tolist()) != self.tensor.shape:
            raise CheckpointError(
                f"{self.parts['shape'].name} says {others['shape'].tolist()}, and the other parts of {self.name} fit "
                f"{list(self.tensor.shape)}",
                hint="fetch the model again",
            )
        if "order" in others:
            order, groups = others["order"], others["scale"].shape[1]
            if not bool(((order >= 0) & (order < groups)).all()):
                raise CheckpointError(
                    f"{self.parts['order'].name} names a group of columns that {self.parts['scale'].name} does not "
                    f"have: it has {groups}",
                    hint="fetch the model again",
                )


def locate_stored(checkpoint: Checkpoint, name: str) -> TensorSource:
    """Where a stored tensor of a checkpoint can be read once its file is on the disk."""
    file, info = checkpoint.file_of[name], checkpoint.stored[name]
    offset = None if checkpoint.is_pickle else len(checkpoint.headers[file].raw) + info.start
    return TensorSource(checkpoint.folder / file, name, info.dtype, info.shape, offset)


def locate(checkpoint: Checkpoint, name: str) -> TensorSource | QuantisedSource:
    """Where a tensor of the model can be read; a quantised one is read as its values in float32."""
    tensor = checkpoint.quantised.tensors.get(name)
    if tensor is None:
        return locate_stored(checkpoint, name)
    return QuantisedSource(tensor, {role: locate_stored(checkpoint, p.name) for role, p in tensor.parts.items()})


class _Factors:
    """What the codes of one matrix are shifted and multiplied by: one entry for each block of its rows and columns."""

    def __init__(self, tensor: QuantisedTensor, parts: Mapping[str, Tensor]) -> None:
        rule, (m, n) = tensor.rule, tensor.matrix
        self._block = (min(rule.block[0], m), min(rule.block[1], n))
        grid = (-(-m // rule.block[0]), -(-n // rule.block[1]))
        scale = parts["scale"]
        if rule.nested_block:
            scale = parts["nested_map"][scale.int()]
            absmax = parts["nested_absmax"][torch.arange(scale.numel()) // rule.nested_block]
            scale = scale * absmax + rule.nested_offset
        scale = _as_float(scale)
        if "global_scale" in parts:
            whole = parts["global_scale"].float().reshape(())
            scale = scale / whole if rule.divide else scale * whole
        self._scale = scale.reshape(grid)
        self._zero: Tensor | None = None
        if "zero_point" in parts:
            zero = parts["zero_point"]
            if rule.encoding == "integer":  # packed along the first dimension
                packed = zero.mT.clone(memory_format=torch.contiguous_format).view(torch.uint8)
                zero = _integers(packed, rule.bits, m).mT
            self._zero = zero.float().reshape(grid)
        self._order = parts["order"].long() if "order" in parts else None

    def apply(self, values: Tensor, start: int) -> None:
        """Shift and multiply a block of rows in place; its first row is row `start` of the matrix."""
        if self._zero is not None:
            self._each(values, self._zero, start, Tensor.sub_)
        self._each(values, self._scale, start, Tensor.mul_)

    def _each(self, values: Tensor, grid: Tensor, start: int, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        (block_rows, block_columns), (rows, n) = self._block, values.shape
        if grid.numel() == 1:
            operation(values, grid.reshape(()))
        elif self._order is not None:
            operation(values, grid[start : start + rows][:, self._order])
        elif block_rows == 1:
            part, full = grid[start : start + rows], n // block_columns
            if full:
                whole = values[:, : full * block_columns].view(rows, full, block_columns)
                operation(whole, part[:, :full, None])
            if full < grid.shape[1]:
                operation(values[:, full * block_columns :], part[:, full:])
        else:
            for i in range(start // block_rows, -(-(start + rows) // block_rows)):
                top, bottom = max(i * block_rows - start, 0), min((i + 1) * block_rows - start, rows)
                operation(values[top:bottom], grid[i].repeat_interleave(block_columns)[:n])


def _rows_at_a_time(matrix: tuple[int, int]) -> int:
    return max(1, _BLOCK_ELEMENTS // max(1, matrix[1]))


def _code_reader(codes: TensorSource, rows: int) -> Callable[[int, int], Tensor]:
    """A function that reads the bytes (rows, bytes of a row) of some rows of a matrix of codes."""
    row_bytes = codes.size_bytes // max(1, rows)
    if codes.offset is None:
        whole = codes.read().view(torch.uint8).reshape(rows, row_bytes)
        return lambda start, stop: whole[start:stop]
    flat = replace(codes, dtype="U8", shape=(rows, row_bytes), row=None)
    return lambda start, stop: flat.rows(start, stop).read()


def _as_float(scale: Tensor) -> Tensor:
    """A stored scale in float32. A byte, and the dtype E8M0, are an exponent of 2."""
    if scale.dtype is torch.uint8 or scale.dtype is TORCH_DTYPES.get("F8_E8M0"):
        return _powers_of_2()[scale.view(torch.uint8).int()]
    return scale.float()


@functools.cache
def _powers_of_2() -> Tensor:
    """2^(b - 127) in float32 for each byte b. 255 stands for NaN, and is Inf here."""
    return (2.0 ** (torch.arange(256, dtype=torch.float64) - 127)).float()


def _decoder(tensor: QuantisedTensor, dtype: str, parts: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor], object]:
    """A function that writes the numbers of codes (rows, bytes) into a tensor (rows, n)."""
    rule = tensor.rule
    if rule.encoding == "stored":
        return lambda codes, values: _look_up_bytes(codes, dtype, values)
    if rule.encoding == "map":
        table = _pairs(parts["map"].float(), high_first=True)
    elif rule.encoding == "e2m1":
        table = _pairs(torch.tensor(_E2M1), high_first=False)
    elif rule.bits == 4:
        table = _pairs(torch.arange(-8.0, 8.0), high_first=False)
    else:
        return lambda codes, values: values.copy_(_integers(codes, rule.bits, values.shape[1]))
    return lambda codes, values: _look_up(codes, table, values)


def _look_up(codes: Tensor, pairs: Tensor, values: Tensor) -> None:
    """Write the pair of numbers of every byte of codes (rows, bytes) into values (rows, n)."""
    (rows, n), width = values.shape, 2 * codes.shape[1]
    target = values if width == n else torch.empty(rows, width)
    torch.index_select(pairs, 0, codes.int().reshape(-1), out=target.view(torch.int64).view(-1))
    if target is not values:  # the codes of a row may end with some that mean nothing
        values.copy_(target[:, :n])


def _look_up_bytes(codes: Tensor, dtype: str, values: Tensor) -> None:
    """Write the number of every byte of codes (rows, n) into values (rows, n). Two at a time are twice as fast."""
    if codes.shape[1] % 2 == 0:
        index = codes.view(torch.uint16).int().reshape(-1)
        torch.index_select(_byte_pairs(dtype), 0, index, out=values.view(torch.int64).view(-1))
    else:
        torch.index_select(_byte_values(dtype), 0, codes.int().reshape(-1), out=values.view(-1))


@functools.cache
def _byte_values(dtype: str) -> Tensor:
    """The numbers (256,) that a byte can be in a dtype of one byte."""
    return torch.arange(256).to(torch.uint8).view(TORCH_DTYPES[dtype]).float()


@functools.cache
def _byte_pairs(dtype: str) -> Tensor:
    """The 65,536 pairs of numbers that two bytes can be, each pair of float32 as one int64."""
    values, both = _byte_values(dtype), torch.arange(1 << 16)
    return torch.stack((values[both & 255], values[both >> 8]), -1).view(torch.int64).reshape(-1)


def _pairs(values: Tensor, *, high_first: bool) -> Tensor:
    """The 256 pairs of numbers that the two halves of a byte stand for, each pair as one int64."""
    byte = torch.arange(256)
    low, high = values[byte & 15], values[byte >> 4]
    return torch.stack((high, low) if high_first else (low, high), -1).view(torch.int64).reshape(-1)


def _integers(codes: Tensor, bits: int, n: int) -> Tensor:
    """The signed integers (rows, n), in float32, of a stream of codes with `bits` bits each, the lowest bits first.

    Eight codes fill `bits` bytes, so each such group of bytes is one whole number.
    """
    rows, groups = codes.shape[0], -(-n // 8)
    padded = torch.zeros(rows, groups * bits, dtype=torch.int64)
    used = min(codes.shape[1], groups * bits)
    padded[:, :used] = codes[:, :used]
    shifts = torch.arange(0, 8 * bits, 8)
    numbers = (padded.view(rows, groups, bits) << shifts).sum(-1)
    entries = (numbers[..., None] >> torch.arange(0, 8 * bits, bits)) & ((1 << bits) - 1)
    return (entries.reshape(rows, 8 * groups)[:, :n] - (1 << (bits - 1))).float()
