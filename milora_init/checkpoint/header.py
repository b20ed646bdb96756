"""Parse, check and plan safetensors headers.

The safetensors library reads tensors, but it does not give their byte ranges, and it lays out a file only from a
complete dict of tensors. Streaming needs both: the byte range of each tensor, and a header before the first tensor
exists. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from milora_init.errors import CheckpointError


class Dtype(NamedTuple):
    """A dtype of the format: its name in torch and config.json, and the size of an entry in bytes."""

    torch_name: str
    itemsize: int


# The one table of dtypes, by their safetensors name. `checkpoint.dtypes` has the dtypes of torch.
SAFETENSORS_DTYPES: Mapping[str, Dtype] = {
    "F64": Dtype("float64", 8), "F32": Dtype("float32", 4), "F16": Dtype("float16", 2), "BF16": Dtype("bfloat16", 2),
    "F8_E4M3": Dtype("float8_e4m3fn", 1), "F8_E5M2": Dtype("float8_e5m2", 1),
    "F8_E4M3FNUZ": Dtype("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": Dtype("float8_e5m2fnuz", 1),
    "F8_E8M0": Dtype("float8_e8m0fnu", 1), "C64": Dtype("complex64", 8),
    "I64": Dtype("int64", 8), "I32": Dtype("int32", 4), "I16": Dtype("int16", 2), "I8": Dtype("int8", 1),
    "U64": Dtype("uint64", 8), "U32": Dtype("uint32", 4), "U16": Dtype("uint16", 2), "U8": Dtype("uint8", 1),
    "BOOL": Dtype("bool", 1),
}  # fmt: skip
FLOATS = ("F32", "BF16", "F16", "F64")  # of weights that a model computes with
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
REFETCH = "fetch the file again: it is damaged or incomplete"


def torch_name(dtype: str) -> str:
    """The name that torch and config.json use for a safetensors dtype: `bfloat16` for `BF16`."""
    return SAFETENSORS_DTYPES[dtype].torch_name


def safetensors_name(dtype: str) -> str:
    """The safetensors name of a dtype that torch and config.json name: `BF16` for `bfloat16`.

    Raises:
        CheckpointError: A name that is not in the table.
    """
    for name, known in SAFETENSORS_DTYPES.items():
        if known.torch_name == dtype:
            return name
    raise CheckpointError(f"dtype {dtype!r} is unknown", hint="fetch the file again")


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
    """A safetensors header.

    Attributes:
        raw: Its bytes in the file, length prefix included.
        metadata: Of the whole file.
        tensors: By name, in the order of their offsets.
    """

    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]

    @property
    def data_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.size_bytes for info in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Size of the file that has this header."""
        return len(self.raw) + self.data_bytes


def read_header(path: Path) -> Header:
    """Parse and check the header of a safetensors file.

    Raises:
        CheckpointError: Not a file, truncated, not JSON, or a tensor whose dtype, shape or offsets are impossible.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{path} is no file")
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > file_bytes - 8:
                raise CheckpointError(f"{path}: truncated, or not a safetensors file", hint=REFETCH)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: its header claims {length} bytes; the format allows 100 MB")
            raw = prefix + file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return parse_header(raw, file_bytes, path)


def parse_header(raw: bytes, file_bytes: int, path: Path) -> Header:
    """Parse and check a header given as bytes; see `read_header`.

    Args:
        raw: The header, length prefix included.
        file_bytes: Size of the whole file.
        path: Names the file in errors.
    """
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
    """Lay out a safetensors file for tensors given as (name, safetensors dtype, shape).

    Wide dtypes come first: readers view the data in place, and a float32 tensor after an odd number of bfloat16 values
    would not be aligned.
    """
    laid_out: dict[str, TensorInfo] = {}
    position = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: -SAFETENSORS_DTYPES[entry[1]].itemsize):
        end = position + math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
        laid_out[name] = TensorInfo(name, dtype, shape, position, end)
        position = end
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    content |= {
        i.name: {"dtype": i.dtype, "shape": i.shape, "data_offsets": [i.start, i.end]} for i in laid_out.values()
    }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Header(len(text).to_bytes(8, "little") + text, metadata or {}, laid_out)


def _entry(path: Path, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        # The format has no limit on the number of dimensions, but a product of thousands of large ones takes very long.
        numbers_ok = len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        numbers_ok = False
    if not numbers_ok:
        raise CheckpointError(f"{path}: the header entry of {name!r} is malformed", hint=REFETCH)
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}, which is unknown here", hint="dequantise it first")
    if end - start != math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize:
        raise CheckpointError(f"{path}: {name} is {dtype} {list(shape)} but has offsets {start} to {end}", hint=REFETCH)
    return TensorInfo(name, dtype, shape, start, end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"{name!r} is in it twice")
        mapping[name] = value
    return mapping
