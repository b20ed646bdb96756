"""Kill runs, resume them and compare the outputs. test_killed_runs.py calls this in a separate process.

Every run is a fork of that process, so that imports and the plan are made once. The process has one thread when it
forks.
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

import pytest

from milora_init.export.merge import merge
from milora_init.manifest import MANIFEST, WORK_FOLDER, read_manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import make_plan
from milora_init.records import MERGED
from milora_init.run.initialize import run_plan
from milora_init.run.journal import Entry, Head, Journal
from support.remembered import remember
from support.tiny_models import contents

# Audit events that Python raises before it opens a file or changes a name in the file system.
STEPS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"})


Work = Callable[[], object]


class KilledRuns:
    """Kills runs of one command, resumes them, and compares each output with that of an uninterrupted run.

    Args:
        folder: The current folder of the runs, emptied before each one. The output is `out` in it.
        work: The command.
    """

    def __init__(self, folder: Path, work: Work) -> None:
        self.folder, self.work = folder, work
        self.uninterrupted = self.uninterrupted_run(work)
        self.runs = self.completed = self.killed = 0

    def run(self, arm_kill: Callable[[], None], *, after_s: float | None = None) -> None:
        """Fork a run that is killed; check the files it left; resume it, and compare.

        Args:
            arm_kill: Called in the fork before the command; it makes the process kill itself later.
            after_s: Kill it from outside after this time.
        """
        self.runs += 1
        os.chdir(self._fresh())
        self._fork(self.work, arm_kill, after_s)
        self._require_named_files_to_be_complete()
        self.work()
        self._require_the_bytes_of_an_uninterrupted_run()

    def overwrite(self, earlier: Work, overwriting: Work, arm_kill: Callable[[], None]) -> None:
        """Kill a run that overwrites an earlier output of rank 3.

        A finished output in the folder must then be the whole earlier one or the whole new one.
        """
        self.runs += 1
        before = self.uninterrupted_run(earlier)
        self._fork(overwriting, arm_kill)
        if (Path("out") / MANIFEST).exists():
            expected = before if read_rank() == 3 else self.uninterrupted
            assert self._files().items() >= expected.items()
        overwriting()
        self._require_the_bytes_of_an_uninterrupted_run()

    def kill_at_random_moments(self, count: int) -> None:
        """Kill runs at random moments until `count` of them were killed before their end."""
        draw = random.Random(0)
        times = []
        for _ in range(3):
            started = time.monotonic()
            self.uninterrupted_run(self.work)
            times.append(time.monotonic() - started)
        while self.killed < count and self.runs < 4 * count:
            self.run(lambda: None, after_s=draw.uniform(0, min(times)))

    def uninterrupted_run(self, work: Work) -> dict[str, bytes]:
        """The files of a run that is not killed."""
        os.chdir(self._fresh())
        work()
        return self._files()

    def take_counts(self) -> dict[str, int]:
        """The counts since the last call; they start again from 0."""
        counts = {"runs": self.runs, "killed": self.killed, "completed": self.completed}
        self.runs = self.completed = self.killed = 0
        return counts

    def _fork(self, work: Work, arm_kill: Callable[[], None], after_s: float | None = None) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                arm_kill()
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
            self.killed += 1
        else:
            assert os.WEXITSTATUS(status) == 0, "the run failed without being killed"
            self.completed += 1

    def _require_named_files_to_be_complete(self) -> None:
        """Every file with a final name is complete, and a model that can be loaded has all of its weights."""
        found = self._files()
        for name, content in found.items():
            if not name.endswith(".partial") and not name.startswith(WORK_FOLDER):
                assert content == self.uninterrupted[name], f"{name} has its final name and is incomplete"
        if "config.json" in found or (Path("out") / MANIFEST).exists():
            missing = {n for n in self.uninterrupted if n.endswith((".safetensors", ".index.json"))} - found.keys()
            assert not missing, f"the model can be loaded without {missing}"

    def _require_the_bytes_of_an_uninterrupted_run(self) -> None:
        found = self._files()
        assert found.keys() == self.uninterrupted.keys(), (
            f"differs in {sorted(found.keys() ^ self.uninterrupted.keys())}"
        )
        assert found == self.uninterrupted
        assert (Path("out") / MANIFEST).is_file() or (Path("out") / MERGED).is_file()

    def _fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder

    @staticmethod
    def _files() -> dict[str, bytes]:
        """Every file of the output except the manifest or merge record, which holds times."""
        return {name: content for name, content in contents(Path("out")).items() if name not in (MANIFEST, MERGED)}


def read_rank() -> int:
    """The rank in the manifest of the finished output."""
    manifest = read_manifest(Path("out"))
    assert manifest is not None
    return int(manifest.inputs["rank"])


def kill_this_process() -> None:
    """Send SIGKILL to this process: no Python code runs after it."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_journal_line(number: int, when: str) -> Callable[[], None]:
    """Kill the run at line `number` of the journal: before it, after half of it, or after it."""

    seen = 0

    def arm() -> None:
        real = Journal.append

        def append(self: Journal, line: Head | Entry) -> None:
            nonlocal seen
            if seen == number and when == "before":
                kill_this_process()
            if seen == number and when == "half":
                with self.path.open("ab") as file:
                    file.write(json.dumps(line.to_json()).encode()[:40])
                kill_this_process()
            real(self, line)
            if seen == number:
                kill_this_process()
            seen += 1

        Journal.append = append  # type: ignore[method-assign]

    return arm


