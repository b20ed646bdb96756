"""Rules for names and text that come from downloaded files.

A manifest, an index, modules.json, a file list of the Hub and the journal all name files relative to a folder. One
rule holds for all of them. It is applied when a name is read, and again when a file is opened by that name.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path, PurePosixPath

MOST_JSON_BYTES = 100_000_000
_COMMAND = re.compile(r"^(\s*)::")
_NAMES = re.compile(r"(?:[\w.-]|\\[^\w|\\]|\\_)+(?:\|(?:[\w.-]|\\[^\w|\\]|\\_)+)*")


def relative_name(name: object) -> str:
    """A file's name below a folder, as it came out of a file, once it is known to stay there.

    Raises:
        ValueError: Not text, empty, absolute, not normalised (`a//b`, `./a`, `a/`), or with `..`, a backslash or NUL.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is no name of a file")
    normal = PurePosixPath(name)
    if normal.is_absolute() or ".." in normal.parts or "\\" in name or "\0" in name or str(normal) != name:
        raise ValueError(f"{name!r} is no plain name of a file below the folder")
    if name == ".":
        raise ValueError(f"{name!r} is the folder itself")
    return name


def path_inside(folder: Path, name: object) -> Path:
    """The path of a file below a folder, by a name that came out of a file; links that lead out are refused.

    The one exception is the Hub's cache, where `snapshots/COMMIT/x` is a link into `blobs` of the same repository.

    Raises:
        ValueError: See `relative_name`; or a link on the way leads out of the folder.
    """
    path = folder / relative_name(name)
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    is_blob = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not (target.is_relative_to(home) or is_blob):
        raise ValueError(f"{name!r} leads out of {folder} through a link")
    return path


def plain_file(path: Path) -> Path:
    """The path of a file that has an end; a link in a download may lead to a device, or to a pipe.

    Raises:
        OSError: There is none, or it is no plain file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return path


def read_text(path: Path, *, most_bytes: int = MOST_JSON_BYTES) -> str:
    """The text of a small file, such as a JSON file.

    Raises:
        OSError: There is none, it is no plain file, or it is larger than `most_bytes`.
        ValueError: It is not UTF-8.
    """
    size_bytes = plain_file(path).stat().st_size
    if size_bytes > most_bytes:
        raise OSError(errno.EFBIG, f"{size_bytes} bytes, which no file of its kind has", str(path))
    return path.read_text(encoding="utf-8")


def plain_names(pattern: object) -> list[str]:
    """The names that a pattern out of a file spells: `q_proj`, `a\\.b|a\\.c`. No pattern of somebody's is ever run.

    Raises:
        ValueError: It is more than plain names: letters, digits, `_`, `-`, dots and escaped characters, joined by `|`.
    """
    if not isinstance(pattern, str) or not _NAMES.fullmatch(pattern):
        raise ValueError(f"{str(pattern)[:80]!r} is no plain name, and patterns out of a file are not run")
    return [re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in pattern.split("|")]


def printable(text: str) -> str:
    """Text on one line, with everything spelled out that would steer a terminal or a CI runner.

    That is every character that prints nothing: control characters, separators of lines, changes of direction. A
    runner takes a line that begins with `::`, and any line with `##[` or `##vso[` in it, for a command.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _COMMAND.sub(r"\1\\x3a:", text).replace("##", "#\\x23")
