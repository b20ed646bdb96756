"""Read files of a model folder. None is trusted: links that lead out, pipes and huge JSON files are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milora_init.errors import CheckpointError
from milora_init.untrusted import path_inside, read_text

_CHUNK_BYTES = 1 << 20
_MOST_LEVELS = 100  # of a JSON file: much of what its content is given to is recursive
Stamp = tuple[int, int]


def stamp(path: Path) -> Stamp:
    """Size and modification time of a file, to see whether it changed. Raises CheckpointError."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def file_mode(path: Path) -> int:
    """The read and write permissions of a file; its copy gets no others. Raises CheckpointError."""
    try:
        return path.stat().st_mode & 0o666
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def read_chunks(path: Path) -> Iterator[bytes]:
    """The content of a file of any size, in chunks of 1 MiB. Raises CheckpointError."""
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a small file. Raises CheckpointError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def read_range(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on. Raises CheckpointError, also where the file ends before."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if len(content) != size:
        raise CheckpointError(f"{path} ended early: it changed")
    return content


def source_file(folder: Path, name: str) -> Path:
    """The path of a file of the model that is copied unchanged.

    A file of weights may be a link to another disk: it is parsed as safetensors, so it cannot be a private key. Other
    files are not parsed, and a link could bring any file of this machine into the output.

    Raises:
        CheckpointError: A link that leads out of the folder, or nowhere; a pipe, a socket or a device.
    """
    try:
        path = path_inside(folder, name)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: {error}", hint="put the file itself in its place if it belongs to the model, or remove it"
        ) from error
    if not os.path.isfile(path):  # noqa: PTH113 (False without permission, where Path raises)
        what = "a link to what is not there" if path.is_symlink() else "no plain file"
        raise CheckpointError(f"{path} is {what}", hint="put the file in its place, or remove it")
    return path


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError, also where it is nested deeper than any real one."""
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    level = [content]
    for _ in range(_MOST_LEVELS):
        outer = (value for value in level if isinstance(value, dict | list))
        level = [inner for value in outer for inner in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return content
    raise CheckpointError(f"{path}: nested deeper than {_MOST_LEVELS} levels", hint="fetch the file again")


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds one object. Raises CheckpointError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
