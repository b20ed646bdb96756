"""The public functions: the same words and the same results as the command line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import milora_init
from milora_init import InitOptions, UsageError
from milora_init.cli.main import COMMANDS

Built = Callable[..., Path]
OF_THE_TERMINAL = {"as_json", "as_markdown", "as_csv", "quiet", "verbose"}


def test_initialize_takes_paths_and_the_words_of_the_command_line(checkpoint: Built, tmp_path: Path) -> None:
    result = milora_init.initialize(
        checkpoint("llama"), tmp_path / "out", lora_r=4, target="q_proj,v_proj", device=["cpu"], progress=False
    )
    assert (result.status, len(result.manifest.weights), result.manifest.inputs["rank"]) == ("done", 4, 4)
    assert str(tmp_path / "out") in result.load
    again = milora_init.initialize(
        checkpoint("llama"), tmp_path / "out", rank=4, target=["q_proj", "v_proj"], device=["cpu"], progress=False
    )
    assert again.status == "unchanged"
    assert again.fingerprint == result.fingerprint
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = milora_init.initialize(
        checkpoint("llama"), tmp_path / "moved", rank=4, target="q_proj,v_proj", device=["cpu"], progress=False
    )
    assert (moved.status, moved.manifest.out) == ("unchanged", str(tmp_path / "moved"))
    assert moved.load == result.load.replace("/out", "/moved")


def test_initialize_takes_checked_options_too(checkpoint: Built, tmp_path: Path) -> None:
    options = InitOptions(model=str(checkpoint("llama")), out=str(tmp_path / "out"), rank=4, device=("cpu",))
    assert milora_init.initialize(options, progress=False).status == "done"
    with pytest.raises(UsageError, match="further options"):
        milora_init.initialize(options, rank=5)


def test_a_traceback_shows_the_hint_too() -> None:
    with pytest.raises(UsageError) as caught:
        milora_init.verify("absent")
    assert caught.value.__notes__ == [f"hint: {caught.value.hint}"]  # Python prints these, from 3.11 on


def test_an_unknown_option_names_the_closest_one() -> None:
    with pytest.raises(UsageError, match="no option `rnak`") as caught:
        milora_init.initialize("m", "o", rnak=3)
    assert caught.value.hint == "did you mean `rank`?"
    with pytest.raises(UsageError) as caught:
        milora_init.initialize("m", "o", rank_patern={})
    assert caught.value.hint == "did you mean `rank_pattern`?"  # as Python spells it


def test_verify_and_merge_follow(checkpoint: Built, tmp_path: Path) -> None:
    source = checkpoint("llama")
    milora_init.initialize(source, tmp_path / "out", rank=4, device=["cpu"], progress=False)
    verdict = milora_init.verify(tmp_path / "out", model=source)
    assert (verdict.ok, verdict.code) == (True, "pair")
    merged = milora_init.merge(tmp_path / "out", tmp_path / "merged", model=source, progress=False)
    assert merged.bit_equal is not None
    assert not merged.unchanged


def test_results_have_a_short_repr_a_table_and_json(checkpoint: Built, tmp_path: Path) -> None:
    out = tmp_path / "<b>out"
    result = milora_init.initialize(checkpoint("llama"), out, rank=4, device=["cpu"], progress=False)
    verdict = milora_init.verify(out)
    for value, command in ((result, "init"), (verdict, "verify")):
        assert len(repr(value)) < 400
        assert "<b>out" not in value._repr_html_()
        assert "&lt;b&gt;out" in value._repr_html_()
        assert json.loads(json.dumps(value.to_json()))["command"] == command
    assert len(repr(result.manifest)) < 400
    with pytest.raises(AttributeError):
        result.status = "changed"  # type: ignore[misc, assignment]


def test_a_bar_is_the_default_and_false_prints_nothing(
    checkpoint: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    milora_init.initialize(checkpoint("llama"), tmp_path / "one", rank=4, device=["cpu"])
    said = capsys.readouterr()
    assert said.out == ""
    assert "weights done" in said.err
    milora_init.initialize(checkpoint("llama"), tmp_path / "two", rank=4, device=["cpu"], progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["initialize", "scan", "verify", "merge", "convert", "push"])
def test_every_function_describes_its_parameters_and_errors(name: str) -> None:
    function = getattr(milora_init, name)
    text = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}" in text, parameter
    assert "Raises:" in text


def test_options_have_the_names_of_the_command_line() -> None:
    """What a function takes, its command takes by the same name."""
    for name in ("scan", "verify", "merge", "convert", "push"):
        function, command = getattr(milora_init, name), COMMANDS[name]
        of_function = set(inspect.signature(function).parameters) - {"progress"}
        of_command = set(inspect.signature(command).parameters) - OF_THE_TERMINAL
        assert of_function == of_command, name


def test_the_package_is_imported_without_torch_and_lists_its_api() -> None:
    code = (
        "import sys, milora_init; assert dir(milora_init) == milora_init.__all__; "
        "assert not {'torch', 'transformers', 'typer', 'rich'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
