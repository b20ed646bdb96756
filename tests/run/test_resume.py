"""An interrupted run: the same command resumes it and writes the bytes of an uninterrupted run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.interruptions import InterruptAt, InterruptedRunError, ShardLog, interrupt_after_two_shards, shards
from support.marks import wide
from support.runs import initialize
from support.tiny_models import contents

from milora_init.errors import OutputError
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest, read_manifest
from milora_init.options import InitOptions
from milora_init.run import initialize as initializing
from milora_init.run.journal import Entry, Head, Journal

Built = Callable[..., Path]
Start = Callable[..., Manifest]

pytestmark = pytest.mark.usefixtures("file_by_file")


def weights_and_adapter(out: Path) -> dict[str, bytes]:
    """All files except the manifest, which holds times."""
    return {name: content for name, content in contents(out).items() if name != MANIFEST}


@pytest.fixture(scope="module")
def uninterrupted(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Manifest]:
    """The files of a run in one go with random components in `out`, and its manifest."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    source = str(checkpoint("llama", "bfloat16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the adapter's config then names the folder that the tests resume into
        made = initialize(InitOptions(model=source, out="out", rank=4, mode="random", device=("cpu",)))
    return weights_and_adapter(folder / "out"), made


@pytest.mark.parametrize("when", ["inside", "after"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_run(
    at: int, when: str, start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    uninterrupted: tuple[dict[str, bytes], Manifest],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InterruptedRunError):
        start(checkpoint("llama", "bfloat16"), out="out", mode="random", progress=InterruptAt(at, when=when))
    assert not (Path("out") / "config.json").exists()
    assert not (Path("out") / MANIFEST).exists()
    log = ShardLog()
    resumed = start(checkpoint("llama", "bfloat16"), out="out", mode="random", progress=log)
    done = at + 1 if when == "after" else at
    assert len(log.made) == len(shards(checkpoint("llama", "bfloat16"))) - done
    assert (log.done_bytes > 0) == (done > 0)
    files, manifest = uninterrupted
    assert weights_and_adapter(Path("out")) == files
    assert [record.module for record in resumed.weights] == [record.module for record in manifest.weights]


def test_a_run_that_fails_before_its_first_shard_leaves_nothing(
    start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRunError):
        start(checkpoint("llama"), progress=InterruptAt(0, when="inside"))
    assert not (tmp_path / "out").exists()


def test_an_unfinished_output_holds_only_whole_shards_and_the_journal(
    start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRunError):
        start(checkpoint("llama"), progress=InterruptAt(1, when="inside"))
    found = contents(tmp_path / "out")
    assert [name for name in found if not name.startswith(WORK_FOLDER)] == shards(checkpoint("llama"))[:1]
    assert not [name for name in found if name.endswith(".partial")]


def test_a_run_that_fails_while_other_devices_finish_can_be_run_again(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that other threads finish after the failure are not in the journal; the next run must accept them."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(initializing, "solver_devices", lambda _: ((cpu,) * 3, 2))  # two threads on each of three
    monkeypatch.setattr(Journal, "append", _append_only_the_head)
    with pytest.raises(InterruptedRunError):
        start(checkpoint("llama"))
    monkeypatch.undo()
    assert start(checkpoint("llama")).files
    assert read_manifest(tmp_path / "out") is not None


def _append_only_the_head(self: Journal, line: Head | Entry) -> None:
    if isinstance(line, Entry):
        raise InterruptedRunError
    with self.path.open("a") as file:
        file.write(json.dumps(line.to_json()) + "\n")


def test_finished_work_is_counted_in_bytes_of_the_source(start: Start, checkpoint: Built) -> None:
    """The output has twice as many bytes if a 16-bit weight becomes float32."""
    source = checkpoint("llama", "bfloat16")
    with pytest.raises(InterruptedRunError):
        start(source, dtype="float32", progress=InterruptAt(1, when="after"))
    log = ShardLog()
    start(source, dtype="float32", progress=log)
    done = [load_file(source / name) for name in shards(source)[:2]]
    assert log.done_bytes == sum(tensor.nbytes for shard in done for tensor in shard.values())


def test_an_incomplete_journal_line_is_ignored(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    journal = interrupt_after_two_shards(start, checkpoint("llama"), tmp_path / "out")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    log = ShardLog()
    start(checkpoint("llama"), progress=log)
    assert log.made == shards(checkpoint("llama"))[1:]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_run_with_an_incomplete_journal_line_may_be_interrupted_again(
    kept: int, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    journal = interrupt_after_two_shards(start, source, tmp_path / "out")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    recorded = max(kept - 1, 0)  # the first line is the head of the journal, which records no shard
    for name in shards(source)[recorded:]:
        (tmp_path / "out" / name).unlink(missing_ok=True)
    with pytest.raises(InterruptedRunError):
        start(source, progress=InterruptAt(0, when="after"))
    log = ShardLog()
    start(source, progress=log)
    assert log.made == shards(source)[recorded + 1 :]


def test_a_truncated_shard_is_written_again(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    interrupt_after_two_shards(start, checkpoint("llama"), tmp_path / "out")
    shard = tmp_path / "out" / shards(checkpoint("llama"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    log = ShardLog()
    start(checkpoint("llama"), progress=log)
    assert log.made == shards(checkpoint("llama"))[1:]


@pytest.mark.parametrize("content", [b"garbage\n", b"{}\n", b"[]\n", b"\xff\n", bytes(64) + b"\n"])
def test_a_damaged_journal_is_an_error_that_names_it(
    content: bytes, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    journal = interrupt_after_two_shards(start, checkpoint("llama"), tmp_path / "out")
    journal.write_bytes(content)
    with pytest.raises(OutputError, match=r"journal\.jsonl") as caught:
        start(checkpoint("llama"))
    assert caught.value.hint


def test_the_files_of_a_killed_run_are_resumed_or_overwritten(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    """A kill runs no cleaning code: the folder of the current attempt is still there."""
    source = checkpoint("llama")
    for options in ({}, {"rank": 3, "overwrite": True}):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        interrupt_after_two_shards(start, source, tmp_path / "out")
        attempt = tmp_path / "out" / WORK_FOLDER / "attempts" / "0"
        attempt.mkdir(parents=True, exist_ok=True)
        (attempt / f"{shards(source)[2]}.partial").write_bytes(b"half")
        assert start(source, **options).files
        assert not attempt.exists()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class RewriteLog(ShardLog):
    """Also records the shards that the run reports as written again."""

    def __init__(self) -> None:
        super().__init__()
        self.again: list[str] = []

    def remaking(self, name: str) -> None:
        self.again.append(name)


@pytest.mark.parametrize("part", [False, True])
def test_a_shard_whose_bytes_or_factors_changed_is_written_again(
    part: bool, start: Start, checkpoint: Built, finished: Built, tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupt_after_two_shards(start, source, out)
    shard = next(name for name in shards(source) if (out / WORK_FOLDER / f"{name}.adapter").exists())
    damage(out / WORK_FOLDER / f"{shard}.adapter" if part else out / shard)
    seen = RewriteLog()
    start(source, progress=seen)
    assert seen.again == [shard]
    assert seen.made == [shard, *shards(source)[2:]]
    own = "lora/adapter_config.json"
    uninterrupted, resumed = (weights_and_adapter(folder) for folder in (finished(), out))
    assert {n: c for n, c in resumed.items() if n != own} == {n: c for n, c in uninterrupted.items() if n != own}


def test_a_finished_shard_without_a_hash_is_written_again(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    source = checkpoint("llama")
    journal = interrupt_after_two_shards(start, source, tmp_path / "out")
    head, *lines = (json.loads(line) for line in journal.read_text().splitlines())
    assert all(line["hashes"].keys() == line["files"].keys() for line in lines)
    del lines[0]["hashes"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    seen = RewriteLog()
    start(source, progress=seen)
    assert seen.again == shards(source)[:1]


@pytest.mark.parametrize("name", ["../mine", "/mine", "a/../../mine", "a\\mine", ""])
@pytest.mark.parametrize("where", ["head", "files", "shard"])
@pytest.mark.parametrize("overwrite", [False, wide(True)])
def test_a_journal_with_an_outside_path_is_damaged(
    name: object, where: str, overwrite: bool, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    journal = interrupt_after_two_shards(start, checkpoint("llama"), tmp_path / "out")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    if where == "head":
        lines[0]["files"].append(name)
    elif where == "files":
        lines[1]["files"] = {**lines[1]["files"], str(name): 4}
    else:
        lines[1]["shard"] = name
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"journal\.jsonl is damaged"):
        start(checkpoint("llama"), overwrite=overwrite)
    assert contents(tmp_path) == before
