"""A checkpoint on disk: which files hold which tensors, and one tensor at a time out of them.

Nothing here is trusted. Every safetensors header is parsed and checked before a byte of data is read: a header that
points outside its file, overlaps itself or leaves a gap is an error that names the tensor. Pickled shards
(`pytorch_model*.bin`) are opened by `torch.load(weights_only=True, mmap=True)` and by nothing else.

Reads go through `pread`, not `mmap`: pages of a mapped file count as resident memory of the process, and a job with
a memory limit is killed for them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_init import digest
from milora_init.errors import CheckpointError
from milora_init.safetensors_format import (
    DTYPE_NAMES,
    DTYPES,
    MAX_HEADER_BYTES,
    REFETCH,
    Header,
    TensorInfo,
    bytes_of,
    plan_header,
    read_header,
)
from milora_init.untrusted import path_inside, relative_name

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
ADAPTER_CONFIG = "adapter_config.json"

_SHARD = re.compile(r".+-\d+-of-\d+\.(safetensors|bin)")
_PREAD_BYTES = 1 << 30  # Linux moves at most 2 GiB in one call
_CHUNK_BYTES = 1 << 20


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


Stamp = tuple[int, int]


def stamp(path: Path) -> Stamp:
    """Size and modification time of a file: what tells that it changed. Raises CheckpointError."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def mode(path: Path) -> int:
    """Who may read and write a file: what a copy of it is made with, at most. Raises CheckpointError."""
    try:
        return path.stat().st_mode & 0o666
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file of any size, in pieces. Raises CheckpointError."""
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def read_bytes(path: Path) -> bytes:
    """A small file whole. Raises CheckpointError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


@dataclass(frozen=True)
class Remote:
    """What a Hub knows of a checkpoint.

    Attributes:
        model: Its id; `commit`: of which every file is.
        hashes: SHA-256 of each file of weights.
        absent: Header of each file of weights that is not in the folder yet.
    """

    model: str
    commit: str
    hashes: Mapping[str, str]
    absent: Mapping[str, Header]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights, its headers read and checked, its data untouched.

    Attributes:
        folder: Where it lies.
        headers: Header of each file of weights, by file name, in order.
        stamps: Size and time of each of those files when its header was read; none for one that is not there yet.
        index: The index file's content, None for a single file.
        unfilled: Tensors that the index names and their shards lack. Whether the model wants them is not known here.
        is_pickle: Whether the files are `.bin`.
        remote: What the Hub knows of it, None for a folder that is not of the Hub.
    """

    folder: Path
    headers: Mapping[str, Header]
    stamps: Mapping[str, Stamp]
    index: Mapping[str, Any] | None
    is_pickle: bool
    remote: Remote | None = None
    unfilled: tuple[str, ...] = ()

    @cached_property
    def config_bytes(self) -> bytes:
        return read_bytes(self.folder / "config.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises CheckpointError where it is not a JSON object."""
        return _json_object(self.folder / "config.json")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint by name."""
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}

    @cached_property
    def digest(self) -> Mapping[str, str]:
        """What identifies the source without reading it all, by file."""
        digests = {
            name: digest.WHOLE + self.remote.hashes[name] if self.remote else digest.sampled(self.folder / name, header)
            for name, header in self.headers.items()
        }
        return digests | {"config.json": hashlib.sha256(self.config_bytes).hexdigest()}

    def has_weights(self, recorded: Mapping[str, str]) -> bool:
        """Whether its files of weights are those of a recorded `digest`. Raises CheckpointError."""
        weights = {name: value for name, value in recorded.items() if name != "config.json"}
        return weights.keys() == self.headers.keys() and all(
            digest.fits(weights[name], self.folder / name, header) for name, header in self.headers.items()
        )


def open_checkpoint(folder: Path, remote: Remote | None = None) -> Checkpoint:
    """Find a folder's weights as transformers finds them, and check every header.

    Args:
        folder: The folder.
        remote: Where it is a snapshot of a model on the Hub, what that says of files that are not there yet.

    Raises:
        CheckpointError: No folder, no config.json, no weights, a missing or broken shard, an index that lies.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder", hint="name a folder with a config.json, or a Hub id org/name"
        )
    if not os.path.lexists(folder / "config.json"):
        hint = "this is an adapter: name the base model" if (folder / "adapter_config.json").is_file() else ""
        raise CheckpointError(f"{folder}: no config.json", hint=hint or "name the folder that save_pretrained wrote")
    source_file(folder, "config.json")
    # transformers' own order: a single file wins over an index beside it, safetensors over pickles.
    index: dict[str, Any] | None = None
    absent = remote.absent if remote else {}
    for single, index_name in ((SAFETENSORS_SINGLE, SAFETENSORS_INDEX), (PICKLE_SINGLE, PICKLE_INDEX)):
        if (folder / single).is_file() or single in absent:
            files = [single]
            break
        if os.path.lexists(folder / index_name):
            index = _json_object(source_file(folder, index_name))
            files = _indexed_files(folder / index_name, index, absent)
            break
    else:
        require_no_lone_shard(str(folder), (path.name for path in folder.iterdir()))
        raise CheckpointError(
            f"{folder}: no weights: neither {SAFETENSORS_SINGLE} nor {PICKLE_SINGLE}, nor an index of either",
            hint="other formats (gguf, pth, h5) have to be converted to safetensors first",
        )
    stamps = {file: stamp(folder / file) for file in files if file not in absent}
    headers: dict[str, Header] = {}
    home: dict[str, str] = {}
    for file in files:
        headers[file] = absent[file] if file in absent else _header_of(folder / file)
        for name in headers[file].tensors:
            if name in home:
                raise CheckpointError(f"{folder}: {name} stands in {home[name]} and again in {file}")
            home[name] = file
    unfilled = []
    for name, file in (index or {}).get("weight_map", {}).items():
        if name not in home:
            unfilled.append(name)
        elif home[name] != file:
            raise CheckpointError(f"{folder}: the index puts {name} into {file}, it is in {home[name]}", hint=REFETCH)
    checkpoint = Checkpoint(
        folder, headers, stamps, index, files[0].endswith(".bin"), remote=remote, unfilled=tuple(unfilled)
    )
    _ = checkpoint.config  # a broken config.json is found now, not after the planning
    return checkpoint


