"""A run that is killed, by a real SIGKILL, wherever it is: the same command makes the bytes of a straight run.

The runs themselves are in killed_runs.py, which also checks what each kill left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import fork_server, killed_runs
from support.interruptions import shards

Built = Callable[..., Path]

JOURNAL_LINE = 3  # before it, in the middle of it, after it


def killed(source: Path, folder: Path, *kinds: str) -> dict[str, dict[str, int]]:
    done = fork_server.run(killed_runs.main, source, folder, kinds, timeout=1800)
    assert done.returncode == 0, done.stderr
    said: dict[str, dict[str, int]] = json.loads(done.stdout)
    return said


def test_a_run_killed_at_any_journal_line_or_step_or_moment_is_resumed_to_the_same_bytes(
    checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint("llama", "bfloat16")
    said = killed(source, tmp_path / "runs", "journal", "steps:13", "moments:8", "overwrites:23")
    lines = JOURNAL_LINE * (1 + len(shards(source)))
    assert said["journal"] == {"runs": lines, "cut_short": lines, "whole": 0}
    assert said["steps"]["cut_short"] >= 5
    assert said["steps"]["whole"] == 1
    assert said["moments"]["cut_short"] == 8
    assert said["overwrites"]["cut_short"] >= 5


def test_a_merge_killed_at_any_step_or_moment_is_resumed_to_the_same_bytes(checkpoint: Built, tmp_path: Path) -> None:
    said = killed(checkpoint("llama", "bfloat16"), tmp_path / "runs", "merges:7", "merge-moments:8")
    assert said["merges"]["cut_short"] >= 5
    assert said["merges"]["whole"] == 1
    assert said["merge-moments"]["cut_short"] == 8


@pytest.mark.slow
def test_a_run_killed_at_every_single_step_is_resumed_to_the_same_bytes(checkpoint: Built, tmp_path: Path) -> None:
    """A step is a file opened, renamed or removed: between any two of them the folder looks different."""
    said = killed(checkpoint("llama", "bfloat16"), tmp_path / "runs", "steps:1", "overwrites:2")
    assert said["steps"]["cut_short"] > 80
    assert said["overwrites"]["cut_short"] > 50


@pytest.mark.slow
def test_a_run_killed_at_sixty_random_moments_is_resumed_to_the_same_bytes(checkpoint: Built, tmp_path: Path) -> None:
    said = killed(checkpoint("llama", "bfloat16"), tmp_path / "runs", "moments:60")
    assert said["moments"]["cut_short"] == 60
