"""scan and the pictures of report on the command line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support import pages

from milora_init.cli import output
from milora_init.cli.main import run
from milora_init.manifest import Manifest

Built = Callable[..., Path]
Start = Callable[..., Manifest]
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """said(*words) runs a command line and returns its status, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        status = run([*map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def scan(*words: object) -> list[object]:
    return ["scan", *words, "--device", "cpu", "--rank", "4"]


def test_the_table_has_a_row_for_each_kind_of_weight_and_says_what_was_left_out(said: Said, checkpoint: Built) -> None:
    status, out, err = said(*scan(checkpoint("llama")))
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split()[:5] == ["module", "shape", "weights", "s_max", "condition"]
    assert [line.split()[0] for line in lines[1:6]] == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert "10 weights scanned in" in lines[-1]
    assert "note: 4 other linear layers were not scanned; --target all-linear adds them" in err


def test_the_other_forms_agree_with_each_other(said: Said, checkpoint: Built) -> None:
    source = checkpoint("llama")
    _, as_json, _ = said(*scan(source), "--json", "--spectrum")
    _, as_csv, _ = said(*scan(source), "--csv")
    _, as_markdown, _ = said(*scan(source), "--markdown")
    found = json.loads(as_json)
    rows = list(csv.DictReader(io.StringIO(as_csv)))
    assert [row["module"] for row in rows] == [weight["module"] for weight in found["weights"]]
    for row, weight in zip(rows, found["weights"], strict=True):
        assert float(row["s_max"]) == weight["s_max"]
        (figures,) = weight["ranks"]
        assert float(row["energy_min_4"]) == figures["energy_min"]
        assert float(row["leak_bfloat16_4"]) == figures["leak"]["bfloat16"]
        assert len(weight["singular_values"]) == min(weight["shape"])
    assert as_markdown.count("\n| ") == 1 + len(found["groups"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "--csv"], "--json and --csv exclude each other"),
        (["--spectrum"], "--spectrum is given without --json"),
        (["--html", "scan.txt"], "--html scan.txt does not end in .html"),
        (["--html", "none/scan.html"], "the folder none is not there"),
        (["--target", "nothing"], "target 'nothing' matches no module"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
    ],
)
def test_a_mistake_gets_one_error_and_writes_nothing(
    words: list[str], message: str, said: Said, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = said("scan", checkpoint("llama"), *words)
    assert status in (1, 2)
    assert out == "" or json.loads(out)["status"] == "failed"
    assert re.search(rf"error: .*{re.escape(message)}", err)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_error(said: Said) -> None:
    status, _, err = said("scan", "./no-model")
    assert status != 0
    assert "no-model" in err


def test_pages_are_written_of_a_scan_and_of_a_run(said: Said, start: Start, checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama"))
    for words in (scan(checkpoint("llama")), ["report", tmp_path / "out"]):
        page = tmp_path / f"{words[0]}.html"
        status, out, _ = said(*words, "--html", page)
        assert status == 0
        assert out.splitlines()[-1] == f"wrote {page}"
        assert page.read_text().startswith("<!DOCTYPE html>")
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    status, _, err = said("report", tmp_path / "out", "--html", mine)
    assert status == 1
    assert "milora-init did not write it" in err
    assert mine.read_text() == "mine"


def test_without_matplotlib_a_plot_is_refused_at_once(
    said: Said, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora_init.pictures.plots.has_matplotlib", lambda: False)
    for words in (["scan", checkpoint("llama")], ["report", "nothing"]):
        status, _, err = said(*words, "--plot", tmp_path / "scan.png")
        assert status == 2
        assert "pip install matplotlib" in err


def test_spectra_are_drawn_in_blocks_of_one_scale() -> None:
    falling = [10.0 ** (-point / 8) for point in range(48)]
    flat = [1.0] * 48
    one, other, zero = output.sparklines([falling, flat, [1.0, 0.0]])
    assert (one[0], one[-1]) == ("█", "▁")
    assert list(one) == sorted(one, reverse=True)
    assert other == "█" * 12
    assert zero[-1] == "▁"


def test_spectra_are_drawn_on_a_terminal_and_names_cannot_steer_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pages.scan([f"model.layers.{layer}.{pages.HOSTILE}" for layer in range(8)])
    output.print_scan(result, verbose=True)
    assert "▁" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    output.print_scan(result, verbose=True)
    out = capsys.readouterr().out
    assert "█" in out
    assert "\x1b]0;" not in out
    assert "infinite" in out


def test_a_csv_cell_is_no_formula_and_markdown_no_markup() -> None:
    from milora_init.hub.model_card import scan_summary

    result = pages.scan(["=HYPERLINK(1).q", "@x.0.k|<b>"], model="[x](http://y)")
    names = [row["module"] for row in csv.DictReader(io.StringIO(result.to_csv()))]
    assert names == ["'=HYPERLINK(1).q", "'@x.0.k|<b>"]
    text = scan_summary(result)
    assert "`[x](http://y)`" in text
    assert "<b>" not in re.sub(r"`[^`]*`", "", text)
