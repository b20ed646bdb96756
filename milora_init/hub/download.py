"""Download single weight files from the Hub and compare them with the Hub's SHA-256."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import hf_hub_download

from milora_init.checkpoint.folder import RemoteFiles
from milora_init.checkpoint.hashing import sha256
from milora_init.errors import HubError
from milora_init.hub.errors import hub_errors


def download(remote: RemoteFiles, name: str, *, cache_dir: str | None, token: str | None, into: Path | None) -> Path:
    """Fetch one file of weights, into the cache or into a folder. Raises HubError."""
    with hub_errors(remote.model, remote.commit):
        place = {"cache_dir": cache_dir} if into is None else {"local_dir": str(into)}
        path = Path(hf_hub_download(remote.model, name, revision=remote.commit, token=token, **place))
    if sha256(path) != remote.hashes[name]:  # huggingface_hub compares sizes
        path.resolve().unlink()
        raise HubError(f"{name} of {remote.model} arrived damaged: it has another SHA-256", hint="run it again")
    return path


def require_cache_space(remote: RemoteFiles, folder: Path) -> None:
    """Raise HubError unless the disk of the cache has room for what is still to come."""
    needed = sum(header.file_bytes for header in remote.absent.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{remote.model} takes {needed / 1e9:.1f} GB in the cache, its disk has {free / 1e9:.1f} GB free",
            hint="add --low-disk, which keeps a few shards at a time; or name another --cache-dir",
        )
