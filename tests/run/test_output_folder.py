"""output_folder: other files are never changed; files of a run are complete, resumable or removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models
from support.interruptions import InterruptAt, InterruptedRunError, ShardLog, interrupt_after_two_shards, shards
from support.marks import wide
from support.tiny_models import contents

from milora_init.checkpoint.files import read_chunks
from milora_init.checkpoint.writer import partial_of
from milora_init.errors import OutputError, PlanError
from milora_init.export.merge import merge
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest, read_manifest
from milora_init.options import InitOptions
from milora_init.plan import plan
from milora_init.plan.plan import make_plan
from milora_init.run.output_folder import OutputFolder
from milora_init.run.progress import Progress
from milora_init.verification.verify import verify

Built = Callable[..., Path]
Start = Callable[..., Manifest]

pytestmark = pytest.mark.usefixtures("file_by_file")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_merged_model_is_not_replaced_by_a_pair(
    overwrite: bool, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    start(checkpoint("llama"))
    merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    before = contents(tmp_path / "merged")
    with pytest.raises(OutputError, match=r"merged holds another output of milora-init: milora_merge\.json"):
        start(checkpoint("llama"), out=str(tmp_path / "merged"), overwrite=overwrite)
    assert contents(tmp_path / "merged") == before


def states(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_output_holds_exactly_the_documented_files(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    source = checkpoint("llama")
    made = start(source)
    side = {"LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    lora = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    expected = {*shards(source), *side, *lora, "config.json", "model.safetensors.index.json", MANIFEST}
    assert set(contents(tmp_path / "out")) == expected
    for name in side:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert read_manifest(tmp_path / "out") == made
    assert made.files == {n: len(c) for n, c in contents(tmp_path / "out").items() if n != MANIFEST}


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "config.json",
        "old.gguf",
        "lora/notes",
        "tokenizer.json",
        "tokenizer_config.json",
        "adapter_config.json",
        "spiece.model",
        "vocab.txt",
        "chat_template.jinja",
        "modeling_x.py",
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_model_files_is_refused_and_unchanged(
    name: str, overwrite: bool, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_bytes(b"mine")
    (tmp_path / "out" / "notes.txt").write_bytes(b"mine too")
    before = states(tmp_path / "out")
    with pytest.raises(OutputError, match=f"already holds {Path(name).parts[0]}") as caught:
        start(checkpoint("llama"), overwrite=overwrite)
    assert caught.value.hint
    assert states(tmp_path / "out") == before


def test_unrelated_files_in_the_output_folder_are_kept(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(InterruptedRunError):
        start(checkpoint("llama"), progress=InterruptAt(0, when="inside"))
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
    start(checkpoint("llama"))
    start(checkpoint("llama"), rank=3, overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_bytes() == b"mine"


def test_a_finished_output_is_unchanged(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    first = start(checkpoint("llama"))
    before = states(tmp_path / "out")
    count = ShardLog()
    assert start(checkpoint("llama"), progress=count) == first
    assert states(tmp_path / "out") == before
    assert (count.made, count.done_bytes) == ([], -1)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"rank": 5}, "rank was 4, now 5"),
        ({"mode": "max"}, 'mode was "min", now "max"'),
        ({"dtype": "float16"}, 'dtype was "auto", now "float16"'),
        ({"target": ("q_proj",)}, "modules was"),
    ],
)
def test_another_request_is_refused_and_the_difference_named(
    options: dict[str, Any], difference: str, start: Start, checkpoint: Built, out: Path
) -> None:
    before = states(out)
    with pytest.raises(OutputError, match="the output of another request") as caught:
        start(checkpoint("llama"), **options)
    assert difference in caught.value.message
    assert "--overwrite" in caught.value.hint
    assert states(out) == before


def test_another_source_is_refused_in_an_unfinished_output(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        start(checkpoint("llama"), progress=InterruptAt(1, when="inside"))
    before = states(tmp_path / "out")
    with pytest.raises(OutputError, match="the model's files differ"):
        start(checkpoint("llama", "float16"))
    assert states(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_changed_side_file_is_another_request(name: str, start: Start, own: Built, tmp_path: Path) -> None:
    source = own("llama")
    (source / "tokenizer.json").write_text("{}")
    start(source)
    (source / name).write_text((source / name).read_text() + " ")
    with pytest.raises(OutputError, match=f"the model's files differ, {re.escape(name)} first"):
        start(source)
    verdict = verify(str(tmp_path / "out"), model=str(source))
    assert [(d.where, d.what) for d in verdict.differences] == [
        (str(source / name), "not the file that the output was made from")
    ]
    start(source, overwrite=True)
    assert verify(str(tmp_path / "out"), model=str(source)).ok


def test_a_finished_output_with_a_missing_file_is_refused(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama"))
    (tmp_path / "out" / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"lora/adapter_model\.safetensors has since been changed or removed"):
        start(checkpoint("llama"))
    start(checkpoint("llama"), overwrite=True)
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").is_file()


def test_overwrite_removes_only_the_files_of_the_earlier_output(
    start: Start, checkpoint: Built, out: Path, tmp_path: Path
) -> None:
    (out / "lora" / "trained.txt").write_bytes(b"mine")
    (out / "runs").mkdir()
    (out / "runs" / "log").write_bytes(b"mine")
    single = tiny_models.as_single_file(checkpoint("llama"), tmp_path / "single")
    start(single, overwrite=True, rank=3)
    found = contents(out)
    assert found["lora/trained.txt"] == found["runs/log"] == b"mine"
    assert not any(name.startswith("model-") or name.endswith(".index.json") for name in found)
    assert read_manifest(out) is not None


def test_overwrite_of_an_unfinished_output_starts_again(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        start(checkpoint("llama"), progress=InterruptAt(1, when="inside"))
    count = ShardLog()
    start(checkpoint("llama"), rank=3, overwrite=True, progress=count)
    assert count.made == shards(checkpoint("llama"))
    assert not (tmp_path / "out" / WORK_FOLDER).exists()


def test_overwrite_removes_nothing_outside_the_output_whatever_its_manifest_lists(
    start: Start, checkpoint: Built, out: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    path = out / MANIFEST
    content = json.loads(path.read_text())
    for name in ("../mine", str(mine)):
        path.write_text(json.dumps(content | {"files": content["files"] | {name: 4}}))
        with pytest.raises(OutputError, match="is not a manifest that this version reads"):
            start(checkpoint("llama"), rank=3, overwrite=True)
    assert mine.read_bytes() == b"mine"


def test_a_refused_overwrite_deletes_nothing(start: Start, checkpoint: Built, out: Path) -> None:
    """transformers would load another model.safetensors instead of our index. The earlier output must be kept."""
    (out / "model.safetensors").write_bytes(b"mine")
    before = states(out)
    with pytest.raises(OutputError, match=r"already holds model\.safetensors"):
        start(checkpoint("llama"), rank=3, overwrite=True)
    assert states(out) == before


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b'{"format": 99}', b"\xff"])
def test_a_manifest_of_another_program_is_refused_and_kept(
    content: bytes, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_bytes(content)
    with pytest.raises(OutputError, match=rf"{MANIFEST} is not a manifest"):
        start(checkpoint("llama"), overwrite=True)
    assert contents(tmp_path / "out") == {MANIFEST: content}


@pytest.mark.parametrize("where", ["", "inside", "deep/inside"])
def test_an_output_at_or_inside_the_source_is_refused(where: str, start: Start, own: Built) -> None:
    source = own("llama")
    before = states(source)
    with pytest.raises(OutputError, match="the model's folder"):
        start(source, out=str(source / where))
    assert states(source) == before


def test_an_output_that_is_the_source_by_a_link_is_refused(start: Start, own: Built, tmp_path: Path) -> None:
    source = own("llama")
    before = states(source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="is the model's folder"):
        start(source, out=str(tmp_path / "link"), overwrite=True)
    assert states(source) == before


def test_an_output_that_is_a_file_or_below_one_is_refused(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for out in ("file", "file/out"):
        with pytest.raises(OutputError, match="file"):
            start(checkpoint("llama"), out=str(tmp_path / out))
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission_is_refused(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="no permission"):
        start(checkpoint("llama"), out=str(tmp_path / "closed" / "out"))


Usage = namedtuple("Usage", "total used free")


def test_a_disk_too_small_is_found_before_anything_is_written(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 40_000))
    with pytest.raises(OutputError, match=r"needs .* its disk has .* free"):
        start(checkpoint("llama"))
    assert contents(tmp_path) == {}
    assert not (tmp_path / "out").exists()


def test_an_overwrite_that_does_not_fit_on_the_disk_deletes_nothing(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(checkpoint("llama", "float16"))
    before = states(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 100))
    with pytest.raises(OutputError, match="needs"):
        start(checkpoint("llama", "float16"), dtype="float32", overwrite=True)
    assert states(tmp_path / "out") == before


def test_a_resumed_run_needs_space_only_for_the_rest(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama")
    planned = make_plan(InitOptions(model=str(source), out="out", rank=4), source)
    needed = planned.base_bytes + 2 * planned.adapter_bytes
    interrupt_after_two_shards(start, source, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed - 1))
    with pytest.raises(OutputError, match="needs"):
        start(source, out=str(tmp_path / "another"))
    assert start(source).files


class CallAfterFirstShard(Progress):
    """Calls `act` once, when the first shard is finished."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.acts = [act]

    def shard(self, *_: Any) -> None:
        if self.acts:
            self.acts.pop()()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "another milora-init is writing to .* at this moment"),
        ({"overwrite": True}, "another milora-init is writing to .* at this moment"),
        ({"overwrite": True, "rank": 3}, "another milora-init is writing to .* at this moment"),
        ({"rank": 3}, "the output of another request"),
    ],
)
def test_a_second_run_at_the_same_time_is_refused_and_does_not_disturb_the_first(
    options: dict[str, Any], message: str, start: Start, checkpoint: Built, finished: Built, tmp_path: Path
) -> None:
    def second() -> None:
        before = states(tmp_path / "out")
        with pytest.raises(OutputError, match=message) as caught:
            start(checkpoint("llama"), **options)
        refused.append(caught.value.hint)
        assert states(tmp_path / "out").keys() >= before.keys()

    refused: list[str] = []
    start(checkpoint("llama"), progress=CallAfterFirstShard(second))
    assert len(refused) == 1
    assert "--out" in refused[0]
    uninterrupted, out = contents(finished()), contents(tmp_path / "out")
    assert uninterrupted.keys() == out.keys()
    own = {MANIFEST, "lora/adapter_config.json"}  # the manifest holds times, and both hold the folder's path
    assert {n: c for n, c in out.items() if n not in own} == {n: c for n, c in uninterrupted.items() if n not in own}


