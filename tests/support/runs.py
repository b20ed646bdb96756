"""Run milora-init inside the test's process."""

from __future__ import annotations

from milora_init import api
from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from milora_init.run.progress import Progress


def initialize(options: InitOptions, *, progress: Progress | None = None) -> Manifest:
    """Run the options without printing anything; return the manifest."""
    return api.run(options, progress=progress or False).manifest
