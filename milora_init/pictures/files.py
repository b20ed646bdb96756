"""Write a page or a picture to a file that the user names, and replace nothing but an earlier one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from milora_init.errors import OutputError, UsageError, remedy
from milora_init.options import local_path
from milora_init.pictures.style import GENERATOR
from milora_init.untrusted import plain_file

_HEAD_BYTES = 2048  # our mark is in the first bytes of a page and of a PNG
_SUFFIXES = {"--html": (".html", ".htm"), "--plot": (".png",)}


def prepared(path: str | os.PathLike[str] | None, option: str) -> Callable[[bytes], None] | None:
    """A function that writes content to a file; None if none is asked for. All that can be refused is refused now.

    Args:
        path: The file.
        option: `--html` or `--plot`, which asks for it.

    Raises:
        UsageError: The file's name has another ending; for `--plot`, matplotlib is not installed.
        OutputError: The folder is not there or cannot be written, or the file is there and milora-init did not write
            it.
    """
    if path is None:
        return None
    target = local_path(os.fspath(path))
    if target.suffix.lower() not in _SUFFIXES[option]:
        ending = _SUFFIXES[option][0]
        raise UsageError(f"{option} {path} does not end in {ending}", hint=f"name it {Path(path).stem}{ending}")
    if option == "--plot":
        from milora_init.pictures.plots import require_matplotlib

        require_matplotlib()
    if not target.parent.is_dir():
        raise OutputError(f"{option} {path}: the folder {target.parent} is not there", hint="make it, or name another")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        what = f"{option} {path} cannot be written: no permission in {target.parent}"
        raise OutputError(what, hint="name another file")
    _require_ours(target, option)

    def write(content: bytes) -> None:
        _require_ours(target, option)
        try:
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
                part = Path(file.name)
                file.write(content)
            umask = os.umask(0)
            os.umask(umask)
            part.chmod(0o666 & ~umask)
            part.replace(target)
        except OSError as error:
            with suppress(OSError, UnboundLocalError):
                part.unlink()
            hint = remedy(error, "name another file")
            raise OutputError(f"{option} {path} cannot be written: {error.strerror}", hint=hint) from error

    return write


def _require_ours(target: Path, option: str) -> None:
    """Raise OutputError if the file is there and is not an earlier page or picture of milora-init."""
    if not os.path.lexists(target):
        return
    try:
        with plain_file(target).open("rb") as file:
            ours = GENERATOR.encode() in file.read(_HEAD_BYTES)
    except OSError as error:
        raise OutputError(f"{option} {target}: {error.strerror}", hint="name another file") from error
    if not ours:
        raise OutputError(
            f"{option} {target} exists, and milora-init did not write it", hint="name another file, or remove it"
        )
