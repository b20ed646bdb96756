"""A run killed by SIGKILL at any point: the same command then writes the bytes of an uninterrupted run.

support/killed_runs.py makes the runs and checks the files that each kill leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import fork_server, killed_runs
from support.interruptions import shards

Built = Callable[..., Path]

JOURNAL_LINE = 3  # kills at each line: before it, after half of it, after it


def killed(source: Path, folder: Path, *kinds: str) -> dict[str, dict[str, int]]:
    done = fork_server.run(killed_runs.main, source, folder, kinds, timeout=1800)
    assert done.returncode == 0, done.stderr
    output: dict[str, dict[str, int]] = json.loads(done.stdout)
    return output


def test_a_run_killed_at_any_journal_line_or_step_or_moment_is_resumed_to_the_same_bytes(
    checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint("llama", "bfloat16")
    output = killed(source, tmp_path / "runs", "journal", "steps:19", "moments:2")
    lines = JOURNAL_LINE * (1 + len(shards(source)))
    assert output["journal"] == {"runs": lines, "killed": lines, "completed": 0}
    assert output["steps"]["killed"] >= 3
    assert output["steps"]["completed"] == 1
    assert output["moments"]["killed"] == 2


@pytest.mark.wide
def test_a_run_killed_at_further_steps_and_moments_is_resumed_to_the_same_bytes(
    checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint("llama", "bfloat16")
    output = killed(source, tmp_path / "runs", "steps:13", "moments:5", "merges:13", "merge-moments:3")
    assert output["steps"]["killed"] >= 5
    assert output["moments"]["killed"] == 5
    assert output["merges"]["killed"] >= 3
    assert output["steps"]["completed"] == output["merges"]["completed"] == 1
    assert output["merge-moments"]["killed"] == 3


@pytest.mark.wide
def test_a_run_killed_while_it_replaces_an_output_leaves_one_of_both(checkpoint: Built, tmp_path: Path) -> None:
    output = killed(checkpoint("llama", "bfloat16"), tmp_path / "runs", "overwrites:23")
    assert output["overwrites"]["killed"] >= 5


def test_a_merge_killed_at_any_step_or_moment_is_resumed_to_the_same_bytes(checkpoint: Built, tmp_path: Path) -> None:
    output = killed(checkpoint("llama", "bfloat16"), tmp_path / "runs", "merges:19", "merge-moments:1")
    assert output["merges"]["killed"] >= 2
    assert output["merges"]["completed"] == 1
    assert output["merge-moments"]["killed"] == 1


@pytest.mark.slow
def test_a_run_killed_at_every_single_step_is_resumed_to_the_same_bytes(checkpoint: Built, tmp_path: Path) -> None:
    """A step is a file operation: open, rename, remove, mkdir, rmdir or truncate."""
    output = killed(checkpoint("llama", "bfloat16"), tmp_path / "runs", "steps:1", "overwrites:2")
    assert output["steps"]["killed"] > 80
    assert output["overwrites"]["killed"] > 50


@pytest.mark.slow
def test_a_run_killed_at_sixty_random_moments_is_resumed_to_the_same_bytes(checkpoint: Built, tmp_path: Path) -> None:
    output = killed(checkpoint("llama", "bfloat16"), tmp_path / "runs", "moments:60")
    assert output["moments"]["killed"] == 60
