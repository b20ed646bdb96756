"""Runs that are killed, taken up again and compared: a process of its own, for test_killed_runs.

    python killed_runs.py SOURCE FOLDER [journal] [steps:STRIDE] [overwrites:STRIDE] [moments:COUNT]

Imports and the plan are paid for once: every run is a fork of this process, which by then has no other thread.
Prints one JSON object: for each kind of killing how many runs there were, how many of them were cut short, and how
many came through.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import contents

from milora_init.decompose import decompose
from milora_init.manifest import MANIFEST, read_manifest
from milora_init.options import InitOptions
from milora_init.output import WORK, OutputFolder
from milora_init.plan import Plan, make_plan

# What Python tells an audit hook when it is about to change a name or open a file.
STEPS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"})


class Killed:
    """Runs of one plan in folders of their own, each called `out` there, cut off and resumed."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        options = InitOptions(model=str(source), out="out", rank=4, device=("cpu",), mode="random")
        self.plan = make_plan(options, source)
        self.earlier = make_plan(replace(options, rank=3), source)
        self.over_it = make_plan(replace(options, overwrite=True), source)
        self.straight = self._straight(self.plan)
        self.runs = self.whole = self.cut_short = 0

    def run(self, prepare: Callable[[], None], *, after_s: float | None = None) -> None:
        """Fork a run that `prepare` is to kill, or kill it after a time; check what it left, resume, compare."""
        self.runs += 1
        os.chdir(self._fresh())
        self._fork(self.plan, prepare, after_s)
        self._require_names_to_be_true()
        decompose(self.plan)
        self._require_the_bytes_of_a_straight_run()

    def overwrite(self, prepare: Callable[[], None]) -> None:
        """The same with an earlier output in the way, which the run is to replace."""
        self.runs += 1
        before = self._straight(self.earlier)
        self._fork(self.over_it, prepare)
        if (Path("out") / MANIFEST).exists():
            assert self._files().items() >= (before if read_rank() == 3 else self.straight).items()
        decompose(self.over_it)
        self._require_the_bytes_of_a_straight_run()

    def time_of_a_straight_run(self) -> float:
        started = time.monotonic()
        self._straight(self.plan)
        return time.monotonic() - started

    def _straight(self, plan: Plan) -> dict[str, bytes]:
        os.chdir(self._fresh())
        decompose(plan)
        return self._files()

    def _fork(self, plan: Plan, prepare: Callable[[], None], after_s: float | None = None) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                prepare()
                decompose(plan)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if after_s is not None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            self.cut_short += 1
        else:
            assert os.WEXITSTATUS(status) == 0, "the run failed by itself"
            self.whole += 1

    def _require_names_to_be_true(self) -> None:
        """Whatever has a final name is whole, and no model can be loaded before its weights are."""
        found = self._files()
        for name, content in found.items():
            if not name.endswith(".partial") and not name.startswith(WORK):
                assert content == self.straight[name], f"{name} has its name and is not whole"
        if "config.json" in found or (Path("out") / MANIFEST).exists():
            missing = {n for n in self.straight if n.endswith((".safetensors", ".index.json"))} - found.keys()
            assert not missing, f"it can be loaded without {missing}"

    def _require_the_bytes_of_a_straight_run(self) -> None:
        found = self._files()
        assert found.keys() == self.straight.keys(), f"differs in {sorted(found.keys() ^ self.straight.keys())}"
        assert found == self.straight
        assert (Path("out") / MANIFEST).is_file()

    def _fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder

    @staticmethod
    def _files() -> dict[str, bytes]:
        """Every file below the output but the manifest, which holds seconds."""
        return {name: content for name, content in contents(Path("out")).items() if name != MANIFEST}


def read_rank() -> int:
    """The rank of the finished output, by its manifest."""
    manifest = read_manifest(Path("out"))
    assert manifest is not None
    return int(manifest.inputs["rank"])


def die() -> None:
    """No line of ours runs after it."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_journal_line(number: int, when: str) -> Callable[[], None]:
    """Die at a line of the journal: before it, when half of it stands, or after it."""

    def prepare() -> None:
        real, seen = OutputFolder.record, [0]

        def record(self: OutputFolder, line: dict[str, Any]) -> None:
            if seen[0] == number and when == "before":
                die()
            if seen[0] == number and when == "half":
                with self.journal.open("ab") as file:
                    file.write(json.dumps(line).encode()[:40])
                die()
            real(self, line)
            if seen[0] == number:
                die()
            seen[0] += 1

        OutputFolder.record = record  # type: ignore[method-assign]

    return prepare


def at_step(number: int) -> Callable[[], None]:
    """Die when a file is about to be opened, renamed or removed for the n-th time, in whichever thread that is."""

    def prepare() -> None:
        left = [number]

        def hook(event: str, _: tuple[Any, ...]) -> None:
            if event in STEPS:
                left[0] -= 1
                if left[0] < 0:
                    die()

        sys.addaudithook(hook)

    return prepare


def main(source: Path, folder: Path, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    killed = Killed(source, folder)
    said = {}
    for word in wanted:
        kind, _, amount = word.partition(":")
        killed.runs = killed.whole = killed.cut_short = 0
        if kind == "journal":
            for number in range(len(killed.plan.jobs) + 1):
                for when in ("before", "half", "after"):
                    killed.run(at_journal_line(number, when))
        elif kind == "steps":
            while not killed.whole:
                killed.run(at_step(killed.runs * int(amount)))
        elif kind == "overwrites":
            while not killed.whole:
                killed.overwrite(at_step(killed.runs * int(amount)))
        elif kind == "moments":
            draw = random.Random(0)
            straight_s = min(killed.time_of_a_straight_run() for _ in range(3))
            while killed.cut_short < int(amount) and killed.runs < 4 * int(amount):
                killed.run(lambda: None, after_s=draw.uniform(0, straight_s))
        said[kind] = {"runs": killed.runs, "cut_short": killed.cut_short, "whole": killed.whole}
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
