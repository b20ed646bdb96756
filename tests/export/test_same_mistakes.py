"""merge and convert: the same mistake gets the same text and exit status."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import make_outputs

from milora_init.cli.main import run

Built = Callable[..., Path]


@pytest.fixture(scope="module")
def built(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    make_outputs(checkpoint("llama"), folder, "pair")
    shutil.copytree(checkpoint("llama"), folder / "foreign")
    shutil.copytree(folder / "pair", folder / "unfinished")
    (folder / "unfinished" / "milora_init.json").unlink()
    (folder / "unfinished" / ".milora-init").mkdir()
    shutil.copytree(folder / "trained", folder / "ia3")
    config = folder / "ia3" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    (folder / "file").write_text("mine")
    (folder / "link").symlink_to(folder / "nowhere")
    return folder


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        ({"pair": "absent"}, 2, "absent: no such folder"),
        ({"pair": ""}, 2, "PAIR is empty"),
        ({"pair": "file"}, 2, "file: a file, not a folder"),
        ({"pair": "foreign"}, 1, "foreign has no milora_init.json: it is no finished output of milora-init"),
        ({"pair": "unfinished"}, 1, "unfinished is an unfinished output of milora-init"),
        ({"pair": "merged"}, 1, "merged is a merged model, not a pair"),
        ({"pair": "plain"}, 1, "plain is a converted adapter, not a pair"),
        ({"adapter": "absent"}, 2, "absent: no such folder"),
        ({"adapter": ""}, 2, "--adapter is empty"),
        ({"adapter": "pair"}, 1, "pair is a pair, not the adapter that a trainer saved"),
        ({"adapter": "foreign"}, 1, "foreign is a model, not the adapter that a trainer saved"),
        ({"adapter": "ia3"}, 1, "ia3/adapter_config.json does not describe a LoRA adapter"),
        ({"adapter": "plain"}, 1, "plain is a converted adapter, not the adapter that a trainer saved"),
        ({"adapter": "merged"}, 1, "merged is a merged model, not the adapter that a trainer saved"),
        ({"out": ""}, 2, "--out is empty"),
        ({"out": "file"}, 1, "--out file is a file"),
        ({"out": "link"}, 1, "--out link is a link to what is not there"),
        ({"out": "trained/x"}, 1, "--out trained/x lies inside"),
        ({"out": "pair"}, 1, ""),
    ],
)
def test_merge_and_convert_agree_on_a_mistake(
    changed: dict[str, str], status: int, message: str, built: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(built)
    before = sorted(built.iterdir())
    given = {"pair": "pair", "adapter": "trained", "out": "x", **changed}
    texts = []
    for command in ("merge", "convert"):
        assert run([command, given["pair"], "--adapter", given["adapter"], "--out", given["out"]]) == status
        texts.append(capsys.readouterr().err.partition("error: ")[2].partition("\n")[0])
        assert message in texts[-1]
    if message:
        assert texts[0] == texts[1]
    assert sorted(built.iterdir()) == before


def test_merge_and_convert_agree_on_a_folder_without_permission(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(built)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    for command in ("merge", "convert"):
        assert run([command, "pair", "--adapter", "trained", "--out", "x"]) == 1
        assert f"--out x cannot be written: no permission in {built}" in capsys.readouterr().err
    assert not (built / "x").exists()


def test_an_output_of_one_command_is_not_replaced_by_another(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(built)
    for command, out, record in (
        ("merge", "plain", "milora_convert.json"),
        ("convert", "merged", "milora_merge.json"),
        ("convert", "pair", "milora_init.json"),
    ):
        words = [command, "pair", "--adapter", "trained", "--out", out]
        for more in ([], ["--overwrite"]):
            assert run([*words, *more]) == 1
            said = capsys.readouterr().err
            assert f"--out {out} holds another output of milora-init: {record}" in said or "lies inside" in said, said


@pytest.mark.parametrize(("name", "what"), [("merged", "a merged model"), ("plain", "a converted adapter")])
def test_report_names_what_a_folder_is_instead(
    name: str, what: str, built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(built)
    assert run(["report", name, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["error"] == f"{name} is {what}, not a pair"
    assert said["hint"].endswith(str(built / "pair"))
    assert run(["report", "unfinished"]) == 1
    assert "unfinished is an unfinished output" in capsys.readouterr().err
    assert run(["report", "absent"]) == 2
