"""Check file names and text that come from downloaded files, before the program uses them.

Manifests, indexes, modules.json, the Hub's file lists and the journal contain file names relative to a folder. A wrong
name could lead out of that folder. Therefore the same check is applied to all of them, when a name is read and again
when a file is opened by that name.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path, PurePosixPath

MOST_JSON_BYTES = 100_000_000
_CI_COMMAND = re.compile(r"^(\s*)::")
_PLAIN_NAMES = re.compile(r"(?:[\w.-]|\\[^\w|\\]|\\_)+(?:\|(?:[\w.-]|\\[^\w|\\]|\\_)+)*")


def relative_name(name: object) -> str:
    """Check a file name that was read from a file, and return it: it must name a file inside a folder.

    Raises:
        ValueError: The name is not a string, is empty or absolute, is not normalised (`a//b`, `./a`, `a/`), or contains
            `..`, a backslash or a NUL character.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is not a file name")
    normal = PurePosixPath(name)
    if normal.is_absolute() or ".." in normal.parts or "\\" in name or "\0" in name or str(normal) != name:
        raise ValueError(f"{name!r} is not a plain name of a file inside the folder")
    if name == ".":
        raise ValueError(f"{name!r} is the folder itself")
    return name


def path_inside(folder: Path, name: object) -> Path:
    """The path of a file inside a folder, from a name that was read from a file.

    A link that leads out of the folder is refused. The one exception is the Hub's cache, where `snapshots/COMMIT/x` is
    a link into `blobs` of the same repository.

    Raises:
        ValueError: The name is not allowed, see `relative_name`; or the file, or a folder on its path, is a link that
            leads out of the folder.
    """
    path = folder / relative_name(name)
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    is_blob = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (target.is_relative_to(root) or is_blob):
        raise ValueError(f"{name!r} leads out of {folder} through a link")
    return path


def plain_file(path: Path) -> Path:
    """Check that a path leads to a regular file, and return it.

    A link in a download may lead to a device or a pipe. Reading from it could go on forever.

    Raises:
        OSError: The file does not exist, or is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def read_text(path: Path, *, most_bytes: int = MOST_JSON_BYTES) -> str:
    """The text of a small file, such as a JSON file.

    Raises:
        OSError: The file does not exist, is not a regular file, or is larger than `most_bytes`.
        ValueError: The content is not UTF-8.
    """
    size_bytes = plain_file(path).stat().st_size
    if size_bytes > most_bytes:
        raise OSError(errno.EFBIG, f"{size_bytes} bytes, more than the limit of {most_bytes}", str(path))
    return path.read_text(encoding="utf-8")


def plain_names(pattern: object) -> list[str]:
    """The names in a pattern that was read from a file, such as `q_proj` or `a\\.b|a\\.c`.

    The pattern is only parsed. It is never used as a regular expression, because that could take hours.

    Raises:
        ValueError: The pattern is more than names joined by `|`. A name consists of letters, digits, `_`, `-`, dots and
            escaped characters.
    """
    if not isinstance(pattern, str) or not _PLAIN_NAMES.fullmatch(pattern):
        raise ValueError(f"{str(pattern)[:80]!r} is not a plain name, and patterns from a file are not run")
    return [re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in pattern.split("|")]


def printable(text: str) -> str:
    """Text on one line, without characters that could control a terminal or a CI runner.

    Characters that are not printable are replaced by their escape sequences: control characters, line separators and
    changes of the text direction. A CI runner executes a line that begins with `::`, or that contains `##[` or
    `##vso[`, as a command. Therefore these are escaped too.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _CI_COMMAND.sub(r"\1\\x3a:", text).replace("##", "#\\x23")