def open_model(folder: Path, remote: Remote | None = None) -> Checkpoint:
    """Open a plain model: to be split, or for a split one to be compared with. See `open_checkpoint`.

    Raises:
        CheckpointError: There is an adapter beside its weights, so that the model is another than its tensors say.
    """
    checkpoint = open_checkpoint(folder, remote)
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds {ADAPTER_CONFIG} beside its weights: transformers would load this adapter over them",
            hint="merge it first (PEFT: merge_and_unload, then save_pretrained elsewhere), or move it away",
        )
    return checkpoint


def require_no_lone_shard(where: str, names: Iterable[str]) -> None:
    """Raise CheckpointError where there are shards, of which only an index tells what they are of."""
    for name in sorted(names):
        if shard := _SHARD.fullmatch(name):
            index = PICKLE_INDEX if shard[1] == "bin" else SAFETENSORS_INDEX
            raise CheckpointError(
                f"{where}: shards such as {name}, but no {index}, which says what is in them",
                hint=f"fetch {index} too, from where the shards are from",
            )


def left_out(checkpoint: Checkpoint) -> list[str]:
    """Weights in the folder that are not of the model as it is loaded: files, and subfolders that hold some."""
    taken = {*checkpoint.headers, *(name.partition("/")[0] for name in side_files(checkpoint.folder))}
    found = []
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name in taken or path.name.startswith("."):
            continue
        if path.is_file() and path.suffix.lower() in WEIGHT_SUFFIXES:
            found.append(path.name)
        elif path.is_dir():
            with suppress(OSError):  # a folder that may not be read is not read
                if any(inner.suffix.lower() in WEIGHT_SUFFIXES for inner in path.iterdir()):
                    found.append(f"{path.name}/")
    return found


def _header_of(path: Path) -> Header:
    shard = open_shard(path)
    shard.close()
    return shard.header


