"""run_train.sh from end to end: trained, evaluated, logged; a failure is a failure."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import train
from support.training import digests
from support.training_folders import TrainingFolders, lines

pytest.importorskip("lm_eval", reason="needs the extra: pip install '.[train]'")
SCRIPT = Path(__file__).parents[2] / "scripts" / "run_train.sh"
RECORD = 'printf "%q " "$@" >> commands; echo >> commands; case "$1" in */train.py) exit "${STATUS:-0}"; esac\n'


def run_train(*options: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, options)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def recorded(*options: object, cwd: Path, **environment: str) -> tuple[int, list[list[str]]]:
    """The status of the script, and the commands that it gives to a Python that only records them."""
    python = cwd / "python"
    python.write_text(f"#!/usr/bin/env bash\n{RECORD}")
    python.chmod(0o755)
    done = run_train(*options, cwd=cwd, PYTHON=str(python), NPROC="1", **environment)
    return done.returncode, [shlex.split(line) for line in (cwd / "commands").read_text().splitlines()]


def options_of(folders: TrainingFolders) -> list[object]:
    options = ("--data", folders.data, "--max-steps", 3, "--total-batch", 4, "--learning-rate", "1e-2")
    how = ("--tasks", "gsm8k", "--data", f"gsm8k={folders.problems}", "--max-new-tokens", 8)
    return ["milora", folders.pair, "run", *options, "--", *how]


def require_three_steps_and_an_evaluation(folder: Path, said: str) -> None:
    assert "rank 4, alpha 4, scale 1, dropout 0, learning rate 0.01" in said
    result = json.loads((folder / "run" / "results" / "gsm8k" / "milora.json").read_text())
    assert result["adapter"] == "run/adapter"
    assert len(result["samples"]) == 3
    assert set(result["metrics"]) >= {"exact_match,none"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_the_commands_of_the_script_train_three_steps_and_evaluate(
    training_folders: TrainingFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = digests(training_folders.pair, training_folders.source)
    status, (training, evaluation) = recorded(*options_of(training_folders), cwd=tmp_path)
    assert status == 0
    assert [Path(command[0]).name for command in (training, evaluation)] == ["train.py", "evaluate.py"]
    monkeypatch.chdir(tmp_path)
    assert train.main(training[1:]) == 0
    assert evaluate.main(evaluation[1:]) == 0
    require_three_steps_and_an_evaluation(tmp_path, capsys.readouterr().out)
    assert digests(training_folders.pair, training_folders.source) == before


@pytest.mark.wide
def test_the_script_trains_three_steps_and_evaluates(training_folders: TrainingFolders, tmp_path: Path) -> None:
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(SCRIPT.parents[1]), "NPROC": "1"}
    done = run_train(*options_of(training_folders), cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    require_three_steps_and_an_evaluation(tmp_path, done.stdout)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["milora", "a", "b", "--", "-h"], 0),
        ([], 2),
        (["milora", "a"], 2),
        (["milora", "a", "--rank"], 2),
    ],
)
def test_the_usage_is_shown_and_nothing_is_run(words: list[str], status: int, tmp_path: Path) -> None:
    done = run_train(*words, cwd=tmp_path, PYTHON="/nowhere/python")
    assert done.returncode == status
    assert "scripts/run_train.sh METHOD BASE SAVE_ROOT" in (done.stderr if status else done.stdout)


def test_a_failed_training_is_not_evaluated(tmp_path: Path) -> None:
    status, commands = recorded("milora", "pair", "run", "--", "--tasks", "gsm8k", cwd=tmp_path, STATUS="3")
    assert status == 3
    assert [Path(command[0]).name for command in commands] == ["train.py"]


def test_data_without_a_field_and_another_method_than_the_pair_s_are_refused(
    training_folders: TrainingFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "bad.jsonl", [{"question": "w1", "answer": "w2"}])
    pair = str(training_folders.pair)
    for given, message in (
        (str(data), "has no field 'query'; it has question, answer"), ("nosuch.jsonl", "nosuch.jsonl: no such file"),
    ):  # fmt: skip
        assert train.main(["milora", pair, str(tmp_path / "run"), "--data", given]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run" / "training.json").exists()  # the corrected command is not refused
    assert train.main(["milora", "svd_int", str(tmp_path / "run")]) == 2
    assert "svd_int: no such folder" in capsys.readouterr().err
    assert train.main(["pissa", pair, str(tmp_path / "other"), "--data", str(training_folders.data)]) == 2
    assert not (tmp_path / "other").exists()
