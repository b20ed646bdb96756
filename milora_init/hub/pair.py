"""Find an output of milora-init: a local folder."""

from __future__ import annotations

from pathlib import Path

from milora_init.errors import UsageError


def locate_pair(pair: str, *, cache_dir: str | None = None, token: str | None = None) -> Path:
    """The folder of a pair. Raises UsageError if it is not there."""
    folder = Path(pair).expanduser()
    if not pair or not folder.is_dir():
        raise UsageError(f"{pair}: no such folder", hint="name a folder that milora-init wrote, or its Hub id")
    return folder


def locate_manifest(pair: str, *, cache_dir: str | None = None, token: str | None = None) -> Path:
    """A folder with the manifest of a pair. Raises UsageError if it is not there."""
    return locate_pair(pair, cache_dir=cache_dir, token=token)
