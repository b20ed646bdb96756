"""journal: appended lines are read back, and an invalid journal is an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milora_init.accuracy import Certificate, Rounding
from milora_init.errors import OutputError
from milora_init.expert_slot import ExpertSlot
from milora_init.manifest import WeightRecord
from milora_init.run.journal import Entry, Head, Journal

HEAD = Head("f" * 64, {"rank": 4, "modules": ["q_proj"]}, ("model.safetensors", "lora/adapter_config.json"))


def record(module: str, *, expert: ExpertSlot | None = None) -> WeightRecord:
    return WeightRecord(
        module=module, tensor=f"{module}.weight", shape=(12, 20), transposed=False, row=None, expert=expert, key=module,
        source_dtype="bfloat16", dtype="float32", rank=4, scale=0.1, s_first=1 / 3, s_last=1e-300, s_max=2.5,
        energy=0.2, untrainable=0, certificate=Certificate("svd", "small", 1e-16, 1e-16, None, None, "all"),
        rounding=Rounding(0.5, 0.1, 0.2, {"bfloat16": 0.2, "float16": None}), device="cpu",
        elapsed_s=0.1, read_s=0.2, write_s=0.3,
    )  # fmt: skip


def entry(shard: str = "model.safetensors", **values: Any) -> Entry:
    return Entry(shard, {shard: 7, ".milora-init/x.adapter": 8}, (record("a.q_proj"), record("a.k_proj")), **values)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl", out=tmp_path)


def test_appended_lines_are_read_back(journal: Journal) -> None:
    assert journal.read() == (None, ())
    entries = (entry("a"), entry("b", hashes={"b": "0" * 64}), entry("a", pushed="1" * 64))
    for line in (HEAD, *entries):
        journal.append(line)
    assert journal.read() == (HEAD, entries)
    assert journal.shards() == {"a": entries[2], "b": entries[1]}  # the last entry of each
    assert [set(json.loads(line)) for line in journal.path.read_text().splitlines()] == [
        {"fingerprint", "inputs", "files"},
        {"shard", "files", "records", "hashes"},
        {"shard", "files", "records", "hashes"},
        {"shard", "files", "records", "hashes", "pushed"},
    ]


def test_an_incomplete_line_is_ignored_and_does_not_damage_the_next(journal: Journal) -> None:
    journal.append(HEAD)
    with journal.path.open("ab") as file:
        file.write(json.dumps(entry("a").to_json()).encode()[:40])
    assert journal.read() == (HEAD, ())
    journal.append(entry("b"))
    assert journal.read() == (HEAD, (entry("b"),))


@pytest.mark.parametrize(
    "change",
    [
        {"records": 3}, {"records": [{}]}, {"records": [{"module": "a"}]}, {"files": 3}, {"files": ["a"]},
        {"hashes": 3}, {"hashes": ["a"]}, {"shard": "../a"}, {"files": {"/a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_with_invalid_fields_is_damaged(change: dict[str, Any], journal: Journal) -> None:
    journal.append(HEAD)
    with journal.path.open("a") as file:
        file.write(json.dumps(entry().to_json() | change) + "\n")
    with pytest.raises(OutputError, match=r"journal\.jsonl is damaged"):
        journal.read()