def kill_at_step(number: int) -> Callable[[], None]:
    """Kill the run before file operation `number` (from 0) of any thread; STEPS lists the operations."""

    left = number

    def arm() -> None:
        def hook(event: str, _: tuple[Any, ...]) -> None:
            nonlocal left
            if event in STEPS:
                left -= 1
                if left < 0:
                    kill_this_process()

        sys.addaudithook(hook)

    return arm


def main(source: Path, folder: Path, wanted: Sequence[str]) -> None:
    """Print one JSON object: for each kind of kill the number of runs, of killed runs and of completed runs.

    Args:
        source: The folder of the model.
        folder: The folder of `KilledRuns`.
        wanted: Some of journal, steps:STRIDE, overwrites:STRIDE, moments:COUNT, merges:STRIDE, merge-moments:COUNT.
    """
    remember(pytest.MonkeyPatch())
    options = InitOptions(model=str(source), out="out", rank=4, device=("cpu",), mode="random")
    plan, earlier, overwriting = (
        make_plan(o, source) for o in (options, replace(options, rank=3), replace(options, overwrite=True))
    )
    inits = KilledRuns(folder, lambda: run_plan(plan))

    def merges() -> KilledRuns:
        base = folder.with_name("base")
        if not base.exists():
            inits.uninterrupted_run(inits.work)
            shutil.copytree(folder / "out", base)
        return KilledRuns(folder, partial(merge, str(base), "out"))

    counts = {}
    for word in wanted:
        kind, _, amount = word.partition(":")
        runs = merges() if kind.startswith("merge") else inits
        if kind == "journal":
            for number in range(len(plan.jobs) + 1):
                for when in ("before", "half", "after"):
                    runs.run(kill_at_journal_line(number, when))
        elif kind.endswith("moments"):
            runs.kill_at_random_moments(int(amount))
        else:
            # Each run is killed some steps later than the one before it, until one ends before its step.
            while not runs.completed:
                kill = kill_at_step(runs.runs * int(amount))
                if kind == "overwrites":
                    runs.overwrite(lambda: run_plan(earlier), lambda: run_plan(overwriting), kill)
                else:
                    runs.run(kill)
        counts[kind] = runs.take_counts()
    print(json.dumps(counts))
