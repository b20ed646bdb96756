"""terminal: what a person sees while a run goes on, with a terminal and without one."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from support.interruptions import shards

from milora_init.cli import progress_bar
from milora_init.cli.output import _by_layer, _Console, _print_table, print_error, print_json
from milora_init.cli.progress_bar import Bar, by_weights, waiting
from milora_init.manifest import Manifest

Built = Callable[..., Path]
Start = Callable[..., Manifest]


def test_without_a_terminal_each_shard_is_a_line_with_the_time_left(
    start: Start, checkpoint: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint("llama")
    with Bar(quiet=False, verbose=False) as bar:
        start(source, progress=bar)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    count = len(shards(source))
    assert [line.split("]")[0] for line in lines] == [f"[{n}/{count}" for n in range(1, count + 1)]
    assert all(re.search(r", (about [\d.]+ s|less than 1 s) left$", line) for line in lines[:-1])
    assert "left" not in lines[-1]


def pretend_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_colour_that_is_forced_into_a_file_brings_no_bar(
    start: Start, checkpoint: Built, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Bar(quiet=False, verbose=False) as bar:
        bar.planning("m")
        start(checkpoint("llama"), progress=bar)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert "\x1b[?25l" not in said  # hides the cursor
    assert "[1/10]" in said


def test_on_a_terminal_the_bar_counts_modules_and_names_the_one_in_work(
    start: Start, checkpoint: Built, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "160")
    with Bar(quiet=False, verbose=False) as bar:
        manifest = start(checkpoint("llama"), progress=bar)
        bar._bar.refresh()
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    count = len(manifest.weights)
    assert f"{count}/{count} weights" in seen
    assert any(weight.module in seen for weight in manifest.weights)


def test_several_devices_are_shown_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(quiet=False, verbose=False)
    bar.solving("a.q_proj", "cuda:1")
    assert bar.current == "a.q_proj"
    bar.solving("b.q_proj", "cuda:0")
    bar.solving("c.q_proj", "cuda:1")
    assert bar.current == "cuda:0 b.q_proj  cuda:1 c.q_proj"


def test_without_a_terminal_a_long_file_gets_a_line_a_minute(
    start: Start, checkpoint: Built, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_bar, "_MOST_SILENCE_S", 0)  # a minute is over at every tensor
    with Bar(quiet=False, verbose=False) as bar:
        manifest = start(checkpoint("llama"), progress=bar)
    with by_weights("measuring", quiet=False) as measured:
        measured(1, 2)
    with by_weights("measuring", quiet=True) as measured:
        measured(1, 2)
    lines = capsys.readouterr().err.splitlines()
    count = len(manifest.weights)
    assert any(re.fullmatch(rf"\d+/{count} weights, (about [\d.]+ s|less than 1 s) left", line) for line in lines)
    assert lines[-2:] == ["measuring", "measuring: 1/2 weights"]


@pytest.mark.parametrize("width", [20, 60])
def test_an_error_breaks_between_words_on_a_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(width))
    path = "/a-folder-with-a-long-name" * 4
    print_error(f"the output folder cannot be written: {path}", f"name another folder than {path}")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()
    assert " ".join(" ".join(lines).split()) == (
        f"error: the output folder cannot be written: {path} hint: name another folder than {path}"
    )
    assert all(len(line.rstrip()) <= width or line.strip() == path for line in lines)


def test_modules_are_listed_by_kind_and_layer() -> None:
    names = ["model.layers.10.mlp.up_proj", "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj", "head"]
    assert _by_layer(names) == "mlp.up_proj of layers 2, 10; self_attn.q_proj of layer 2; head"


def test_quiet_says_nothing(start: Start, checkpoint: Built, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(quiet=True, verbose=False) as bar:
        start(checkpoint("llama"), progress=bar)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [200, 70, 60, 40])
def test_a_table_loses_columns_and_not_their_contents(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    _print_table(console, ("module", "energy", "error"), [("down_proj" * 3, "0.123456789", "1e-9")], spare=("energy",))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "down_proj" * 3 in said
    assert "1e-9" in said
    assert ("0.123456789" in said) == (width > 45)


HOSTILE = "::error::x\n::stop-commands::y\x1b]0;T\x07[red]a[/red]:smile:##[z]"


def test_a_string_is_one_line_of_plain_text_wherever_it_is_printed() -> None:
    file = io.StringIO()
    console = _Console(file=file, width=400, force_terminal=True, color_system=None, soft_wrap=True)
    console.print(HOSTILE)
    _print_table(console, ("a", "b"), [(HOSTILE, HOSTILE)], spare=())
    said = [line.strip() for line in file.getvalue().splitlines()]
    tamed = "\\x3a:error::x\\n::stop-commands::y\\x1b]0;T\\x07[red]a[/red]:smile:#\\x23[z]"
    assert said[0] == tamed
    assert said[2].split() == [tamed, tamed]


def test_a_name_in_a_bar_or_a_spinner_does_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "300")
    bar = Bar(quiet=False, verbose=False)
    with bar:
        bar.pushing(HOSTILE)
        bar.solving(HOSTILE, "cpu")
        bar._bar.refresh()
    with waiting(HOSTILE, quiet=False):
        pass
    said = capsys.readouterr().err
    assert "\x1b]0;" not in said
    assert "\x07" not in said
    assert "\n::stop" not in said
    assert said.count("[red]a[/red]:smile:") >= 2


def test_the_json_is_ascii_and_without_a_runners_command(capsys: pytest.CaptureFixture[str]) -> None:
    content = {HOSTILE: [HOSTILE, "\x9b\u2028\u202e\x7f"]}
    print_json(content)
    said = capsys.readouterr().out
    assert said.isascii()
    assert "##" not in said
    assert said.replace("\n", "").isprintable()
    assert json.loads(said) == content
