"""Runs that are killed, resumed and compared: what test_killed_runs calls in a process of its own.

Imports and the plan are paid for once: every run is a fork of that process, which by then has no other thread.
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from milora_init.export.merge import MERGED, merge
from milora_init.manifest import MANIFEST, WORK_FOLDER, read_manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import make_plan
from milora_init.run.initialize import run_plan
from milora_init.run.journal import Entry, Head, Journal
from support.tiny_models import contents

# What Python tells an audit hook when it is about to change a name or open a file.
STEPS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"})


Work = Callable[[], object]


class Killed:
    """Runs of one command in folders of their own, with the output `out` there, cut off and resumed.

    Args:
        folder: Made anew for each run, which has it as its current one.
        work: What the command does.
    """

    def __init__(self, folder: Path, work: Work) -> None:
        self.folder, self.work = folder, work
        self.straight = self.straight_run(work)
        self.runs = self.whole = self.cut_short = 0

    def run(self, prepare: Callable[[], None], *, after_s: float | None = None) -> None:
        """Fork a run that `prepare` is to kill, or kill it after a time; check what it left, resume, compare."""
        self.runs += 1
        os.chdir(self._fresh())
        self._fork(self.work, prepare, after_s)
        self._require_names_to_be_true()
        self.work()
        self._require_the_bytes_of_a_straight_run()

    def overwrite(self, earlier: Work, over_it: Work, prepare: Callable[[], None]) -> None:
        """The same with an earlier output of rank 3 in the way, which the run is to replace."""
        self.runs += 1
        before = self.straight_run(earlier)
        self._fork(over_it, prepare)
        if (Path("out") / MANIFEST).exists():
            assert self._files().items() >= (before if read_rank() == 3 else self.straight).items()
        over_it()
        self._require_the_bytes_of_a_straight_run()

    def at_moments(self, count: int) -> None:
        """Kill runs at random moments until as many as asked for were hit."""
        draw = random.Random(0)
        times = []
        for _ in range(3):
            started = time.monotonic()
            self.straight_run(self.work)
            times.append(time.monotonic() - started)
        while self.cut_short < count and self.runs < 4 * count:
            self.run(lambda: None, after_s=draw.uniform(0, min(times)))

    def straight_run(self, work: Work) -> dict[str, bytes]:
        os.chdir(self._fresh())
        work()
        return self._files()

    def counts(self) -> dict[str, int]:
        """The counts since the last call."""
        counts = {"runs": self.runs, "cut_short": self.cut_short, "whole": self.whole}
        self.runs = self.whole = self.cut_short = 0
        return counts

    def _fork(self, work: Work, prepare: Callable[[], None], after_s: float | None = None) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                prepare()
                work()
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
            if not name.endswith(".partial") and not name.startswith(WORK_FOLDER):
                assert content == self.straight[name], f"{name} has its name and is not whole"
        if "config.json" in found or (Path("out") / MANIFEST).exists():
            missing = {n for n in self.straight if n.endswith((".safetensors", ".index.json"))} - found.keys()
            assert not missing, f"it can be loaded without {missing}"

    def _require_the_bytes_of_a_straight_run(self) -> None:
        found = self._files()
        assert found.keys() == self.straight.keys(), f"differs in {sorted(found.keys() ^ self.straight.keys())}"
        assert found == self.straight
        assert (Path("out") / MANIFEST).is_file() or (Path("out") / MERGED).is_file()

    def _fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder

    @staticmethod
    def _files() -> dict[str, bytes]:
        """Every file below the output but its record, which holds seconds."""
        return {name: content for name, content in contents(Path("out")).items() if name not in (MANIFEST, MERGED)}


def read_rank() -> int:
    """The rank of the finished output, by its manifest."""
    manifest = read_manifest(Path("out"))
    assert manifest is not None
    return int(manifest.inputs["rank"])


def die() -> None:
    """No line of ours runs after it."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_journal_line(number: int, when: str) -> Callable[[], None]:
    """Die at a line of the journal: before it, when half of it is written, or after it."""

    def prepare() -> None:
        real, seen = Journal.append, [0]

        def append(self: Journal, line: Head | Entry) -> None:
            if seen[0] == number and when == "before":
                die()
            if seen[0] == number and when == "half":
                with self.path.open("ab") as file:
                    file.write(json.dumps(line.to_json()).encode()[:40])
                die()
            real(self, line)
            if seen[0] == number:
                die()
            seen[0] += 1

        Journal.append = append  # type: ignore[method-assign]

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


def main(source: Path, folder: Path, wanted: Sequence[str]) -> None:
    """Print one JSON object: for each kind of killing the number of runs, of those cut short, and of those completed.

    Args:
        source: The model.
        folder: To work in, as `Killed` does.
        wanted: Of journal, steps:STRIDE, overwrites:STRIDE, moments:COUNT, merges:STRIDE, merge-moments:COUNT.
    """
    options = InitOptions(model=str(source), out="out", rank=4, device=("cpu",), mode="random")
    plan, earlier, over_it = (
        make_plan(o, source) for o in (options, replace(options, rank=3), replace(options, overwrite=True))
    )
    inits = Killed(folder, lambda: run_plan(plan))
    said = {}
    for word in wanted:
        kind, _, amount = word.partition(":")
        killed = inits
        if kind == "journal":
            for number in range(len(plan.jobs) + 1):
                for when in ("before", "half", "after"):
                    killed.run(at_journal_line(number, when))
        elif kind == "steps":
            while not killed.whole:
                killed.run(at_step(killed.runs * int(amount)))
        elif kind == "overwrites":
            while not killed.whole:
                killed.overwrite(
                    lambda: run_plan(earlier), lambda: run_plan(over_it), at_step(killed.runs * int(amount))
                )
        elif kind == "moments":
            killed.at_moments(int(amount))
        elif kind.startswith("merge"):
            base = folder.with_name("base")
            if not base.exists():
                inits.straight_run(inits.work)
                shutil.copytree(folder / "out", base)
            killed = Killed(folder, partial(merge, str(base), "out"))
            if kind == "merge-moments":
                killed.at_moments(int(amount))
            else:
                while not killed.whole:
                    killed.run(at_step(killed.runs * int(amount)))
        said[kind] = killed.counts()
    print(json.dumps(said))
