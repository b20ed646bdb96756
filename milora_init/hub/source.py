"""Find a model: a local folder, or a snapshot of a Hub repository whose headers are read by range."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status, http_stream_backoff

from milora_init.checkpoint.folder import (
    PICKLE_INDEX,
    PICKLE_SINGLE,
    SAFETENSORS_INDEX,
    SAFETENSORS_SINGLE,
    RemoteFiles,
    require_no_lone_shard,
)
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import MAX_HEADER_BYTES, Header, parse_header
from milora_init.checkpoint.side_files import WEIGHT_SUFFIXES
from milora_init.errors import HubError, UsageError
from milora_init.hub.download import download
from milora_init.hub.errors import hub_errors
from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from milora_init.untrusted import read_text, relative_name

_HEADER_BYTES = 100_000  # what is asked for at first; most headers are shorter
_SHA256 = re.compile("[0-9a-f]{64}")


def hide_bars() -> None:
    """Draw none of huggingface_hub's progress bars from now on."""
    disable_progress_bars()


def open_snapshot(
    model: str, *, revision: str | None, cache_dir: str | None, token: str | None
) -> tuple[Path, RemoteFiles]:
    """The snapshot of a model in the local cache, with all side files, and what the Hub knows of its weight files.

    The side files are downloaded first. They fix the commit, which names the snapshot folder; everything else is of
    that commit. Weight files in the cache are used as they are, so a complete cache needs no network. For the others
    only the headers are read. Pickled weights have no header, so they must be in the cache.

    Raises:
        HubError: No such model or revision, no permission, or no connection and nothing in the cache.
        CheckpointError: A header that cannot be trusted.
    """
    with hub_errors(model, revision):
        patterns = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]
        folder = Path(
            snapshot_download(model, revision=revision, cache_dir=cache_dir, token=token, ignore_patterns=patterns)
        )
        commit, api = folder.name, HfApi(token=token)
        files = _weights(folder, api, model)
        absent = [name for name in files if not (folder / name).is_file()]
        # Numbered folders are sentence-transformers' own; their weights are side files of ours.
        pickles = [name for name in absent if name.endswith(".bin")]
        if pickles:
            raise HubError(
                f"{model} has pickled weights only ({pickles[0]}): no header tells what is in them",
                hint=f"name a --revision with safetensors, or fetch them all first: hf download {model}",
            )
        if absent and (folder / "modules.json").is_file():
            snapshot_download(model, revision=commit, cache_dir=cache_dir, token=token, allow_patterns="[0-9]_*/*")
        infos = api.get_paths_info(model, absent, revision=commit) if absent else []
        known = {info.path: info for info in infos if isinstance(info, RepoFile)}  # asked by names of our own
        hashes: dict[str, str] = {}
        headers: dict[str, Header] = {}
        for name in absent:
            info = known.get(name)
            if info is None or info.lfs is None:
                # Small enough to be no large file of the Hub's, or not there at all, which the download says.
                hf_hub_download(model, name, revision=commit, cache_dir=cache_dir, token=token)
            else:
                if not _SHA256.fullmatch(str(info.lfs.sha256)) or type(info.size) is not int:
                    raise HubError(
                        f"the Hub's entry for {name} of {model} has no usable SHA-256 and size: "
                        f"{info.lfs.sha256!r}, {info.size!r}",
                        hint=f"a mirror may have left them out; fetch the model first: hf download {model}",
                    )
                hashes[name] = info.lfs.sha256
                headers[name] = _remote_header(model, name, commit, token, info.size)
        hashes |= {name: _blob_hash(folder / name) for name in files if name not in hashes}
    return folder, RemoteFiles(model, commit, hashes, headers)


