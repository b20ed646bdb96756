"""Find a model: a local folder, or the snapshot of a Hub repository in the cache.

Of a model on the Hub, only small files are downloaded here. The headers of the weight files are read over the network
with Range requests, because planning needs no weights. `download` fetches each weight file when the run needs it, or
only some of its tensors where no base is written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

from huggingface_hub import (
    HfApi,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

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
from milora_init.hub.download import download, download_tensors
from milora_init.hub.errors import hub_errors
from milora_init.hub.ranges import read_range
from milora_init.json_fields import sha256_text
from milora_init.options import InitOptions, local_path
from milora_init.untrusted import read_text, relative_name

_FIRST_READ_BYTES = 100_000  # most headers are shorter, so one request is enough
_HUB_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


def hide_bars() -> None:
    """Disable the progress bars of huggingface_hub for the rest of the process."""
    disable_progress_bars()


def locate_model(options: InitOptions) -> tuple[Path, RemoteFiles | None]:
    """Find the model `options.model`.

    Returns:
        The local folder and None; or the snapshot in the cache and the weight files on the Hub.

    Raises:
        UsageError: A revision is given for a local folder, or as a part of a Hub id.
        HubError, CheckpointError: See `open_snapshot`.
    """
    require_no_address(options.model)
    folder = local_path(options.model)
    repo, at, revision = options.model.partition("@")
    if at and is_hub_id(repo) and not folder.exists():
        hint = f"for a model on the Hub, name its revision apart: {repo} --revision {revision}"
        raise UsageError(f"{options.model}: no such folder", hint=hint)
    if folder.exists() or not is_hub_id(options.model):
        if options.revision:
            raise UsageError(
                f"{options.model} is a local folder, which has no --revision {options.revision}",
                hint="remove --revision; for a model on the Hub, name it org/name",
            )
        return folder, None
    return open_snapshot(options.model, revision=options.revision, cache_dir=options.cache_dir, token=options.token)


def fetch_model(options: InitOptions) -> Path:
    """Return the folder of the model with all weight files; those that are missing are downloaded."""
    folder, remote = locate_model(options)
    for name in remote.absent if remote else ():
        fetch_file(options, remote, name, None)
    return folder


def fetch_original(recorded: str, commit: str | None, options: InitOptions) -> Path:
    """Return the folder of the model that an output was made from, with all weight files.

    For the recorded model the default revision is the recorded commit. A recorded folder is not looked for on the Hub.

    Args:
        recorded: The original model as a record names it.
        commit: The commit in the record; None if that model was a folder.
        options: The model that the user names, and how it is read.

    Raises:
        UsageError: The recorded folder is not there.
        HubError, CheckpointError: See `locate_model`.
    """
    if options.model == recorded and options.revision is None:
        if commit is None and not local_path(options.model).is_dir():
            raise UsageError(
                f"{options.model}: no such folder; the original model was there",
                hint="name the folder that it is in now: --model DIR",
            )
        options = dataclasses.replace(options, revision=commit)
    return fetch_model(options)


def fetch_file(options: InitOptions, remote: RemoteFiles | None, name: str, into: Path | None) -> Path:
    """Download one weight file of a model that `locate_model` found on the Hub; see `download`."""
    assert remote is not None
    return download(remote, name, cache_dir=options.cache_dir, token=options.token, into=into)


def fetch_tensors(options: InitOptions, remote: RemoteFiles | None, name: str, part: Header, into: Path) -> Path:
    """Download some tensors of a weight file of a model on the Hub; see `download_tensors`."""
    assert remote is not None
    return download_tensors(remote, name, part, token=options.token, into=into)


def require_model_of_revision(model: str | None, revision: str | None) -> None:
    """Raise UsageError for a revision of the original model without that model."""
    if revision is not None and model is None:
        raise UsageError(
            f"--revision {revision} is of the original model, which is not given",
            hint=f"add --model MODEL; a revision of the pair itself is named with it: ORG/NAME@{revision}",
        )


def require_no_address(given: str) -> None:
    """Raise UsageError for the address of a web page in place of a folder or a Hub id."""
    if "://" in given and not local_path(given).exists():
        repo = "/".join(given.partition("://")[2].split("/")[1:3])
        hint = f"write its Hub id: {repo}" if is_repository(repo) else "write the folder, or the Hub id: org/name"
        raise UsageError(f"{given} is an address, not a folder or a Hub id", hint=hint)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, `org/name` or `name`. A folder of that name goes first."""
    return _HUB_ID.fullmatch(name) is not None


