"""Open a checkpoint folder: which file holds which tensor, and which other files belong to the model.

Nothing in the folder is trusted. A header with a tensor outside its file, an overlap or a gap is an error that names
the tensor; so is an index that contradicts its files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from milora_init.checkpoint import hashing
from milora_init.checkpoint.files import Stamp, read_bytes, read_json_object, read_range, source_file, stamp
from milora_init.checkpoint.header import FLOATS, REFETCH, Header, TensorInfo, read_header, safetensors_name
from milora_init.checkpoint.quantisation import Quantisation, configured_dtype, read_quantisation
from milora_init.checkpoint.quantised_tensors import (
    QuantisedTensor,
    QuantisedTensors,
    find_quantised,
    refuse_without_rule,
)
from milora_init.checkpoint.side_files import WEIGHT_SUFFIXES, side_files
from milora_init.errors import CheckpointError, UsageError
from milora_init.untrusted import relative_name

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
_SHARD = re.compile(r".+-\d+-of-\d+\.(safetensors|bin)")
_SCALES = ("scale", "absmax", "quant_map")  # in the names of parts, whose dtype is not that of the model
_SMALL_BYTES = 1 << 16  # of a tensor that is read while planning


def _not_connected(name: str, _start: int, _stop: int) -> bytes:
    raise CheckpointError(f"{name} is not on the disk", hint="download the model first: hf download MODEL")


@dataclass(frozen=True)
class RemoteFiles:
    """What the Hub knows of a checkpoint.

    Attributes:
        model: Its id.
        commit: The commit that every file is taken from.
        hashes: SHA-256 of each file of weights.
        absent: Header of each file of weights that is not in the folder yet.
        read: Reads the bytes from `start` to `stop` of a file: read(name, start, stop). Raises HubError.
    """

    model: str
    commit: str
    hashes: Mapping[str, str]
    absent: Mapping[str, Header]
    read: Callable[[str, int, int], bytes] = _not_connected

    def of(self, headers: Mapping[str, Header]) -> RemoteFiles:
        """What another machine must know to fetch these files, which it may not have; not connected."""
        return RemoteFiles(self.model, self.commit, {name: self.hashes[name] for name in headers}, headers)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights; its headers are read and checked, its data is not read.

    Attributes:
        folder: The folder.
        headers: Header of each file of weights, by file name, in order.
        stamps: Size and time of each of those files when its header was read; without those that are not there yet.
        index: The index file's content, None for a single file.
        missing_tensors: Names that are in the index and in no shard. `read_structure` checks if the model needs them.
        is_pickle: Whether the files are `.bin`.
        remote: What the Hub knows of it; None for a folder that is not from the Hub.
    """

    folder: Path
    headers: Mapping[str, Header]
    stamps: Mapping[str, Stamp]
    index: Mapping[str, Any] | None
    is_pickle: bool
    remote: RemoteFiles | None = None
    missing_tensors: tuple[str, ...] = ()

    @cached_property
    def config_bytes(self) -> bytes:
        """The content of config.json. Raises CheckpointError."""
        return read_bytes(self.folder / "config.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises CheckpointError where it is not a JSON object."""
        return read_json_object(self.folder / "config.json")

    @cached_property
    def stored(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name, as the files have it."""
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}

    @cached_property
    def file_of(self) -> Mapping[str, str]:
        """The file of every stored tensor."""
        return {name: file for file, header in self.headers.items() for name in header.tensors}

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """How the checkpoint is quantised; None if it is not. Raises CheckpointError."""
        return read_quantisation(self.folder, self.config)

    @cached_property
    def quantised(self) -> QuantisedTensors:
        """The quantised tensors. Raises CheckpointError for a dtype without a rule and for parts that do not fit."""
        found = QuantisedTensors({}, frozenset())
        if self.quantisation:
            found = find_quantised(self.quantisation, self.stored, self._dtype, self._read_small)
        refuse_without_rule(self.stored, found.part_names, quantised=self.quantisation is not None)
        return found

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo | QuantisedTensor]:
        """Every tensor of the model by name. A quantised one has the shape and the dtype of its dense form."""
        if not self.quantised.tensors:
            return self.stored
        by_codes = {tensor.codes.name: tensor for tensor in self.quantised.tensors.values()}
        parts = self.quantised.part_names
        found: dict[str, TensorInfo | QuantisedTensor] = {}
        for name, info in self.stored.items():
            if name in by_codes:
                found[by_codes[name].name] = by_codes[name]
            elif name not in parts:
                found[name] = info
        return found

    @cached_property
    def _dtype(self) -> str:
        """The dtype of the model, by its safetensors name: that of config.json, else the commonest of its floats.

        Raises:
            CheckpointError: config.json names another dtype than those that dense weights can have.
        """
        if name := configured_dtype(self.config):
            if (dtype := safetensors_name(name)) not in FLOATS:
                raise CheckpointError(
                    f"{self.folder}/config.json names the dtype {name}, which dense weights cannot have",
                    hint="set `dtype` there to bfloat16, float16 or float32: the one that the model computes in",
                )
            return dtype
        no_scales = (info for name, info in self.stored.items() if not any(word in name for word in _SCALES))
        dtypes = Counter(info.dtype for info in no_scales)
        return max(("BF16", "F16", "F32"), key=lambda dtype: dtypes[dtype])

    def _read_small(self, name: str) -> bytes:
        """The bytes of a small stored tensor. Raises CheckpointError, and HubError if it is still on the Hub."""
        file = self.file_of[name]
        info, start = self.stored[name], len(self.headers[file].raw) + self.stored[name].start
        if info.size_bytes > _SMALL_BYTES:
            raise CheckpointError(f"{name} has {info.size_bytes} bytes, and should be a short description")
        if self.remote and file in self.remote.absent:
            return self.remote.read(file, start, start + info.size_bytes)
        if self.is_pickle:
            from milora_init.checkpoint.dtypes import bytes_of
            from milora_init.checkpoint.tensor_file import PickleShard

            with PickleShard(self.folder / file) as shard:
                return bytes(bytes_of(shard.read(name)))
        return read_range(self.folder / file, start, info.size_bytes)

    @cached_property
    def digest(self) -> Mapping[str, str]:
        """A hash of each file that identifies the model without reading all of it."""
        digests = {
            name: hashing.WHOLE_FILE_PREFIX + self.remote.hashes[name]
            if self.remote
            else hashing.sampled_hash(self.folder / name, header)
            for name, header in self.headers.items()
        }
        return digests | {"config.json": hashlib.sha256(self.config_bytes).hexdigest()}

    def has_weights(self, recorded: Mapping[str, str]) -> bool:
        """Whether its files of weights have the hashes of a recorded `digest`. Raises CheckpointError."""
        weights = {name: value for name, value in recorded.items() if name != "config.json"}
        return weights.keys() == self.headers.keys() and all(
            hashing.matches_hash(weights[name], self.folder / name, header) for name, header in self.headers.items()
        )


def open_checkpoint(folder: Path, remote: RemoteFiles | None = None) -> Checkpoint:
    """Find a folder's weights as transformers finds them, and check every header.

    Args:
        folder: The folder.
        remote: For a snapshot of a model on the Hub, what the Hub knows of it.

    Raises:
        UsageError: No folder.
        CheckpointError: No config.json, no weights, a missing or broken shard, a wrong index.
    """
    if not folder.is_dir():
        raise UsageError.no_folder(folder, folder, hint="name a folder with a config.json, or a Hub id org/name")
    if not os.path.lexists(folder / "config.json"):
        hint = "this is an adapter: name the original model" if (folder / "adapter_config.json").is_file() else ""
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
    file_of: dict[str, str] = {}
    for file in files:
        headers[file] = absent[file] if file in absent else _header_of(folder / file)
        for name in headers[file].tensors:
            if name in file_of:
                raise CheckpointError(f"{folder}: {name} is in {file_of[name]} and again in {file}")
            file_of[name] = file
    missing_tensors = []
    for name, file in (index or {}).get("weight_map", {}).items():
        if name not in file_of:
            missing_tensors.append(name)
        elif file_of[name] != file:
            raise CheckpointError(
                f"{folder}: the index puts {name} into {file}, it is in {file_of[name]}", hint=REFETCH
            )
    checkpoint = Checkpoint(
        folder, headers, stamps, index, files[0].endswith(".bin"), remote=remote, missing_tensors=tuple(missing_tensors)
    )
    _ = checkpoint.config  # a broken config.json is found here, not after the planning
    return checkpoint


def open_model(folder: Path, remote: RemoteFiles | None = None) -> Checkpoint:
    """Open an original model, to split it or to compare a pair with it. See `open_checkpoint`.

    Raises:
        CheckpointError: There is an adapter beside its weights: transformers would load another model than the tensors.
    """
    checkpoint = open_checkpoint(folder, remote)
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds {ADAPTER_CONFIG} beside its weights: transformers would load this adapter over them",
            hint="merge it first (PEFT: merge_and_unload, then save_pretrained elsewhere), or move it away",
        )
    _ = checkpoint.quantised  # a tensor that no rule reads is found here
    return checkpoint


def require_no_lone_shard(where: str, names: Iterable[str]) -> None:
    """Raise CheckpointError where there are shards without their index."""
    for name in sorted(names):
        if shard := _SHARD.fullmatch(name):
            index = PICKLE_INDEX if shard[1] == "bin" else SAFETENSORS_INDEX
            raise CheckpointError(
                f"{where}: shards such as {name}, but no {index}, which says what is in them",
                hint=f"fetch {index} too, from where the shards are from",
            )


def unloaded_weights(checkpoint: Checkpoint) -> list[str]:
    """Weights in the folder that transformers does not load: files, and subfolders with such files."""
    used = {*checkpoint.headers, *(name.partition("/")[0] for name in side_files(checkpoint.folder))}
    found = []
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name in used or path.name.startswith("."):
            continue
        if path.is_file() and path.suffix.lower() in WEIGHT_SUFFIXES:
            found.append(path.name)
        elif path.is_dir():
            with suppress(OSError):  # no permission to read it
                if any(inner.suffix.lower() in WEIGHT_SUFFIXES for inner in path.iterdir()):
                    found.append(f"{path.name}/")
    return found


def _header_of(path: Path) -> Header:
    if path.suffix != ".bin":
        return read_header(path)
    from milora_init.checkpoint.tensor_file import open_shard  # imports torch, which takes a second

    with open_shard(path) as shard:
        return shard.header


def _indexed_files(path: Path, index: Mapping[str, Any], absent: Collection[str]) -> list[str]:
    """The files that an index names, sorted. Raises CheckpointError for a wrong index, or a file that is missing."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path}: no weight_map from tensor names to files")
    files = sorted(set(weight_map.values()))
    for file in files:
        try:
            plain = "/" not in relative_name(file) and not file.startswith(".")
        except ValueError:
            plain = False
        if not plain:
            raise CheckpointError(
                f"{path}: {file!r} is outside the folder or hidden; a shard must be a plain file name"
            )
        if Path(file).suffix != Path(path.name.removesuffix(".index.json")).suffix:
            raise CheckpointError(f"{path}: {file!r} is another format than the index")
        if file not in absent and not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent}: {file} is missing, and the index names it", hint=REFETCH)
    return files
