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

from milora_init.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES, bytes_of
from milora_init.checkpoint.header import SAFETENSORS_DTYPES, plan_header, read_header
from milora_init.errors import CheckpointError, out_of_memory

_PREAD_BYTES = 1 << 30  # Linux reads at most 2 GiB in one call


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where one tensor can be read: a value that another thread or process can use.

    Attributes:
        path, name: The file and the tensor in it.
        dtype, shape: Of what is read, the dtype by its safetensors name.
        offset: Where its bytes start in a safetensors file; None in a pickle, where the tensor is found by its name.
        row: The one entry of the tensor's first dimension that is read; None for the whole tensor.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    row: int | None = None

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * SAFETENSORS_DTYPES[self.dtype].itemsize

    def at(self, row: int) -> TensorSource:
        """One entry of the tensor's first dimension."""
        entry = replace(self, shape=self.shape[1:], row=row)
        return entry if self.offset is None else replace(entry, offset=self.offset + row * entry.size_bytes)

    def rows(self, start: int, stop: int) -> TensorSource:
        """The entries `start` to `stop` of the first dimension of a tensor in a safetensors file."""
        assert self.offset is not None
        row_bytes = math.prod(self.shape[1:]) * SAFETENSORS_DTYPES[self.dtype].itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * row_bytes)

    def read(self, *, pinned: bool = False) -> Tensor:
        """The tensor in its own memory on the CPU, page-locked if `pinned`, for a GPU. Raises CheckpointError."""
        if self.offset is None:
            with PickleShard(self.path) as shard:
                tensor = shard.read(self.name, self.row)
            return tensor.pin_memory() if pinned else tensor
        tensor = torch.empty(self.shape, dtype=TORCH_DTYPES[self.dtype], pin_memory=pinned)
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
    """An open `.safetensors` file; its `header` is checked when it is opened. Use it with `with`, or `close` it.

    Raises:
        CheckpointError: As `read_header`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.fileno = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> SafetensorsShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str) -> Tensor:
        """A tensor of the file, in its own memory on the CPU. Raises CheckpointError."""
        return self.locate(name).read()

    def locate(self, name: str) -> TensorSource:
        """Where the tensor can be read, also from another thread or process."""
        info = self.header.tensors[name]
        return TensorSource(self.path, name, info.dtype, info.shape, self.offset(name))

    def offset(self, name: str) -> int:
        """Where the tensor's bytes start in the file."""
        return len(self.header.raw) + self.header.tensors[name].start

    def close(self) -> None:
        os.close(self.fileno)


class PickleShard:
    """An open `pytorch_model*.bin` file; `header` is that of the safetensors file with the same tensors.

    Raises:
        CheckpointError: A file that `torch.load(weights_only=True)` does not read, or that holds more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types here, among them pickle's own
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

    def __enter__(self) -> PickleShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def locate(self, name: str) -> TensorSource:
        """Where the tensor can be read, also from another thread or process."""
        info = self.header.tensors[name]
        return TensorSource(self.path, name, info.dtype, info.shape, None)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one entry of its first dimension, in its own memory on the CPU."""
        tensor = self._tensors[name]
        return (tensor if row is None else tensor[row]).clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Drop the tensors, and with them the mapped file."""
        self._tensors = {}


def open_shard(path: Path) -> SafetensorsShard | PickleShard:
    """Open one file of weights. Raises CheckpointError."""
    return SafetensorsShard(path) if path.suffix == ".safetensors" else PickleShard(path)
