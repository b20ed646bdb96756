"""terminal: what a person sees while a run goes on, with a terminal and without one."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from support.interruptions import shards

from milora_init.cli.output import _print_table
from milora_init.cli.progress_bar import Bar
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
    assert all(re.search(r", about [\d.]+ s left$", line) for line in lines[:-1])
    assert "left" not in lines[-1]


def test_on_a_terminal_the_bar_counts_modules_and_names_the_one_in_work(
    start: Start, checkpoint: Built, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with Bar(quiet=False, verbose=False) as bar:
        manifest = start(checkpoint("llama"), progress=bar)
        bar._bar.refresh()
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    count = len(manifest.weights)
    assert f"{count}/{count} modules" in seen
    assert any(weight.module in seen for weight in manifest.weights)


def test_several_devices_are_shown_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(quiet=False, verbose=False)
    bar.solving("a.q_proj", "cuda:1")
    assert bar.current == "a.q_proj"
    bar.solving("b.q_proj", "cuda:0")
    bar.solving("c.q_proj", "cuda:1")
    assert bar.current == "cuda:0 b.q_proj  cuda:1 c.q_proj"


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
