"""Pictures and pages as files: nothing of the user's is replaced, and without matplotlib one line says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import pages

from milora_init import OutputError, UsageError
from milora_init.pictures import plots
from milora_init.pictures.files import prepared
from milora_init.pictures.page import scan_page

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def html(tmp_path: Path) -> Path:
    return tmp_path / "scan.html"


def write(path: Path, content: bytes, option: str = "--html") -> None:
    writer = prepared(path, option)
    assert writer is not None
    writer(content)


def test_a_page_replaces_an_earlier_page_and_leaves_no_other_file(html: Path) -> None:
    page = scan_page(pages.scan(pages.LLAMA_405B[:5])).encode()
    write(html, page)
    write(html, page.replace(b"405b", b"406b"))
    assert [path.name for path in html.parent.iterdir()] == ["scan.html"]
    assert html.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_of_the_users_is_not_replaced(html: Path) -> None:
    html.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="milora-init did not write it"):
        prepared(html, "--html")
    html.unlink()
    html.mkdir()
    with pytest.raises(OutputError):
        prepared(html, "--html")


def test_a_file_that_appears_meanwhile_is_not_replaced(html: Path) -> None:
    writer = prepared(html, "--html")
    assert writer is not None
    html.write_text("mine")
    with pytest.raises(OutputError, match="did not write it"):
        writer(b"page")
    assert html.read_text() == "mine"


@pytest.mark.parametrize(("option", "name"), [("--html", "scan.txt"), ("--plot", "scan.svg"), ("--html", "scan")])
def test_another_ending_is_refused_before_anything_is_done(option: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not end in"):
        prepared(tmp_path / name, option)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not there"):
        prepared(tmp_path / "no" / "scan.html", "--html")


def test_a_folder_without_permission_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="cannot be written: no permission in"):
        prepared(tmp_path / "scan.html", "--html")


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="need matplotlib, which is not installed") as caught:
        prepared(tmp_path / "scan.png", "--plot")
    assert caught.value.hint == "pip install matplotlib"


@pytest.mark.wide
def test_plots_are_png_files_that_are_known_again(tmp_path: Path) -> None:
    names = [*pages.LLAMA_405B[:2], f"model.layers.0.{pages.HOSTILE}", "lm_head"]
    for number, content in enumerate(
        (plots.scan_plot(pages.scan(names)), plots.report_plot(pages.manifest(["a.0.b"])))
    ):
        assert content.startswith(PNG)
        path = tmp_path / f"{number}.png"
        write(path, content, "--plot")
        write(path, content, "--plot")  # it is ours, so it is replaced
