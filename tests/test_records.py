"""The records of merged models and converted adapters: what is read, what is refused, and the envelope."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.runs import initialize
from support.training import train

from milora_init import untrusted
from milora_init.api import convert, merge
from milora_init.errors import OutputError
from milora_init.manifest import fingerprint
from milora_init.options import InitOptions
from milora_init.records import (
    CONVERTED,
    MERGED,
    ConvertResult,
    MergeResult,
    read_converted,
    read_merged,
    read_output,
    require_output,
    require_pair,
)

Built = Callable[..., Path]
READERS = {"merged": (MERGED, read_merged), "plain": (CONVERTED, read_converted)}
JUNK: list[Any] = [None, True, -1, 1e400, 10**30, "", "x", "/etc/passwd", "../x", [], [1], {}, {"../x": 1}, {"a": {}}]


@pytest.fixture(scope="module")
def outputs(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out`, `trained`, `merged` (of the trained adapter), `again` (of the initial one) and `plain`."""
    folder = tmp_path_factory.mktemp("outputs")
    initialize(InitOptions(model=str(checkpoint("llama")), out=str(folder / "out"), rank=4, device=("cpu",)))
    train(folder / "out", folder / "trained", steps=1)
    merge(folder / "out", folder / "merged", adapter=folder / "trained", progress=False)
    merge(folder / "out", folder / "again", progress=False)
    convert(folder / "out", folder / "trained", folder / "plain")
    return folder


def test_every_file_is_recorded_with_its_hash(outputs: Path, checkpoint: Built) -> None:
    for name, record in (("merged", MERGED), ("plain", CONVERTED)):
        output = require_output(outputs / name, name)
        found = {p.relative_to(outputs / name).as_posix() for p in (outputs / name).rglob("*") if p.is_file()}
        assert found == {*output.files, record}
        for file, digest in output.hashes.items():
            content = (outputs / name / file).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (output.files[file], digest)
    merged, again = (read_merged(outputs / name) for name in ("merged", "again"))
    assert merged is not None
    assert again is not None
    assert merged.model == again.model == str(checkpoint("llama"))
    assert (merged.initial, again.initial) == (False, True)


def test_a_resumed_merge_records_the_hashes_of_all_shards(outputs: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop_in_the_middle(name: str, *_: int) -> None:
        if "00006-of" in name:
            raise StopError

    from milora_init.export.merge import merge as merge_pair

    with pytest.raises(StopError):
        merge_pair(str(outputs / "out"), str(tmp_path / "merged"), progress=stop_in_the_middle)
    with pytest.raises(OutputError, match="is an unfinished output"):
        require_output(tmp_path / "merged", "merged")
    resumed = merge_pair(str(outputs / "out"), str(tmp_path / "merged"))
    whole = read_merged(outputs / "again")
    assert whole is not None
    assert resumed.hashes == whole.hashes


def test_results_are_envelopes_and_return_unchanged(outputs: Path) -> None:
    results: list[MergeResult | ConvertResult] = [
        merge(outputs / "out", outputs / "merged", adapter=outputs / "trained", progress=False),
        convert(outputs / "out", outputs / "trained", outputs / "plain"),
    ]
    for result, command in zip(results, ("merge", "convert"), strict=True):
        content = json.loads(json.dumps(result.to_json()))
        common = ["schema", "command", "status", "out", "fingerprint", "source", "warnings"]
        assert list(content)[: len(common)] == common
        assert (content["command"], content["status"]) == (command, "unchanged")
        assert content["source"] == {"model": result.model, "revision": None}
        assert content["hashes"] == result.hashes
        assert not {"inputs", "tensors", "unchanged"} & content.keys()
        assert repr(result).startswith(f"{type(result).__name__}(status='unchanged'")


@pytest.mark.parametrize("name", READERS)
def test_any_value_in_a_record_is_read_or_refused(name: str, outputs: Path, tmp_path: Path) -> None:
    record, read = READERS[name]
    content = json.loads((outputs / name / record).read_text())
    for field in content:
        for value in JUNK:
            (tmp_path / record).write_text(json.dumps(content | {field: value}).replace("Infinity", "1e999"))
            with suppress(OutputError):
                assert read(tmp_path)
        (tmp_path / record).write_text(json.dumps({key: content[key] for key in content if key != field}))
        with pytest.raises(OutputError, match=rf"{field} is missing|files|fingerprint"):
            read(tmp_path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["files"].update({"../x": 1}), "plain name of a file"),
        (lambda c: c["files"].update({"/etc/passwd": 1}), "plain name of a file"),
        (lambda c: c["files"].update({".git/config": 1}), "hidden"),
        (lambda c: c["hashes"].update({"../x": "0" * 64}), "plain name of a file"),
        (lambda c: c["files"].update({"more.txt": 1}), "do not name the files of one output"),
        (lambda c: c["files"].update({"milora_init.json": 1}), "do not name the files of one output"),
        (lambda c: c["files"].update(dict.fromkeys(c["files"], -1)), "files has the invalid value"),
        (lambda c: c["hashes"].update(dict.fromkeys(c["hashes"], "0")), "hashes has the invalid value"),
        (lambda c: c.update(files={}, hashes={}), "files lacks"),
        (lambda c: c.update(unchanged=True), "unchanged is no field of it"),
        (lambda c: c.update(format=2), "format has the invalid value '2'"),
        (lambda c: c.update(inputs={}), "fingerprint is not the hash of inputs"),
    ],
)
def test_a_hostile_record_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, name: str, outputs: Path, tmp_path: Path
) -> None:
    record, read = READERS[name]
    content = json.loads((outputs / name / record).read_text())
    change(content)
    (tmp_path / record).write_text(json.dumps(content))
    with pytest.raises(OutputError, match="is not a record that this version reads") as caught:
        read(tmp_path)
    assert message in caught.value.message


@pytest.mark.parametrize("name", READERS)
def test_a_record_without_hashes_or_of_endless_size_is_refused(
    name: str, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, read = READERS[name]
    content = json.loads((outputs / name / record).read_text())
    (tmp_path / record).write_text(json.dumps({key: content[key] for key in content if key != "hashes"}))
    with pytest.raises(OutputError, match="hashes"):
        read(tmp_path)
    for text in ("[" * 100_000, "9" * 5000, "[]", "{"):
        (tmp_path / record).write_text(text)
        with pytest.raises(OutputError, match="is not a record that this version reads"):
            read(tmp_path)
    with (tmp_path / record).open("wb") as file:
        file.truncate(untrusted.MOST_JSON_BYTES + 1)  # sparse
    with pytest.raises(OutputError, match="more than the limit of"):
        read(tmp_path)


def test_a_pair_is_told_from_the_other_outputs(outputs: Path, tmp_path: Path) -> None:
    assert require_pair(outputs / "out", "out").fingerprint
    for name, what in (("merged", "a merged model"), ("plain", "a converted adapter")):
        with pytest.raises(OutputError, match=f"mine is {what}, not a pair") as caught:
            require_pair(outputs / name, "mine")
        assert str(outputs / "out") in caught.value.hint
    assert read_output(tmp_path) is None
    with pytest.raises(OutputError, match="mine has no milora_init"):
        require_output(tmp_path, "mine")
    merged = require_output(outputs / "merged", "merged")
    assert merged.fingerprint == fingerprint(merged.inputs)
