"""The safetensors format on disk: headers read and checked, headers planned, files written in place.

The library reads tensors well but says nothing about where they lie, and writes a file only from a whole dict of
tensors. Streaming needs both: a header laid out before the first tensor exists, and each tensor written at its own
offset when it is ready. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_init.errors import CheckpointError, OutputError

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    }.items()
    if hasattr(torch, attribute)
}  # fmt: skip
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CHUNK_BYTES = 1 << 30  # Linux moves at most 2 GiB in one call
REFETCH = "fetch the file again: it is damaged or incomplete"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header; `start` and `end` are byte offsets into the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors header: its bytes as they stand (length prefix included), its metadata, its tensors by offset."""

    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Parse and check the header of a safetensors file.

    Raises:
        CheckpointError: Not a file, truncated, not JSON, or a tensor whose dtype, shape or offsets cannot be true.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > file_bytes - 8:
                raise CheckpointError(f"{path}: truncated, or not a safetensors file", hint=REFETCH)
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: its header claims {length} bytes; the format allows 100 MB")
            raw = prefix + file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        entries = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not readable JSON: {error}", hint=REFETCH) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object", hint=REFETCH)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a mapping of strings")
    infos = sorted((_entry(path, name, entry) for name, entry in entries.items()), key=lambda i: (i.start, i.end))
    position = 0
    for info in infos:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: {info.name} {what} (offsets {info.start} to {info.end})", hint=REFETCH)
        position = info.end
    if len(raw) + position != file_bytes:
        raise CheckpointError(
            f"{path}: the header describes {len(raw) + position} bytes, the file has {file_bytes}",
            hint=REFETCH,
        )
    return Header(raw, metadata, {info.name: info for info in infos})


def plan_header(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> Header:
    """Lay out a safetensors file for tensors given as (name, dtype, shape).

    Wide dtypes come first: readers view the data in place, and a float32 tensor behind an odd number of bfloat16
    values would start off its alignment.
    """
    laid: dict[str, TensorInfo] = {}
    position = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: -DTYPES[entry[1]].itemsize):
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        laid[name] = TensorInfo(name, dtype, shape, position, end)
        position = end
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    content |= {i.name: {"dtype": i.dtype, "shape": i.shape, "data_offsets": [i.start, i.end]} for i in laid.values()}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Header(len(text).to_bytes(8, "little") + text, metadata or {}, laid)


def _entry(path: Path, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        # The format knows no limit on dimensions; a product of thousands of large ones is an attack, not a weight.
        numbers_ok = len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        numbers_ok = False
    if not numbers_ok:
        raise CheckpointError(f"{path}: the header entry of {name!r} is malformed", hint=REFETCH)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}, which is unknown here", hint="dequantise it first")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f"{path}: {name} is {dtype} {list(shape)} but has offsets {start} to {end}", hint=REFETCH)
    return TensorInfo(name, dtype, shape, start, end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"{name!r} stands in it twice")
        mapping[name] = value
    return mapping


class SafetensorsWriter:
    """Writes one safetensors file whose header is known: each tensor at its own offset, in any order, once.

    The file grows under `<name>.partial` and takes its name only in `finish()`, after every byte the header promises
    was written and synced. Left without `finish()`, it is removed.

    Raises:
        OutputError: Disk full, no permission, and the like; an unfinished or a doubly written tensor.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self._header = header
        self._partial = path.with_name(path.name + ".partial")
        self._missing = set(header.tensors)
        self._fileno: int | None = None

    def __enter__(self) -> SafetensorsWriter:
        try:
            with _writing(self._partial):
                self._fileno = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                size_bytes = len(self._header.raw) + sum(info.size_bytes for info in self._header.tensors.values())
                # Reserve the room at once: a full disk is found here, not after an hour of work.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._fileno, 0, size_bytes)
                else:
                    os.ftruncate(self._fileno, size_bytes)
                _write_all(self._fileno, memoryview(self._header.raw), 0)
        except BaseException:  # __exit__ is not called for what fails here
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._fileno is not None:
            os.close(self._fileno)
            self._partial.unlink(missing_ok=True)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; its dtype and shape must be those of the header."""
        info = self._take(name)
        if (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (info.dtype, info.shape):
            raise OutputError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned {info.dtype} {list(info.shape)}")
        with _writing(self._partial):
            _write_all(self._open(), _bytes_of(tensor), self._offset(info))

    def copy(self, name: str, source: int, offset: int) -> None:
        """Copy a tensor's bytes from `offset` of the open file `source`, inside the kernel where it can."""
        info = self._take(name)
        with _writing(self._partial):
            _copy_range(source, self._open(), info.size_bytes, offset, self._offset(info))

    def finish(self) -> int:
        """Sync the file and give it its name; return its size in bytes."""
        if self._missing:
            raise OutputError(
                f"{self.path}: {len(self._missing)} tensors were never written, {min(self._missing)} first"
            )
        fileno = self._open()
        with _writing(self._partial):
            os.fsync(fileno)
            size_bytes = os.fstat(fileno).st_size
            os.close(fileno)
            self._fileno = None
            self._partial.replace(self.path)
            sync_folder(self.path.parent)
        return size_bytes

    def _take(self, name: str) -> TensorInfo:
        if name not in self._missing:
            raise OutputError(f"{self.path}: {name} was written twice, or never planned")
        self._missing.remove(name)
        return self._header.tensors[name]

    def _offset(self, info: TensorInfo) -> int:
        return len(self._header.raw) + info.start

    def _open(self) -> int:
        if self._fileno is None:
            raise OutputError(f"{self.path}: not open for writing")
        return self._fileno


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fileno = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fileno)
    finally:
        os.close(fileno)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}", hint="free some space, or choose another --out"
        ) from error


def _write_all(fileno: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fileno, data[:_CHUNK_BYTES], offset)
        data, offset = data[count:], offset + count


def _copy_range(source: int, target: int, length: int, source_offset: int, target_offset: int) -> None:
    while length and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, min(length, _CHUNK_BYTES), source_offset, target_offset)
        except OSError as error:
            if error.errno in (
                errno.EXDEV,
                errno.EINVAL,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
                errno.EBADF,
                errno.EPERM,
            ):
                break  # another file system, or one that cannot: copy through memory
            raise
        if count == 0:
            break
        length, source_offset, target_offset = length - count, source_offset + count, target_offset + count
    while length:
        chunk = os.pread(source, min(length, 1 << 24), source_offset)
        if not chunk:
            raise OutputError("the source file ended early; it changed during the run")
        _write_all(target, memoryview(chunk), target_offset)
        length, source_offset, target_offset = (
            length - len(chunk),
            source_offset + len(chunk),
            target_offset + len(chunk),
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy and without NumPy, which torch does not require."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() == 0:
        return memoryview(b"")
    buffer = (ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr())
    buffer.tensor = flat  # type: ignore[attr-defined]  # keeps the memory alive as long as the view
    return memoryview(buffer).cast("B")
