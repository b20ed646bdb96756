"""Names and text that come out of somebody's file: what may be done with them.

A manifest, an index, modules.json, a listing of the Hub and the journal all name files relative to a folder. There is
one rule for all of them, applied when the name is read and again when a file is opened by it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

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

    Raises:
        ValueError: See `relative_name`; or a link on the way leads out of the folder.
    """
    path = folder / relative_name(name)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name!r} leads out of {folder} through a link")
    return path


def plain_names(pattern: object) -> list[str]:
    """The names that a pattern out of a file spells: `q_proj`, `a\\.b|a\\.c`. No pattern of somebody's is ever run.

    Raises:
        ValueError: It is more than plain names: letters, digits, `_`, `-`, dots and escaped characters, joined by `|`.
    """
    if not isinstance(pattern, str) or not _NAMES.fullmatch(pattern):
        raise ValueError(f"{str(pattern)[:80]!r} is no plain name, and patterns out of a file are not run")
    return [re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in pattern.split("|")]


def printable(text: str) -> str:
    """Text on one line, with everything spelled out that would steer a terminal or a CI runner."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