def source_file(folder: Path, name: str) -> Path:
    """A file of the model that is copied as it stands.

    A file of weights may be a link to another disk: it is parsed as safetensors, so it cannot be somebody's key. Of
    what is copied unread, a link would bring any file of this machine into the output.

    Raises:
        CheckpointError: A link that leads out of the folder, or nowhere; a pipe, a socket or a device.
    """
    try:
        path = path_inside(folder, name)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: {error}", hint="put the file itself in its place if it belongs to the model, or remove it"
        ) from error
    if not os.path.isfile(path):  # noqa: PTH113 (False, where Path raises for want of permission)
        what = "a link to what is not there" if path.is_symlink() else "no plain file"
        raise CheckpointError(f"{path} is {what}", hint="put the file in its place, or remove it")
    return path


def side_files(folder: Path) -> list[str]:
    """What travels with the weights, as paths relative to the folder: tokenizer, chat template, licence, code.

    Left behind are other forms of the weights, hidden files, and what speaks of the source and not of the output:
    its README (a model card), and an adapter_config.json, which would make transformers load an adapter over it.
    Of the subfolders, those that modules.json names (sentence-transformers) and the additional chat templates come.

    Raises:
        CheckpointError: See `source_file`; or modules.json names what is no side folder.
    """
    beside = (path for path in folder.iterdir() if travels(path.name))
    names = sorted(path.name for path in beside if not os.path.isdir(path))  # noqa: PTH112 (as in `source_file`)
    for subfolder in ("additional_chat_templates", *_module_folders(folder)):
        names += sorted(_files_below(folder, subfolder))
    for name in names:
        source_file(folder, name)
    return list(dict.fromkeys(names))


def _module_folders(folder: Path) -> list[str]:
    """The subfolders that modules.json names. Raises CheckpointError."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    modules = _json(source_file(folder, path.name))
    if not isinstance(modules, list):
        raise CheckpointError(f"{path}: not a list of modules")
    names = [module.get("path", "") for module in modules if isinstance(module, dict)]
    for name in (name for name in names if name != ""):
        try:
            parts = Path(relative_name(name)).parts
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}", hint="correct that path, or remove modules.json") from error
        if not travels(parts[0]) or any(part.startswith(".") for part in parts):
            raise CheckpointError(
                f"{path}: the folder {name!r} cannot go into the output: it is hidden, or has a name of the output's",
                hint="rename that folder, or remove modules.json",
            )
    return [name for name in names if name != ""]


def _files_below(folder: Path, subfolder: str) -> Iterator[str]:
    """Every file below a subfolder that is not hidden, relative to the folder; none where it is not there."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(f"{error.filename}: {error.strerror}") from error

    def require_no_link(path: Path) -> None:
        # Followed, a link to a folder could lead out, or round and round.
        if Path(os.path.realpath(path)) != path:
            where = folder / path.relative_to(home)
            raise CheckpointError(f"{where} is a link to a folder", hint="put the folder itself in its place")

    home = Path(os.path.realpath(folder))
    require_no_link(home / subfolder)
    for place, folders, files in os.walk(home / subfolder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            require_no_link(Path(place, name))
        yield from (str(Path(place, name).relative_to(home)) for name in files if not name.startswith("."))


WEIGHT_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack",
    ".tflite", ".ot", ".mlmodel", ".npz", ".nemo", ".llamafile", ".partial",
})  # fmt: skip
# Of the output's own names, the folder of the adapter among them, a source has none to give.
_LEFT_BEHIND = frozenset({"config.json", "adapter_config.json", "milora_init.json", "milora_merge.json", "lora"})


def travels(name: str) -> bool:
    """Whether a file or a folder beside the weights may go into the output, by its name."""
    return not (
        name.startswith((".", "README"))
        or name.endswith(".index.json")
        or name.casefold() in _LEFT_BEHIND
        or Path(name).suffix.lower() in WEIGHT_SUFFIXES
    )


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, which no file of its kind has")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _indexed_files(path: Path, index: Mapping[str, Any], absent: Collection[str]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path}: no weight_map from tensor names to files")
    files = sorted(set(weight_map.values()))
    for file in files:
        try:
            plain = "/" not in relative_name(file)
        except ValueError:
            plain = False
        if not plain:
            raise CheckpointError(f"{path}: {file!r} is outside the folder; a shard must be a plain file name")
        if Path(file).suffix != Path(path.name.removesuffix(".index.json")).suffix:
            raise CheckpointError(f"{path}: {file!r} is another format than the index")
        if file not in absent and not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent}: {file} is missing, and the index names it", hint=REFETCH)
    return files