def test_a_run_is_refused_if_another_one_wrote_between_its_check_and_its_lock(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run starts and ends between the check of the folder and the lock."""
    real = OutputFolder._take_lock

    def late(self: OutputFolder[Any]) -> None:
        monkeypatch.setattr(OutputFolder, "_take_lock", real)
        start(checkpoint("llama"), rank=3)
        before.update(states(tmp_path / "out"))
        real(self)

    before: dict[str, tuple[bytes, int]] = {}
    monkeypatch.setattr(OutputFolder, "_take_lock", late)
    with pytest.raises(OutputError, match="another milora-init"):
        start(checkpoint("llama"))
    shutil.rmtree(tmp_path / "out" / WORK_FOLDER)
    assert states(tmp_path / "out") == before


def test_a_lock_on_a_deleted_file_is_refused(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock file is deleted between open and flock: a third run may hold the lock on the new file."""

    def removed_meanwhile(file: int, _: int) -> None:
        (tmp_path / "out" / WORK_FOLDER / "lock").unlink()

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with pytest.raises(OutputError, match="another milora-init"):
        start(checkpoint("llama"))
    monkeypatch.undo()
    assert start(checkpoint("llama")).files


def test_a_run_that_cannot_write_its_journal_leaves_no_file_and_no_lock(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        start(checkpoint("llama"))
    assert contents(tmp_path) == {}
    monkeypatch.undo()
    assert start(checkpoint("llama")).files


def test_work_files_of_a_run_killed_after_its_manifest_are_removed(
    start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    made = start(checkpoint("llama"))
    adapter_parts = tmp_path / "out" / WORK_FOLDER
    adapter_parts.mkdir()
    (adapter_parts / "model-00001-of-00004.safetensors.adapter").write_bytes(b"half")
    before = contents(tmp_path / "out")
    with (tmp_path / "out" / WORK_FOLDER / "lock").open(
        "w"
    ) as lock:  # while another run holds the lock, nothing is removed
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert start(checkpoint("llama")) == made
        assert contents(tmp_path / "out").keys() > before.keys()
    assert start(checkpoint("llama")) == made
    assert not adapter_parts.exists()


@pytest.mark.parametrize(
    "name", [WORK_FOLDER, f"{WORK_FOLDER}/journal.jsonl", f"{WORK_FOLDER}/lock", f"{WORK_FOLDER}/source"]
)
@pytest.mark.parametrize("before", [False, True])
def test_a_link_instead_of_the_journal_is_refused_and_its_target_is_unchanged(
    name: str, before: bool, request: pytest.FixtureRequest, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    """`--overwrite` empties the journal's folder; through a link it would empty another folder."""
    out, home = tmp_path / "out", tmp_path / "home"
    if before:
        request.getfixturevalue("out")
    (home / "deep").mkdir(parents=True)
    (home / "notes.txt").write_bytes(b"mine")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).symlink_to(home)
    found = states(tmp_path)
    with pytest.raises(OutputError, match=f"{re.escape(name)} is a link") as caught:
        start(checkpoint("llama"), rank=3, overwrite=True)
    assert caught.value.hint
    assert states(tmp_path) == found


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_adapter_folder_that_is_a_link_out_is_neither_written_nor_cleared(
    overwrite: bool, start: Start, checkpoint: Built, out: Path, tmp_path: Path
) -> None:
    (out / "lora").rename(tmp_path / "elsewhere")
    (out / "lora").symlink_to(tmp_path / "elsewhere")
    before = states(tmp_path)
    with pytest.raises(OutputError, match=r"'lora/adapter_config\.json' leads out of"):
        start(checkpoint("llama"), overwrite=overwrite)
    assert states(tmp_path) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "lora/adapter_model.safetensors"])
def test_a_link_instead_of_an_unfinished_file_is_not_followed(
    name: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source, out, mine = checkpoint("llama"), tmp_path / "out", tmp_path / "mine"
    interrupt_after_two_shards(start, source, out)
    mine.write_bytes(b"mine")
    path = out / f"{name}.partial"
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(mine)
    start(source)
    assert mine.read_bytes() == b"mine"
    assert not any(path.is_symlink() for path in out.rglob("*"))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o666, *map(wide, (0o640, 0o444, 0o777))])