def is_repository(name: str) -> bool:
    """Whether a name has the form `org/name`. A folder of that name goes first."""
    return "/" in name and is_hub_id(name)


def why_not_reached(repo: str, revision: str | None, token: str | None) -> Exception | None:
    """Ask the Hub for a repository; the error if it does not give it, else None."""
    try:
        HfApi(token=token).repo_info(repo, revision=revision or "main")
    except Exception as error:
        return error
    return None


def tell_of_cache(repo: str, snapshot: Path, failure: Exception) -> None:
    """Log that a snapshot was found without the Hub, which may have a newer one."""
    why = "refused it" if isinstance(failure, HfHubHTTPError) else "was not reached"
    _log.warning("the Hub %s: %s is read from the cache, at commit %s", why, repo, snapshot.name[:12])


def connected(remote: RemoteFiles, token: str | None) -> RemoteFiles:
    """The files with a `read` for this machine."""

    def read(name: str, start: int, stop: int) -> bytes:
        with hub_errors(remote.model, remote.commit):
            url = hf_hub_url(remote.model, name, revision=remote.commit)
            return b"".join(read_range(url, start, stop, token=token, description=f"{name} of {remote.model}"))

    return dataclasses.replace(remote, read=read)


def is_cached(options: InitOptions, remote: RemoteFiles, name: str) -> bool:
    """Whether a weight file of a model on the Hub is in this machine's cache."""
    found = try_to_load_from_cache(remote.model, name, cache_dir=options.cache_dir, revision=remote.commit)
    return isinstance(found, str)


def with_token(options: InitOptions) -> InitOptions:
    """The options with the token that this machine would use, for another machine."""
    return dataclasses.replace(options, token=options.token or get_token())


def open_snapshot(
    model: str, *, revision: str | None, cache_dir: str | None, token: str | None
) -> tuple[Path, RemoteFiles]:
    """Download the side files of a model into the cache, and read the headers of the weight files that are not there.

    The first download resolves the revision to a commit, which names the snapshot's folder. All later requests name
    this commit. Weight files that are in the cache are used, so a complete cache needs no network. A pickled weight
    file has no header that can be read alone, so it must be in the cache.

    Args:
        model: Id of the model on the Hub.
        revision: Branch, tag or commit; None for the default branch.
        cache_dir: The cache; None for the default of huggingface_hub.
        token: As in huggingface_hub.

    Returns:
        The folder of the snapshot, and the weight files: the SHA-256 of each, and the header of each absent one.

    Raises:
        HubError: The model or the revision does not exist, access is denied, the model is neither in the cache nor
            reachable, or absent weights are pickled.
        CheckpointError: A header is malformed, or there are shards without an index.
    """
    with hub_errors(model, revision):
        weight_patterns = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]
        folder = Path(
            snapshot_download(
                model, revision=revision, cache_dir=cache_dir, token=token, ignore_patterns=weight_patterns
            )
        )
        commit, api = folder.name, HfApi(token=token)
        files = _weight_files(folder, api, model)
        absent = [name for name in files if not (folder / name).is_file()]
        _require_no_pickles(model, absent)
        is_commit = revision is not None and _COMMIT.fullmatch(revision)  # which is what it is, and needs no network
        if not absent and not is_commit and (failure := why_not_reached(model, revision, token)):
            tell_of_cache(model, folder, failure)
        if absent and (folder / "modules.json").is_file():
            # sentence-transformers keeps the weights of its own modules in numbered folders. They are side files.
            snapshot_download(model, revision=commit, cache_dir=cache_dir, token=token, allow_patterns="[0-9]_*/*")
        infos = api.get_paths_info(model, absent, revision=commit) if absent else []
        # The paths in the answer are not trusted: only the names that were asked for are looked up.
        info_by_name = {info.path: info for info in infos if isinstance(info, RepoFile)}
        hashes: dict[str, str] = {}
        headers: dict[str, Header] = {}
        for name in absent:
            info = info_by_name.get(name)
            if info is None or info.lfs is None:
                # A small file, not stored with LFS; or it does not exist, and then this call raises.
                hf_hub_download(model, name, revision=commit, cache_dir=cache_dir, token=token)
                continue
            if not sha256_text(info.lfs.sha256) or type(info.size) is not int:
                raise HubError(
                    f"the Hub's entry for {name} of {model} has no usable SHA-256 and size: "
                    f"{info.lfs.sha256!r}, {info.size!r}",
                    hint=f"a mirror may omit them; download the model first: hf download {model}",
                )
            hashes[name] = info.lfs.sha256
            headers[name] = _read_remote_header(model, name, commit, token, info.size)
        hashes |= {name: _cached_hash(folder / name) for name in files if name not in hashes}

    return folder, connected(RemoteFiles(model, commit, hashes, headers), token)


