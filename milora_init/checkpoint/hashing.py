"""Hash files: the SHA-256 of a whole file, or a fast hash of its header and of samples.

A checkpoint may have hundreds of gigabytes, and hashing all of it would take as long as the work itself. The Hub, and
its cache on disk, already know the SHA-256 of every large file.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from milora_init.checkpoint.header import Header
from milora_init.errors import CheckpointError

WHOLE_FILE_PREFIX = "sha256:"  # before the digest of a whole file; one of samples has nothing before it


def sha256(path: Path) -> str:
    """Hash of a whole file, as the Hub names large files. Raises CheckpointError."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


def drop_from_page_cache(path: Path) -> None:
    """Let the system drop a synced file from its page cache, where it takes such advice."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sampled_hash(path: Path, header: Header) -> str:
    """Hash of a file's header and of 65 samples of its data. Raises CheckpointError."""
    digest = hashlib.sha256(header.raw)
    try:
        with path.open("rb") as file:
            size_bytes = path.stat().st_size
            for i in range(65):
                file.seek(max(size_bytes * i // 64 - 4096, 0))
                digest.update(file.read(4096))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


def matches_hash(recorded: str, path: Path, header: Header) -> bool:
    """Whether a file on disk has the digest that was recorded, of whichever kind. Raises CheckpointError."""
    if recorded.startswith(WHOLE_FILE_PREFIX):
        return recorded == WHOLE_FILE_PREFIX + sha256(path)
    return recorded == sampled_hash(path, header)
