"""Download single weight files from the Hub and compare them with the Hub's SHA-256; or some tensors of them.

huggingface_hub compares only the size of a download. A damaged weight would give a wrong base without any error. Of
single tensors the Hub has no hash: they are taken from the commit that was planned with, range by range.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import hf_hub_download, hf_hub_url

from milora_init.checkpoint.folder import RemoteFiles
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import Header
from milora_init.errors import HubError
from milora_init.hub.errors import hub_errors
from milora_init.hub.ranges import read_range


def download(remote: RemoteFiles, name: str, *, cache_dir: str | None, token: str | None, into: Path | None) -> Path:
    """Download one weight file, or take it from the cache.

    Args:
        remote: The model on the Hub.
        name: Name of the file.
        cache_dir: The cache; None for the default of huggingface_hub.
        token: As in huggingface_hub.
        into: A folder to download into instead of the cache; None for the cache.

    Returns:
        The path of the file on the disk.

    Raises:
        HubError: The download failed, or the file has another SHA-256 than on the Hub. Such a file is removed.
    """
    with hub_errors(remote.model, remote.commit):
        location = {"cache_dir": cache_dir} if into is None else {"local_dir": str(into)}
        path = Path(hf_hub_download(remote.model, name, revision=remote.commit, token=token, **location))
    found, expected = sha256(path), remote.hashes[name]
    if found != expected:
        path.resolve().unlink()  # in the cache the path is a link to the file
        raise HubError(
            f"{name} of {remote.model} was damaged during the download: its SHA-256 is {found}, on the Hub {expected}",
            hint="the damaged file was removed; run the same command again",
        )
    return path


def download_tensors(remote: RemoteFiles, name: str, part: Header, *, token: str | None, into: Path) -> Path:
    """Download some tensors of a weight file into a safetensors file of the same name that has only these.

    Args:
        remote: The model on the Hub.
        name: Name of the file.
        part: Header of the new file; the file on the Hub has the same tensors among others.
        token: As in huggingface_hub.
        into: The folder to write to.

    Returns:
        The path of the new file.

    Raises:
        RangesIgnoredError: The server sends whole files only.
        HubError: The download failed, or the server sends other ranges than it is asked for.
        OutputError: The file cannot be written.
    """
    from milora_init.checkpoint.writer import SafetensorsWriter  # imports torch, which takes a second

    source, url = remote.absent[name], hf_hub_url(remote.model, name, revision=remote.commit)
    into.mkdir(parents=True, exist_ok=True)
    with hub_errors(remote.model, remote.commit), SafetensorsWriter(into / name, part, mode=0o600) as writer:
        for tensor in part.tensors:
            start = len(source.raw) + source.tensors[tensor].start
            stop = start + source.tensors[tensor].size_bytes
            description = f"{tensor} in {name} of {remote.model}"
            writer.write_chunks(tensor, read_range(url, start, stop, token=token, description=description))
        writer.finish()
    return into / name


def require_cache_space(remote: RemoteFiles, folder: Path) -> None:
    """Check that the disk of the cache has space for the files that are not downloaded yet.

    Args:
        remote: The model on the Hub.
        folder: A folder on the disk of the cache.

    Raises:
        HubError: There is not enough space.
    """
    needed_bytes = sum(header.file_bytes for header in remote.absent.values())
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise HubError(
            f"downloading {remote.model} into the cache needs {needed_bytes / 1e9:.1f} GB, but the disk has "
            f"{free_bytes / 1e9:.1f} GB free",
            hint="add --low-disk, which keeps only a few shards at a time; or name another --cache-dir",
        )
