"""run_train.sh from end to end: trained, evaluated, logged; a failure is a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.training import digests
from support.training_folders import TrainingFolders, lines

pytest.importorskip("lm_eval", reason="needs the extra: pip install '.[train]'")
SCRIPT = Path(__file__).parents[2] / "scripts" / "run_train.sh"


def run_train(*options: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(SCRIPT.parents[1])
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": root, "NPROC": "1", "HF_HUB_OFFLINE": "1"}
    command = ["bash", str(SCRIPT), *map(str, options)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_three_steps_and_an_evaluation(training_folders: TrainingFolders, tmp_path: Path) -> None:
    before = digests(training_folders.pair, training_folders.source)
    options = ("--data", training_folders.data, "--max-steps", 3, "--total-batch", 4, "--learning-rate", "1e-2")
    how = ("--tasks", "gsm8k", "--data", f"gsm8k={training_folders.problems}", "--max-new-tokens", 8)
    done = run_train("milora", training_folders.pair, "run", *options, "--", *how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 4, alpha 4, scale 1, dropout 0, learning rate 0.01" in done.stdout
    assert digests(training_folders.pair, training_folders.source) == before

    result = json.loads((tmp_path / "run" / "results" / "gsm8k" / "milora.json").read_text())
    assert result["adapter"] == "run/adapter"
    assert len(result["samples"]) == 3
    assert set(result["metrics"]) >= {"exact_match,none"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_a_failed_training_is_not_evaluated(training_folders: TrainingFolders, tmp_path: Path) -> None:
    data = lines(tmp_path / "bad.jsonl", [{"question": "w1", "answer": "w2"}])
    done = run_train("milora", training_folders.pair, "run", "--data", data, cwd=tmp_path)
    assert done.returncode == 1
    assert "has no field 'query'; it has question, answer" in done.stderr
    assert "evaluating" not in done.stdout
    assert not (tmp_path / "run" / "results").exists()
    refused = run_train("pissa", training_folders.pair, "other", "--data", training_folders.data, cwd=tmp_path)
    assert refused.returncode == 2
