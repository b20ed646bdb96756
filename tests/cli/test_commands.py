"""The verbs beside the main job: what they share on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from milora_init.cli import output
from milora_init.cli.main import app, run
from milora_init.manifest import Manifest

Built = Callable[..., Path]
Start = Callable[..., Manifest]

VERBS = sorted(str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands)


def test_there_are_verbs() -> None:
    assert set(VERBS) == {"convert", "merge", "push", "report", "verify"}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", [["--model", "m"], ["--alpha", "4"], ["--dry-run"], ["--json", "--device", "cpu"]])
def test_an_option_of_the_main_job_before_a_verb_is_an_error(
    verb: str, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*option, verb, "out"]) == 2
    said = capsys.readouterr().err
    assert f"stands before `{verb}`" in said
    assert said.endswith(f"hint: milora-init {verb} --help\n")


@pytest.mark.parametrize(
    ("before", "meant"),
    [
        (["--json", "verify", "a b"], "verify 'a b' --json"),
        (["-q", "--json", "push", "out", "me/x"], "push out me/x --json --quiet"),
        (["-r", "4", "convert", "--init", "i"], "convert --init i --rank 4"),
        (["--out", "verify", "merge", "base"], "merge base --out verify"),
        (["--public", "--token", "hf_secret", "push", "out", "me/x"], "push out me/x --token TOKEN --public"),
    ],
    ids=lambda words: words[-2] if isinstance(words, list) else "",
)
def test_an_option_before_a_verb_that_has_it_is_answered_with_the_command_that_was_meant(
    before: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(before) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"hint: milora-init {meant}\n")
    assert "hf_secret" not in said


@pytest.mark.parametrize("verb", VERBS)
def test_a_usage_error_points_at_the_verbs_own_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--no-such-option"]) == 2
    assert f"hint: milora-init {verb} --help" in capsys.readouterr().err


def test_an_unknown_verb_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["unmerge", "out"]) == 2
    assert "'unmerge'" in capsys.readouterr().err


def test_a_report_shows_a_finished_run_again(
    checkpoint: Built, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = start(checkpoint("llama"))
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = str(tmp_path / "moved")
    assert run(["report", moved]) == 0
    said = capsys.readouterr().out
    assert f"{moved}: 10 weights" in said
    assert f'from_pretrained("{moved}"' in said
    assert run(["report", moved, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["fingerprint"], answer["out"]) == (manifest.fingerprint, moved)
    assert run(["report", moved, "--markdown"]) == 0
    assert f"### milora-init: {moved}\n" in capsys.readouterr().out
    assert run(["report", moved, "--markdown", "--json"]) == 2
    assert "contradict" in capsys.readouterr().err
    assert run(["report", str(tmp_path / "out")]) == 1
    assert "it is not a finished output of milora-init" in capsys.readouterr().err


def test_without_a_word_the_help_is_shown_and_it_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Usage: milora-init" in capsys.readouterr().out


def test_a_recipe_may_name_the_model_and_the_output(
    checkpoint: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {checkpoint('llama')}\nout: {tmp_path / 'out'}\nrank: 3\ntarget: [q_proj]\n")
    assert run(["--config", str(recipe), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "out")
    assert run(["--rank", "3"]) == 2
    assert "no --model and no --out given" in capsys.readouterr().err


def test_a_signal_after_the_answer_adds_no_second_one(
    checkpoint: Built, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(checkpoint("llama"))

    def given(content: object, real: Callable[..., None] = output.json_output.give) -> None:
        real(content)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(output.json_output, "give", given)
    assert run(["report", str(tmp_path / "out"), "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["status"] == "done"
