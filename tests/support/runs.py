"""Run milora-init inside the test's process."""

from __future__ import annotations

from pathlib import Path

from milora_init import api
from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from milora_init.run.progress import Progress
from support.training import train


def initialize(options: InitOptions, *, progress: Progress | None = None) -> Manifest:
    """Run the options without printing anything; return the manifest."""
    return api.run(options, progress=progress or False).manifest


def make_outputs(source: Path, folder: Path, pair: str) -> None:
    """Make one output of each kind in a folder: the pair `pair`, and of it `trained`, `merged` and `plain`."""
    initialize(InitOptions(model=str(source), out=str(folder / pair), rank=4, device=("cpu",)))
    train(folder / pair, folder / "trained", steps=1)
    api.merge(folder / pair, folder / "merged", adapter=folder / "trained", progress=False)
    api.convert(folder / pair, folder / "trained", folder / "plain")
