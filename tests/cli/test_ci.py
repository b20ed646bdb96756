"""What CI is given: the action's own steps run as a runner runs them, a step's summary, annotations."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import fork_server, shell_commands

from milora_init.cli.main import run
from milora_init.hub.model_card import step_summary, write_step_summary
from milora_init.manifest import Manifest
from milora_init.verification.verify import verify

Built = Callable[..., Path]
ROOT = Path(__file__).parents[2]
STEPS = runpy.run_path(str(ROOT / ".github" / "actions" / "prepare-base" / "steps.py"))
ACTION = yaml.safe_load((ROOT / ".github" / "actions" / "prepare-base" / "action.yml").read_text(encoding="utf-8"))


class StepFailedError(RuntimeError):
    """A step ended with another exit status than 0."""


class Runner:
    """Runs an action's steps that are commands, in order, with its expressions put in; `uses:` are left out."""

    def __init__(self, folder: Path, commands: Path) -> None:
        self.folder = folder
        self.commands = commands
        self.summary = folder / "summary.md"
        self.outputs: dict[str, dict[str, str]] = {}

    def run(self, *left_out: str, **given: str) -> dict[str, str]:
        """Run the steps; return the action's outputs. An input is given with `_` in place of `-`."""
        values = {name.replace("_", "-"): value for name, value in given.items()}
        inputs = {name: str(values.pop(name, spec.get("default", ""))) for name, spec in ACTION["inputs"].items()}
        assert not values
        self.log = ""
        for step in ACTION["runs"]["steps"]:
            if "run" in step and step["name"] not in ("Install", "Push", *left_out):
                self._step(step, inputs)
        return {name: self._value(output["value"], inputs) for name, output in ACTION["outputs"].items()}

    def _step(self, step: dict[str, Any], inputs: dict[str, str]) -> None:
        output = self.folder / "output"
        output.write_text("")
        env = {
            **os.environ,
            "PATH": f"{self.commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RUNNER_TEMP": str(self.folder),
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            **{name: self._value(value, inputs) for name, value in step["env"].items()},
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, check=False)
        self.log += done.stdout + done.stderr
        lines = (line.partition("=")[::2] for line in output.read_text().splitlines())
        self.outputs[step.get("id", "")] = dict(lines)
        if done.returncode:
            raise StepFailedError(f"{step['name']}: {done.stdout}{done.stderr}")

    def _value(self, text: str, inputs: dict[str, str]) -> str:
        def found(match: re.Match[str]) -> str:
            parts = match[1].split(".")
            if parts[0] == "github":
                return str(ROOT / ".github" / "actions" / "prepare-base")
            return inputs[parts[1]] if parts[0] == "inputs" else self.outputs[parts[1]].get(parts[3], "")

        return re.sub(r"\$\{\{ (\S+) \}\}", found, text)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    with shell_commands.served(tmp_path) as commands:
        yield Runner(tmp_path, commands)


def test_the_actions_steps_make_a_verified_output_and_tell_the_next_step(
    runner: Runner, checkpoint: Built, tmp_path: Path
) -> None:
    given = {"model": str(checkpoint("llama")), "out": "with a space", "rank": "3", "dtype": "float32"}
    options = "--target 're:.*(q|v)_proj' --exclude re:.*1.*q_proj"
    told = runner.run(**given, options=options, fail_on="leak=0.5 error=0.5")
    manifest = json.loads((tmp_path / "with a space" / "milora_init.json").read_text())
    assert told["fingerprint"] == manifest["fingerprint"]
    assert (told["out"], told["revision"]) == ("with a space", "")
    result = json.loads(Path(told["result"]).read_text())
    assert result["command"] == "report"
    assert {weight["rank"] for weight in result["weights"]} == {3}
    assert {weight["dtype"] for weight in result["weights"]} == {"float32"}
    assert [weight["module"].rpartition(".")[2] for weight in result["weights"]] == ["q_proj", "v_proj", "v_proj"]
    assert verify(str(tmp_path / "with a space"), model=str(checkpoint("llama"))).ok
    assert "step-0 error" in runner.log, "the table is in the log"
    assert '"schema"' not in runner.log, "no JSON is in the log"
    summary = runner.summary.read_text()
    assert "| v_proj | 16 x 32 | 2 | 3 |" in summary
    again = runner.run("Verify", **given, options=options)
    assert again["fingerprint"] == told["fingerprint"]
    assert "already done" in runner.log


def test_an_output_above_a_limit_fails_the_step_and_keeps_its_report(runner: Runner, checkpoint: Built) -> None:
    with pytest.raises(StepFailedError, match=r"(?s)Initialise: .*above --fail-on error"):
        runner.run(model=str(checkpoint("llama", "bfloat16")), rank="3", fail_on="error=1e-9")
    assert json.loads(Path(runner.outputs["init"]["result"]).read_text())["worst_step_0_error"] > 1e-9


