"""Read single tensors from safetensors files and from pickled PyTorch files.

Every safetensors header is checked before data is read. Pickled files are opened only by
`torch.load(weights_only=True, mmap=True)`.

Reads use `pread`, not `mmap`: pages of a mapped file count as resident memory of the process, and a job with a memory
limit is killed for them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from milora_init.checkpoint.header import DTYPE_NAMES, DTYPES, bytes_of, plan_header, read_header
from milora_init.errors import CheckpointError, out_of_memory

_PREAD_BYTES = 1 << 30  # Linux moves at most 2 GiB in one call


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where one tensor can be read: a value, for whoever is to read it.

    `offset` is where its bytes start in a safetensors file; None in a pickle, which is searched by name. `row`, if
    any, is the one entry of its first dimension that is meant; the other fields then describe that entry.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    row: int | None = None

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def at(self, row: int) -> TensorSource:
        """One entry of the tensor's first dimension."""
        entry = replace(self, shape=self.shape[1:], row=row)
        return entry if self.offset is None else replace(entry, offset=self.offset + row * entry.size_bytes)

    def rows(self, start: int, stop: int) -> TensorSource:
        """Some entries of the first dimension of a tensor in a safetensors file."""
        assert self.offset is not None
        size_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * size_bytes)

    def read(self, *, pinned: bool = False) -> Tensor:
        """The tensor, in memory of its own, on the CPU; page-locked, for its way to a GPU. Raises CheckpointError."""
        if self.offset is None:
            tensor = PickleShard(self.path).read(self.name, self.row)
            return tensor.pin_memory() if pinned else tensor
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype], pin_memory=pinned)
        view, position = bytes_of(tensor), self.offset
        try:
            with self.path.open("rb", buffering=0) as file:
                while view:
                    count = os.preadv(file.fileno(), [view[:_PREAD_BYTES]], position)
                    if count == 0:
                        raise CheckpointError(f"{self.path} ended inside {self.name}: it changed during the run")
                    view, position = view[count:], position + count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read {self.name}: {error.strerror}") from error
        return tensor


class SafetensorsShard:
    """A `.safetensors` file, open. `header` is checked before this exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.fileno = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, name: str) -> Tensor:
        """A tensor of the file, in memory of its own, on the CPU. Raises CheckpointError."""
        return self.locate(name).read()

    def locate(self, name: str) -> TensorSource:
        """Where the tensor can be read by somebody else."""
        info = self.header.tensors[name]
        return TensorSource(self.path, name, info.dtype, info.shape, self.offset(name))

    def offset(self, name: str) -> int:
        """Where the tensor's bytes start in the file."""
        return len(self.header.raw) + self.header.tensors[name].start

    def close(self) -> None:
        os.close(self.fileno)


class PickleShard:
    """A `pytorch_model*.bin` file, open; its `header` is the one that its safetensors twin will have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises half a dozen types here, pickle's own among them
            if out_of_memory(error):
                raise
            raise CheckpointError(
                f"{path}: torch.load(weights_only=True, mmap=True) refuses it: {str(error).splitlines()[0]}",
                hint="save it as safetensors: model.save_pretrained(FOLDER) from a machine that trusts the file",
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise CheckpointError(f"{path}: not a plain mapping of names to tensors")
        self._tensors: dict[str, Tensor] = tensors
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
                raise CheckpointError(
                    f"{path}: {name} is {tensor.dtype} {tensor.layout}, which has no safetensors form"
                )
        self.header = plan_header(
            ((name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()),
            metadata={"format": "pt"},
        )

    def locate(self, name: str) -> TensorSource:
        info = self.header.tensors[name]
        return TensorSource(self.path, name, info.dtype, info.shape, None)

    def read(self, name: str, row: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        return (tensor if row is None else tensor[row]).clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._tensors = {}


def open_shard(path: Path) -> SafetensorsShard | PickleShard:
    """Open one file of weights. Raises CheckpointError."""
    return SafetensorsShard(path) if path.suffix == ".safetensors" else PickleShard(path)