def _weights(folder: Path, api: HfApi, model: str) -> list[str]:
    """The weight files that transformers would load: those of the index in the folder, or the single file."""
    for single, index in ((SAFETENSORS_SINGLE, SAFETENSORS_INDEX), (PICKLE_SINGLE, PICKLE_INDEX)):
        # Asked of the Hub only where the cache does not tell: a complete cache serves without a network.
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file() and (shards := _shards(folder / index)):
            if all((folder / name).is_file() for name in shards):
                return shards
            return [single] if api.file_exists(model, single, revision=folder.name) else shards
    for single in (SAFETENSORS_SINGLE, PICKLE_SINGLE):
        if api.file_exists(model, single, revision=folder.name):
            return [single]
    if not any((folder / index).is_file() for index in (SAFETENSORS_INDEX, PICKLE_INDEX)):
        require_no_lone_shard(model, api.list_repo_files(model, revision=folder.name))
    return []  # what is missing, or a broken index, is named where checkpoints are opened


def _shards(index: Path) -> list[str]:
    try:
        return sorted({relative_name(name) for name in json.loads(read_text(index))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []  # a broken index is named where checkpoints are opened


def _blob_hash(path: Path) -> str:
    """SHA-256 of a file in the cache. For a large file it is the name of the blob that the link points to."""
    blob = path.resolve().name
    return blob if len(blob) == 64 and path.is_symlink() else sha256(path)


def _remote_header(model: str, name: str, commit: str, token: str | None, file_bytes: int) -> Header:
    """The header of a safetensors file on the Hub, read by range."""
    url = hf_hub_url(model, name, revision=commit)

    def read(end: int, tries: int = 3) -> bytes:
        end = min(end, file_bytes)
        headers = {**build_hf_headers(token=token), "Range": f"bytes=0-{end - 1}", "Accept-Encoding": "identity"}
        found, broken = bytearray(), None
        with http_stream_backoff("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            _require_range(response, f"{name} of {model}", end)
            try:
                for chunk in response.iter_raw():
                    found += chunk
                    if len(found) >= end:  # a server may send more than was asked for
                        break
            except Exception as error:  # of the HTTP library, whose own retries end where the body begins
                broken = error
        if broken is None:
            return bytes(found[:end])
        if tries == 1:
            raise broken
        return read(end, tries - 1)

    start = read(_HEADER_BYTES) if file_bytes else b""
    end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < end <= min(file_bytes, 8 + MAX_HEADER_BYTES):
        start = read(end)
    return parse_header(start[:end], file_bytes, Path(f"{model}/{name}"))


def _require_range(response: Any, what: str, end: int) -> None:
    place = str(response.headers.get("Content-Range"))
    if response.status_code != 206 or not place.replace(" ", "").lower().startswith("bytes0-"):
        raise HubError(
            f"asked for the first {end} bytes of {what}, the Hub answered with status {response.status_code} "
            f"and the range {place}",
            hint="a mirror or a proxy may ignore Range; fetch the model first with `hf download`",
        )


def locate_model(options: InitOptions) -> tuple[Path, RemoteFiles | None]:
    """The local folder, or the snapshot in the cache with what the Hub knows of the missing files."""
    folder = Path(options.model).expanduser()
    if folder.exists() or not _is_hub_id(options.model):
        if options.revision:
            raise UsageError(f"{options.model} is a folder here, which has no --revision {options.revision}")
        return folder, None
    return open_snapshot(options.model, revision=options.revision, cache_dir=options.cache_dir, token=options.token)


def fetch_model(options: InitOptions) -> Path:
    """The folder of the model with all weight files; missing ones are downloaded."""
    folder, remote = locate_model(options)
    for name in remote.absent if remote else ():
        fetch_file(options, remote, name, None)
    return folder


def fetch_original(manifest: Manifest, options: InitOptions) -> Path:
    """The folder of the original model of an output, at the recorded commit if no other revision is asked for."""
    if options.model == manifest.source["model"] and options.revision is None:
        options = dataclasses.replace(options, revision=manifest.source["revision"])
    return fetch_model(options)


def fetch_file(options: InitOptions, remote: RemoteFiles | None, name: str, into: Path | None) -> Path:
    assert remote is not None
    return download(remote, name, cache_dir=options.cache_dir, token=options.token, into=into)


def _is_hub_id(model: str) -> bool:
    return not model.startswith((".", "/", "~")) and model.count("/") <= 1 and "\\" not in model
