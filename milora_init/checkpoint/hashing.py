"""Hash files: the SHA-256 of a whole file, or a fast hash of its header and of samples.

A checkpoint may have hundreds of gigabytes, and to hash all of it would take as long as the run itself. So a local
source is identified by samples. Of a file from the Hub the SHA-256 is known without reading it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import CancelledError
from pathlib import Path

from milora_init.checkpoint.header import Header
from milora_init.errors import CheckpointError

WHOLE_FILE_PREFIX = "sha256:"  # before the hash of a whole file; a hash of samples has no prefix


def sha256(path: Path, *, cancelled: threading.Event | None = None) -> str:
    """SHA-256 of a whole file in hexadecimal, as the Hub has it for large files.

    Args:
        path: The file.
        cancelled: Set by another thread to stop.

    Raises:
        CheckpointError: The file cannot be read.
        CancelledError: `cancelled` was set.
    """
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError
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
    """Whether a file has the hash that was recorded, of either kind. Raises CheckpointError."""
    if recorded.startswith(WHOLE_FILE_PREFIX):
        return recorded == WHOLE_FILE_PREFIX + sha256(path)
    return recorded == sampled_hash(path, header)
