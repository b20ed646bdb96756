"""untrusted: file names and text from files that the program did not write."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_init.untrusted import path_inside, printable, relative_name

BAD = [
    "",
    ".",
    "..",
    "../x",
    "a/../x",
    "a/..",
    "/etc/passwd",
    "a//b",
    "./a",
    "a/",
    "a\\b",
    "..\\x",
    "C:\\x",
    "a\0b",
    None,
    3,
]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_could_leave_the_folder_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a (file name|plain name of a file)|the folder itself"):
        relative_name(name)
    with pytest.raises(ValueError, match=r"not a (file name|plain name of a file)|the folder itself"):
        path_inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "lora/adapter_config.json", "..a", "a..", ".hidden", "a b", "ä"])
def test_a_plain_name_is_returned_unchanged(name: str, tmp_path: Path) -> None:
    assert relative_name(name) == name
    assert path_inside(tmp_path, name) == tmp_path / name


def test_a_link_out_of_the_folder_is_refused_and_a_link_within_it_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "file").write_text("f")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "within").symlink_to("file")
    (folder / "up").symlink_to(tmp_path)
    for name in ("out", "up/secret", "up/new"):
        with pytest.raises(ValueError, match="leads out"):
            path_inside(folder, name)
    assert path_inside(folder, "within") == folder / "within"


def test_control_characters_are_escaped() -> None:
    assert printable("a\n::b\x1b]0;c\x07é") == "a\\n::b\\x1b]0;c\\x07é"


def test_a_link_to_the_blobs_of_the_same_repository_is_allowed_and_no_other(tmp_path: Path) -> None:
    snapshot, other = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--c" / "blobs"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot / "lora", blobs / "deep", other):
        folder.mkdir(parents=True)
    (snapshot / "file").symlink_to("../../blobs/4567")
    (snapshot / "lora" / "file").symlink_to("../../../blobs/89ab")
    assert path_inside(snapshot, "file") == snapshot / "file"
    assert path_inside(snapshot, "lora/file") == snapshot / "lora" / "file"
    for name, target in (("a", other / "x"), ("b", blobs), ("c", blobs / "deep" / "x"), ("d", tmp_path / "x")):
        (snapshot / name).symlink_to(target)
        with pytest.raises(ValueError, match="leads out"):
            path_inside(snapshot, name)
    blobs.rename(tmp_path / "secret")
    blobs.symlink_to(tmp_path / "secret")  # a repository whose `blobs` is itself a link
    with pytest.raises(ValueError, match="leads out"):
        path_inside(snapshot, "file")


@pytest.mark.parametrize(
    "text",
    ["\u202eabc", "\u2066x\u2069", "\x9b31m", "\x85", "\u2028", "\u2029", "\x7f", "\udcff", "\u200b", "\r", "\t"],
)
def test_invisible_characters_are_escaped(text: str) -> None:
    assert printable(text).isascii()
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", ["::error::x", "  ::add-mask::x", ":::x", "\n::x"])
def test_no_line_begins_a_command_of_a_ci_runner(text: str) -> None:
    assert not printable(text).lstrip().startswith("::")


@pytest.mark.parametrize("text", ["##[error]x", "a ##vso[task.setvariable]x", "###[x]", "####[x]"])
def test_no_line_holds_a_command_of_a_ci_runner(text: str) -> None:
    assert "##" not in printable(text)


def test_escaping_twice_gives_the_same_text() -> None:
    for text in ("::x", "##[x]", "a\n\x1b", "plain ü 日本"):
        assert printable(printable(text)) == printable(text)
    assert printable("plain ü 日本 a::b c#d") == "plain ü 日本 a::b c#d"
