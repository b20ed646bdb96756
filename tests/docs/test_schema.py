"""docs/output.schema.json describes what the commands print with --json: every field, and nothing else is required."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from milora_init.cli.main import COMMANDS, run
from milora_init.envelope import SCHEMA, STATUSES
from milora_init.verification.verdict import TEXTS

Files = Callable[[Path], None]
DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "output.schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(DOCUMENT)

# Command lines in a folder with the example files, each with its exit status and status field.
CASES = [
    ("init my-model --out new --dry-run", 0, "planned"),
    ("init my-model --out new --device cpu", 0, "done"),
    ("init meta-llama/Llama-2-7b-hf --out ./svd_init --rank 64", 0, "unchanged"),
    ("init meta-llama/Llama-2-7b-hf --out ./svd_init --rank 64 --fail-on leak=0 --fail-on error=9", 1, "unchanged"),
    ("init my-model --out new --device cpu --part 1/2", 0, "part"),
    ("init meta-llama/Llama-2-7b-hf --out ./svd_init --rank 64 --part 1/2", 0, "part"),
    ("init my-model --out new --rank 0", 2, "failed"),
    ("init my-model --out svd_init --rank 8", 1, "failed"),
    ("verify svd_init", 0, "ok"),
    ("verify svd_init --adapter trained --model my-model", 0, "ok"),
    ("verify my-model", 1, "differs"),
    ("verify merged", None, None),
    ("report svd_init", 0, "done"),
    ("report svd_init --adapter trained", 0, "done"),
    ("scan my-model --device cpu --spectrum", 0, "done"),
    ("scan my-model --rank 0", 2, "failed"),
    ("merge svd_init --adapter trained --out again", 0, "done"),
    ("merge svd_init --adapter ./trained --out ./merged", 0, "unchanged"),
    ("merge svd_init --out back --model my-model", 0, "done"),
    ("convert svd_init --adapter trained --out again", 0, "done"),
    ("convert svd_init --adapter trained --out again --rank 8", 0, "done"),
    ("convert svd_init --adapter trained --out again --energy 0.9 --for vllm --dry-run", 0, "planned"),
    ("convert ./svd_init --adapter ./trained --out ./plain", 0, "unchanged"),
    ("push nothing me/nothing", None, "failed"),
    ("recipes", 0, "done"),
    ("recipes math", 0, "done"),
    ("env", 0, "done"),
]


def test_the_schema_is_a_schema_and_has_every_code() -> None:
    Draft202012Validator.check_schema(DOCUMENT)
    properties = DOCUMENT["properties"]
    assert properties["schema"]["const"] == SCHEMA
    assert properties["command"]["enum"] == list(COMMANDS)
    assert properties["status"]["enum"] == list(STATUSES)
    assert DOCUMENT["$defs"]["verify"]["properties"]["code"]["enum"] == list(TEXTS)


@pytest.mark.parametrize(("words", "exit_status", "status"), CASES)
def test_what_a_command_prints_follows_the_schema(
    words: str, exit_status: int | None, status: str | None, example_files: Files, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    example_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    returned = run([*words.split(), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert exit_status in (None, returned)
    assert status in (None, printed["status"])
    _require_described(printed)


def test_what_a_push_returns_follows_the_schema() -> None:
    from milora_init.hub.upload import Published

    published = Published("me/model", "https://huggingface.co/me/model", "0" * 40, 3)
    _require_described(published.to_json())


def _require_described(printed: dict[str, Any]) -> None:
    assert [f"{list(error.path)}: {error.message}" for error in VALIDATOR.iter_errors(printed)] == []
    known = set(DOCUMENT["properties"]) | {name for part in _parts(printed) for name in part["properties"]}
    assert printed.keys() - known == set(), "describe these fields in docs/output.schema.json"


def _parts(printed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The definitions that apply to an object, by its command and status."""
    for case in DOCUMENT["allOf"]:
        if Draft202012Validator(case["if"]).is_valid(printed):
            yield DOCUMENT["$defs"][case["then"]["$ref"].rpartition("/")[2]]
