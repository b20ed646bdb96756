"""Open a checkpoint folder: which file holds which tensor, and which other files belong to the model.

Nothing in the folder is trusted. A header that points outside its file, overlaps itself or leaves a gap is an error
that names the tensor; so is an index that contradicts its files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from milora_init.checkpoint import hashing
from milora_init.checkpoint.files import Stamp, read_bytes, read_json_object, source_file, stamp
from milora_init.checkpoint.header import REFETCH, Header, TensorInfo
from milora_init.checkpoint.side_files import WEIGHT_SUFFIXES, side_files
from milora_init.checkpoint.tensor_file import open_shard
from milora_init.errors import CheckpointError
from milora_init.untrusted import relative_name

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
_SHARD = re.compile(r".+-\d+-of-\d+\.(safetensors|bin)")


@dataclass(frozen=True)
class RemoteFiles:
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
    remote: RemoteFiles | None = None
    unfilled: tuple[str, ...] = ()

    @cached_property
    def config_bytes(self) -> bytes:
        return read_bytes(self.folder / "config.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises CheckpointError where it is not a JSON object."""
        return read_json_object(self.folder / "config.json")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint by name."""
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}

    @cached_property
    def digest(self) -> Mapping[str, str]:
        """What identifies the source without reading it all, by file."""
        digests = {
            name: hashing.WHOLE_FILE_PREFIX + self.remote.hashes[name]
            if self.remote
            else hashing.sampled_hash(self.folder / name, header)
            for name, header in self.headers.items()
        }
        return digests | {"config.json": hashlib.sha256(self.config_bytes).hexdigest()}

    def has_weights(self, recorded: Mapping[str, str]) -> bool:
        """Whether its files of weights are those of a recorded `digest`. Raises CheckpointError."""
        weights = {name: value for name, value in recorded.items() if name != "config.json"}
        return weights.keys() == self.headers.keys() and all(
            hashing.matches_hash(weights[name], self.folder / name, header) for name, header in self.headers.items()
        )


def open_checkpoint(folder: Path, remote: RemoteFiles | None = None) -> Checkpoint:
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
            index = read_json_object(source_file(folder, index_name))
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


def open_model(folder: Path, remote: RemoteFiles | None = None) -> Checkpoint:
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
