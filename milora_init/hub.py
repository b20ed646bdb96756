"""The Hub, downwards: one of the two files that touch the network; `publish` is the other.

Everything goes through huggingface_hub: its cache, its resuming downloads, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT. A
model is planned from its side files and the headers of its shards, which are read over the network by range; the
shards themselves come one at a time, when the run gets to them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub import errors as hub
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status, http_stream_backoff

from milora_init.checkpoint import (
    PICKLE_INDEX,
    PICKLE_SINGLE,
    SAFETENSORS_INDEX,
    SAFETENSORS_SINGLE,
    WEIGHT_SUFFIXES,
    Remote,
    require_no_lone_shard,
)
from milora_init.digest import sha256
from milora_init.errors import HubError, explain, remedy
from milora_init.safetensors_format import MAX_HEADER_BYTES, Header, parse_header
from milora_init.untrusted import relative_name

_HEADER_BYTES = 100_000  # what is asked for at first; most headers are shorter
_SHA256 = re.compile("[0-9a-f]{64}")


def hide_bars() -> None:
    """Draw none of huggingface_hub's progress bars from now on."""
    disable_progress_bars()


def open_snapshot(model: str, *, revision: str | None, cache_dir: str | None, token: str | None) -> tuple[Path, Remote]:
    """A model's snapshot in the local cache, with all of its side files, and what the Hub knows of its weights.

    The side files come first and fix the commit, which the folder is named after; all else is asked of that commit.
    Weights that are in the cache are taken as they are, so a complete cache serves without a network. Of the others
    the headers are read. Pickled weights have none, and must be in the cache.

    Raises:
        HubError: No such model or revision, no permission, no way to the Hub and nothing in the cache.
        CheckpointError: A header that cannot be trusted.
    """
    with explained(model, revision):
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
    return folder, Remote(model, commit, hashes, headers)


def download(remote: Remote, name: str, *, cache_dir: str | None, token: str | None, into: Path | None) -> Path:
    """Fetch one file of weights, into the cache or into a folder. Raises HubError."""
    with explained(remote.model, remote.commit):
        place = {"cache_dir": cache_dir} if into is None else {"local_dir": str(into)}
        path = Path(hf_hub_download(remote.model, name, revision=remote.commit, token=token, **place))
    if sha256(path) != remote.hashes[name]:  # huggingface_hub compares sizes
        path.resolve().unlink()
        raise HubError(f"{name} of {remote.model} arrived damaged: it has another SHA-256", hint="run it again")
    return path


def require_room(remote: Remote, folder: Path) -> None:
    """Raise HubError unless the disk of the cache has room for what is still to come."""
    needed = sum(header.file_bytes for header in remote.absent.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{remote.model} takes {needed / 1e9:.1f} GB in the cache, its disk has {free / 1e9:.1f} GB free",
            hint="add --low-disk, which keeps a few shards at a time; or name another --cache-dir",
        )


@contextmanager
def explained(model: str, revision: str | None, *, pushing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises over a model, or a repository to push to, into a HubError with a repair."""
    try:
        yield
    except hub.GatedRepoError as error:
        hint = f"accept its terms at https://huggingface.co/{model}, then `hf auth login`"
        raise HubError(f"{model} is gated", hint=hint) from error
    except hub.RevisionNotFoundError as error:
        raise HubError(f"{model} has no revision {revision!r}", hint="name a branch, a tag or a commit") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        kind = "no repository" if pushing else "neither a folder here nor a model"
        raise HubError(
            f"{model!r} is {kind} on the Hub that this token may see",
            hint="check the name; for a private model `hf auth login`, or set HF_TOKEN",
        ) from error
    except hub.LocalEntryNotFoundError as error:
        if (status := _status(error)) is not None:
            raise _refused(model, status, error) from error
        if pushing:
            raise _refused(model, None, error) from error
        what = repr(model) if revision is None else f"{model!r} at revision {revision!r}"
        raise HubError(
            f"{what} is neither a folder here nor in the local cache, and the Hub cannot be reached",
            hint=f"name an existing folder, or, with a network, fetch it first: hf download {model}",
        ) from error
    except hub.EntryNotFoundError as error:
        raise HubError(
            f"{model} lacks a file that it should have: {' '.join(str(error).split())[:200]}",
            hint="run the same command again" if pushing else "it may be incomplete; name another --revision",
        ) from error
    except hub.HfHubHTTPError as error:
        raise _refused(model, _status(error), error) from error
    except HubError:
        raise
    except hub.OfflineModeIsEnabled as error:
        if pushing:
            raise HubError(f"{model} cannot be written to: HF_HUB_OFFLINE is set", hint="unset it") from error
        raise HubError(
            f"{model!r} is not whole in the local cache, and HF_HUB_OFFLINE is set",
            hint=f"unset it, or, with a network, fetch the model first: hf download {model}",
        ) from error
    except OSError as error:
        hint = "run the same command again" if pushing else "name another --cache-dir; what was fetched is kept"
        raise HubError(f"{model}: {error}", hint=remedy(error, hint)) from error
    except (KeyError, TypeError, AttributeError) as error:  # huggingface_hub takes answers apart without a check
        raise HubError(
            f"the Hub's answer over {model} is not what it should be: {type(error).__name__}: {error}",
            hint="a mirror may have left something out; look at HF_ENDPOINT",
        ) from error
    except Exception as error:  # huggingface_hub lets its HTTP library's errors through, and changes that library
        if type(error).__module__.startswith("milora_init") or explain(error):
            raise
        raise _refused(model, None, error) from error


def _refused(model: str, status: int | None, error: Exception) -> HubError:
    if status == 429:
        return HubError(f"the Hub limits our rate over {model}", hint="wait a few minutes; `hf auth login` allows more")
    if status in (401, 403):
        return HubError(
            f"the Hub does not let this token at {model} (status {status})",
            hint="`hf auth login` with a token that may, or set HF_TOKEN",
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return HubError(
        f"the Hub failed over {model}: {reason}",
        hint="look at the network, then run the same command again: what was done is kept",
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, through what it was raised from."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def _weights(folder: Path, api: HfApi, model: str) -> list[str]:
    """The files of weights that transformers would load: of the index in the folder, else the single one there is."""
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
    require_no_lone_shard(model, api.list_repo_files(model, revision=folder.name))
    return []  # what is missing is named where checkpoints are opened


def _shards(index: Path) -> list[str]:
    try:
        return sorted(
            {relative_name(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        return []  # a broken index is named where checkpoints are opened


def _blob_hash(path: Path) -> str:
    """SHA-256 of a file in the cache: the name of the blob that it links to, for a large file; else worked out."""
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