def test_a_copy_is_not_more_readable_than_its_source(mode: int, start: Start, own: Built, tmp_path: Path) -> None:
    source = own("llama")
    for path in source.iterdir():
        path.chmod(mode)
    umask = os.umask(0o022)
    try:
        start(source)
        merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    finally:
        os.umask(umask)
    for out in ("out", "merged"):
        copies = [tmp_path / out / path.name for path in source.iterdir() if path.name != "README.md"]
        assert {mode_of(path) for path in copies} == {mode & 0o644}, out


def test_side_files_count_in_the_needed_space(start: Start, own: Built, tmp_path: Path) -> None:
    source = own("llama")
    options = InitOptions(model=str(source), out="out", rank=4)
    before = make_plan(options, source).required_disk_bytes
    (source / "vocab.txt").write_bytes(bytes(100_000))
    assert make_plan(options, source).required_disk_bytes == before + 100_000


def test_a_large_side_file_is_copied_in_chunks(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(32 << 20))
    out: OutputFolder[Manifest] = OutputFolder(tmp_path / "out", MANIFEST, read_manifest)
    tracemalloc.start()
    out.write("big", read_chunks(tmp_path / "big"))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out" / "big").stat().st_size == 32 << 20
    assert peak_bytes < 8 << 20


@pytest.mark.parametrize("length", [wide(247), wide(248), 255])
def test_file_names_of_up_to_255_bytes_are_written_resumed_and_cleared(
    length: int, start: Start, own: Built, tmp_path: Path
) -> None:
    source = own("llama")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    long = {name: f"{name.removesuffix('.safetensors'):x<{length - 12}}.safetensors" for name in shards(source)}
    for name, longer in long.items():
        (source / name).rename(source / longer)
    index["weight_map"] = {tensor: long[name] for tensor, name in index["weight_map"].items()}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / ("é" * ((length - 4) // 2) + ".txt")).write_bytes(b"x")
    interrupt_after_two_shards(start, source, tmp_path / "out")
    count = ShardLog()
    made = start(source, progress=count)
    assert count.made == shards(source)[2:]
    assert made.files == {n: len(c) for n, c in contents(tmp_path / "out").items() if n != MANIFEST}
    unfinished = partial_of(tmp_path / "out" / shards(source)[0])
    assert len(unfinished.name.encode()) <= 255
    unfinished.write_bytes(b"half")
    start(source, rank=3, overwrite=True)
    assert not unfinished.exists()


def test_two_output_files_of_one_name_are_an_error_of_the_plan(
    checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "copied_side_files", lambda _: ["tokenizer.json", "lora/adapter_model.safetensors"])
    source = checkpoint("llama")
    with pytest.raises(PlanError, match=r"two files of the output would be lora/adapter_model\.safetensors"):
        make_plan(InitOptions(model=str(source), out="out", rank=4), source)


def test_a_clean_up_that_fails_does_not_hide_why_the_run_failed(
    start: Start, checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(OutputFolder, "_remove", no_more)
    with pytest.raises(InterruptedRunError):
        start(checkpoint("llama"), progress=InterruptAt(0, when="inside"))
    monkeypatch.undo()
    assert start(checkpoint("llama")).files  # the lock is gone too