@pytest.mark.parametrize(
    "options", ["--rank '3", "--rank 3 --no-such-option", "--rank 3; touch pwned", "$(touch pwned)"]
)
def test_options_that_are_wrong_or_hostile_fail_the_first_step(
    options: str, runner: Runner, checkpoint: Built, tmp_path: Path
) -> None:
    with pytest.raises(StepFailedError, match=r"(?s)Plan: .*error"):
        runner.run(model=str(checkpoint("llama")), options=options)
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "svd_init").exists()


def test_a_limit_that_is_none_fails_the_first_step(runner: Runner, checkpoint: Built) -> None:
    with pytest.raises(StepFailedError, match=r"(?s)Plan: .*--fail-on leek=1 is not a limit"):
        runner.run(model=str(checkpoint("llama")), fail_on="leek=1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--rank 32", ["--rank", "32"]),
        ("--rank\n32\n\n--target\nq_proj\n", ["--rank", "32", "--target", "q_proj"]),
        ("--target 're:a b' --exclude \"x y\"", ["--target", "re:a b", "--exclude", "x y"]),
        ("", []),
    ],
)
def test_options_are_split_as_a_shell_does(options: str, words: list[str]) -> None:
    command = STEPS["init_command"]({"MODEL": "m", "OUT": "o", "RANK": " 8 ", "MODE": "", "OPTIONS": options})
    assert command == ["milora-init", "init", "--model=m", "--out=o", "--rank=8", *words]


@pytest.mark.parametrize("value", ["a\nfingerprint=b", "a\r\nb=c", "a\u2028b", "a\x1b[0m", "ab\n", None, 3])
def test_an_output_of_a_step_is_one_line(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one line of text"):
        STEPS["_set_outputs"]({"GITHUB_OUTPUT": str(tmp_path / "output")}, {"fingerprint": "f", "revision": value})
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(("public", "flag"), [("true", "--public"), ("false", "--private"), ("True", None)])
def test_a_push_is_public_only_if_the_input_is_true(
    public: str, flag: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "milora-init").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    (tmp_path / "milora-init").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    env = {"OUT": "-o ut", "REPOSITORY": "me/model", "PUBLIC": public}
    if flag is None:
        with pytest.raises(ValueError, match="expected true or false"):
            STEPS["push"](env)
        return
    assert STEPS["push"](env) == 0
    assert (tmp_path / "words").read_text().splitlines() == ["push", flag, "--", "-o ut", "me/model"]


def test_every_step_is_given_its_values_by_the_environment() -> None:
    """An expression inside a script would run whatever somebody puts into an input."""
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", "")


def test_a_summary_of_any_size_is_one_that_github_takes(
    start: Callable[..., Manifest], checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = start(checkpoint("llama"))
    assert "| down_proj |" in step_summary(manifest)
    assert "- too large\n" in step_summary(manifest, ["too large"])
    many = replace(manifest, notices=("ö" * 700_000, "ü" * 700_000))
    path = tmp_path / "summary.md"
    path.write_text("# what another step said\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    for _ in range(2):  # what is in it counts too
        write_step_summary(many)
        assert 1_000_000 < path.stat().st_size < 1 << 20
        path.read_text(encoding="utf-8")


def test_a_verdict_of_no_is_annotated_too(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "lora" / "adapter_config.json").unlink()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert run(["verify", str(out), "--quiet"]) == 1
    annotations = [line for line in capsys.readouterr().err.splitlines() if line.startswith("::")]
    assert len(annotations) == 1
    assert "adapter_config.json: missing. Hint: " in annotations[0]


def test_what_a_message_quotes_cannot_steer_a_runner_or_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert run(["--model", "./x\n::warning::pwned\x1b[31m", "--out", "x"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert not [line for line in said.splitlines() if line.startswith("::")]


def test_an_error_is_annotated_in_github_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert run(["--model", "./50%\nno", "--out", "x"]) == 2
    assert "::error" not in capsys.readouterr().err
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert run(["--model", "./50%\nno", "--out", "x"]) == 2
    annotations = [line for line in capsys.readouterr().err.splitlines() if line.startswith("::")]
    assert len(annotations) == 1
    assert annotations[0].startswith("::error title=milora-init::50%25%0Ano: no such folder")


def test_nothing_is_coloured_without_a_terminal(checkpoint: Built, tmp_path: Path) -> None:
    init = ["--model", str(checkpoint("llama")), "--out", str(tmp_path / "out"), "--rank", "4"]
    done = fork_server.milora(*init)
    assert "1/10" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