def _weight_files(folder: Path, api: HfApi, model: str) -> list[str]:
    """List the weight files that transformers would load: the single file, or the files that the index names.

    The Hub is asked only if the cache does not have the answer: a complete cache needs no network. The list is empty if
    there are no weights or the index is broken; `open_checkpoint` raises the error for both.
    """
    for single, index in ((SAFETENSORS_SINGLE, SAFETENSORS_INDEX), (PICKLE_SINGLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file() and (shards := _shards_of_index(folder / index)):
            if all((folder / name).is_file() for name in shards):
                return shards
            return [single] if api.file_exists(model, single, revision=folder.name) else shards
    for single in (SAFETENSORS_SINGLE, PICKLE_SINGLE):
        if api.file_exists(model, single, revision=folder.name):
            return [single]
    if not any((folder / index).is_file() for index in (SAFETENSORS_INDEX, PICKLE_INDEX)):
        require_no_lone_shard(model, api.list_repo_files(model, revision=folder.name))
    return []


def _shards_of_index(index: Path) -> list[str]:
    """List the files that an index names; empty if the index is broken."""
    try:
        return sorted({relative_name(name) for name in json.loads(read_text(index))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []


def _require_no_pickles(model: str, absent: list[str]) -> None:
    """Raise HubError if a weight file that is not in the cache is a pickle."""
    pickles = [name for name in absent if name.endswith(".bin")]
    if pickles:
        raise HubError(
            f"{model} has only pickled weights ({pickles[0]}), whose tensors cannot be listed without a download",
            hint=f"name a --revision with safetensors, or download all files first: hf download {model}",
        )


def _cached_hash(path: Path) -> str:
    """Return the SHA-256 of a file in the cache.

    The cache names the blob of an LFS file by its SHA-256, so that file need not be read.
    """
    blob = path.resolve().name
    return blob if len(blob) == 64 and path.is_symlink() else sha256(path)


def _read_remote_header(model: str, name: str, commit: str, token: str | None, file_bytes: int) -> Header:
    """Read the header of a safetensors file on the Hub with Range requests.

    Args:
        model, name, commit: The file.
        token: As in huggingface_hub.
        file_bytes: Size of the file.

    Raises:
        HubError: The server does not send the range.
        CheckpointError: The header is malformed.
    """

    def read(end: int) -> bytes:
        url = hf_hub_url(model, name, revision=commit)
        return b"".join(read_range(url, 0, end, token=token, description=f"{name} of {model}"))

    start = read(min(_FIRST_READ_BYTES, file_bytes)) if file_bytes else b""
    # The file begins with the length of the JSON header, 8 bytes.
    header_end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < header_end <= min(file_bytes, 8 + MAX_HEADER_BYTES):
        start = read(header_end)
    return parse_header(start[:header_end], file_bytes, Path(f"{model}/{name}"))
