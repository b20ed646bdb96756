"""The verbs beside the main job: what they share on the command line."""

from __future__ import annotations

import pytest

from milora_init.cli import app, run

VERBS = sorted(str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands)


def test_there_are_verbs() -> None:
    assert {"verify", "convert"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", [["--model", "m"], ["-r", "4"], ["--json"], ["--dry-run"], ["--device", "cpu"]])
def test_an_option_of_the_main_job_before_a_verb_is_an_error(
    verb: str, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*option, verb, "out"]) == 2
    said = capsys.readouterr().err
    assert f"stands before `{verb}`" in said
    assert said.endswith(f"hint: milora-init {verb} --help\n")


@pytest.mark.parametrize("verb", VERBS)
def test_a_usage_error_points_at_the_verbs_own_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--no-such-option"]) == 2
    assert f"hint: milora-init {verb} --help" in capsys.readouterr().err


def test_an_unknown_verb_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["unmerge", "out"]) == 2
    assert "'unmerge'" in capsys.readouterr().err
