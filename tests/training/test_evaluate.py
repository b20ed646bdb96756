"""evaluate.py: the pair, the source and the merged model give the same log-likelihoods."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate
import huggingface_hub.constants
import pytest
from support.training_folders import TrainingFolders, lines, sentence

from milora_init.export.merge import merge

pytest.importorskip("lm_eval", reason="needs the extra: pip install '.[train]'")
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def likelihoods(model: Path, tasks: Path, out: Path, *more: str) -> list[float]:
    options = ["--tasks", "choices", "--include", str(tasks), "--out", str(out), "--name", "x", "--device", "cpu"]
    assert evaluate.main([str(model), *options, *more]) == 0
    content = json.loads((out / "choices" / "x.json").read_text())
    return [float(answer[0][0]) for sample in content["samples"] for answer in sample["resps"]]


def test_pair_source_and_merged_have_the_same_log_likelihoods(
    training_folders: TrainingFolders, tmp_path: Path
) -> None:
    rows = [{"question": sentence(n, 4), "choices": [sentence(n + 9, 3), sentence(n + 5, 3)]} for n in range(4)]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "choices.yaml").write_text(CHOICES % lines(tmp_path / "choices.jsonl", rows))
    source = likelihoods(training_folders.source, tasks, tmp_path / "of-source")
    assert len(source) == 8
    pair = likelihoods(training_folders.pair, tasks, tmp_path / "of-pair")
    assert pair == pytest.approx(source, abs=1e-4)
    merge(str(training_folders.pair), str(tmp_path / "merged"))
    assert likelihoods(tmp_path / "merged", tasks, tmp_path / "of-merged") == pytest.approx(pair, abs=1e-4)


@pytest.mark.wide
def test_answers_that_are_longer_than_the_context_are_refused(
    training_folders: TrainingFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tasks", "gsm8k", "--data", f"gsm8k={training_folders.problems}", "--out", str(tmp_path / "results")]
    assert evaluate.main([str(training_folders.source), *words]) == 2
    assert "is too short for the answers: give --max-new-tokens" in capsys.readouterr().err


def test_data_for_a_task_that_is_not_ours_is_refused(
    training_folders: TrainingFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        evaluate.main([str(training_folders.pair), "--tasks", "boolq", "--data", f"boolq={training_folders.data}"]) == 2
    )
    assert "gsm8k or MATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./svd_int"], "./svd_int: no such folder"),
        (["svd_int"], "svd_int is no folder, and not found on the Hub"),
        (["svd_int", "--adapter", "./traned"], "--adapter ./traned: no such folder"),
    ],
)
def test_a_model_that_is_not_there_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "?", "answer": "1"}\n{"query": "?"}\n', "line 2 has no field question and no answer"),
        ("question,answer\n", "line 1 is not JSON"),
    ],
)
def test_data_without_the_fields_of_the_task_is_refused(
    content: str, message: str, training_folders: TrainingFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    words = [str(training_folders.pair), "--tasks", "gsm8k", "--data", f"gsm8k={tmp_path}/data.jsonl"]
    assert evaluate.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gsm8k", "the data of gsm8k cannot be read"),
        pytest.param("gsm9k", "no task gsm9k: `lm_eval ls tasks`", marks=pytest.mark.slow),
    ],
)
def test_a_task_that_cannot_be_had_is_named(
    task: str,
    message: str,
    training_folders: TrainingFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets.config

    for module in (datasets.config, huggingface_hub.constants):  # read when they were imported
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    words = [str(training_folders.source), "--tasks", task, "--out", str(tmp_path / "results")]
    assert evaluate.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
