"""A full disk, a source that changes during the run or cannot be read: a clear error, and the run can be resumed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import fork_server
from support.interruptions import shards
from support.marks import wide
from support.tiny_models import contents

from milora_init.cli.main import run
from milora_init.errors import CheckpointError, MiloraError, OutputError
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import make_plan
from milora_init.run.initialize import run_plan
from milora_init.run.journal import Entry, Head, Journal
from milora_init.run.progress import Progress

Built = Callable[..., Path]
Start = Callable[..., Manifest]

pytestmark = pytest.mark.usefixtures("file_by_file")
Damage = Callable[[Path], None]


def weights(out: Path) -> dict[str, bytes]:
    """All files except the two that hold times or the folder's path."""
    own = (MANIFEST, "lora/adapter_config.json")
    return {name: content for name, content in contents(out).items() if name not in own}


def require_unfinished(out: Path) -> None:
    left = contents(out) if out.exists() else {}
    assert not left.keys() & {MANIFEST, "config.json", "model.safetensors.index.json"}
    assert not [name for name in left if name.endswith(".partial")]


CLONE_NEWNS, CLONE_NEWUSER, NO_MOUNT = 0x20000, 0x10000000, 77


def run_on_a_disk_that_is_full_once(disk: Path, *words: str) -> None:
    """Run on a small tmpfs that only this process sees, full after the first file; then again with space; and copy."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWNS | CLONE_NEWUSER):
        sys.exit(NO_MOUNT)
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(content)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        sys.exit(NO_MOUNT)
    whole = Journal.append

    def append(self: Journal, line: Head | Entry) -> None:
        whole(self, line)
        if isinstance(line, Entry) and not (disk / "filler").exists():
            with (disk / "filler").open("wb", buffering=0) as filler:
                try:
                    while filler.write(bytes(512)):
                        pass
                except OSError as error:
                    print(f"full: {error.strerror}", flush=True)

    arguments = [*words, "-o", str(disk / "out")]
    Journal.append = append  # type: ignore[method-assign]
    print("status", run(arguments))
    print("left", *sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file()))
    (disk / "filler").unlink()
    Journal.append = whole  # type: ignore[method-assign]
    print("status", run(arguments))
    shutil.copytree(disk / "out", disk.with_name("copy"))


def test_a_full_disk_is_an_error_and_the_run_is_resumed_once_there_is_space(
    checkpoint: Built, finished: Built, tmp_path: Path
) -> None:
    """A real ENOSPC: a small tmpfs in the mount namespace of the tested process."""
    source, disk = checkpoint("llama"), tmp_path / "disk"
    disk.mkdir()
    done = fork_server.run(run_on_a_disk_that_is_full_once, disk, "-m", str(source), "-r", "4", "--device", "cpu", "-q")
    if done.returncode == NO_MOUNT:
        pytest.skip("this platform does not allow a private mount")
    assert done.returncode == 0, done.stderr
    full, first, left, second = done.stdout.splitlines()
    assert full == f"full: {os.strerror(errno.ENOSPC)}"
    assert (first, second) == ("status 1", "status 0")
    assert f"{os.strerror(errno.ENOSPC)}\n\nhint: free some space" in done.stderr
    assert f"out/{shards(source)[0]}" in left.split()
    assert not [n for n in left.split() if n.endswith((".partial", MANIFEST, "/config.json", ".index.json"))]
    assert weights(tmp_path / "copy") == weights(finished())


def milora_with_small_files(largest_bytes: int, *arguments: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, resource.RLIM_INFINITY))
    fork_server.command_line(*arguments)


def test_a_file_size_limit_is_an_error_and_the_run_is_resumed(
    start: Start, checkpoint: Built, finished: Built, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write; this needs no mount."""
    source, out = checkpoint("llama"), tmp_path / "out"
    largest = max((source / name).stat().st_size for name in shards(source))
    command = ["-m", str(source), "-o", str(out), "-r", "4", "-q", "--device", "cpu"]
    done = fork_server.run(milora_with_small_files, largest - 1, *command)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {out}/")
    assert f"{os.strerror(errno.EFBIG)}\n\nhint: free some space, or choose another --out\n" in done.stderr
    require_unfinished(out)
    start(source)
    assert weights(out) == weights(finished())


def rewrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copyfile(path, other)
    rewrite(other)
    other.replace(path)


DAMAGES: list[Damage] = [
    rewrite,
    replace,
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: os.truncate(path, 3),
    lambda path: path.unlink(),
]
NAMES = ["rewritten", "replaced", "truncated to half", "truncated to 3 bytes", "removed"]


class CallAfterFirstTensor(Progress):
    """Calls `act` after the first tensor of the run, while files are open."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.acts = [act]

    def tensor(self, name: str, size_bytes: int) -> None:
        if self.acts:
            self.acts.pop()()


class CallAfterFirstShard(CallAfterFirstTensor):
    """Calls `act` when the first file of the output is finished."""

    def tensor(self, name: str, size_bytes: int) -> None: ...

    def shard(self, *_: Any) -> None:
        super().tensor("", 0)


@pytest.mark.parametrize("damage", DAMAGES, ids=NAMES)
@pytest.mark.parametrize("at", [0, 2])
def test_a_shard_that_changes_between_the_plan_and_the_run_is_named(
    at: int, damage: Damage, own: Built, tmp_path: Path
) -> None:
    source = own("llama")
    shard = source / shards(source)[at]
    plan = make_plan(InitOptions(model=str(source), out=str(tmp_path / "out"), rank=4, device=("cpu",)), source)
    damage(shard)
    with pytest.raises(CheckpointError) as caught:
        run_plan(plan)
    assert str(shard) in caught.value.message
    require_unfinished(tmp_path / "out")


@pytest.mark.parametrize("damage", DAMAGES, ids=NAMES)
@pytest.mark.parametrize(
    ("when", "at"), [(CallAfterFirstTensor, 0), (CallAfterFirstShard, 1), wide(CallAfterFirstShard, 3)]
)
def test_a_shard_that_changes_during_the_run_is_named_and_the_run_is_resumed_once_it_is_restored(
    when: Callable[..., Progress], at: int, damage: Damage, own: Built, start: Start, finished: Built, tmp_path: Path
) -> None:
    source = own("llama")
    shard = source / shards(source)[at]
    content = shard.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        start(source, progress=when(lambda: damage(shard)))
    assert str(shard) in caught.value.message
    require_unfinished(tmp_path / "out")
    assert (tmp_path / "out" / WORK_FOLDER).exists() == (when is CallAfterFirstShard)
    shard.write_bytes(content)
    start(source)
    assert weights(tmp_path / "out") == weights(finished())


def test_a_side_file_deleted_during_the_run_is_named(own: Built, start: Start, tmp_path: Path) -> None:
    source = own("llama")
    with pytest.raises(CheckpointError, match=str(source / "LICENSE")):
        start(source, progress=CallAfterFirstShard((source / "LICENSE").unlink))
    require_unfinished(tmp_path / "out")


def failing(real: Callable[..., Any], after: int) -> Callable[..., Any]:
    """A system call that raises EIO after `after` successful calls."""
    left = [after]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    return call


@pytest.mark.parametrize("after", [wide(0), 1, wide(3)])
@pytest.mark.parametrize("calls", [("preadv",), ("copy_file_range", "pread")], ids=["adapted", "copied"])
def test_a_read_error_of_the_disk_names_the_file_and_the_tensor(
    calls: tuple[str, ...],
    after: int,
    start: Start,
    checkpoint: Built,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint("llama")
    for name in calls:
        monkeypatch.setattr(os, name, failing(getattr(os, name), after))
    with pytest.raises(MiloraError) as caught:
        start(source)
    assert isinstance(caught.value, CheckpointError), caught.value
    assert os.strerror(errno.EIO) in caught.value.message
    assert any(str(source / name) in caught.value.message for name in shards(source))
    assert ".weight" in caught.value.message
    require_unfinished(tmp_path / "out")
    monkeypatch.undo()
    assert start(source).files


def test_a_write_error_is_not_reported_as_a_read_error(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("copy_file_range", "pwrite"):
        monkeypatch.setattr(os, name, failing(getattr(os, name), 9))
    with pytest.raises(OutputError, match=rf"cannot write {tmp_path}.*{os.strerror(errno.EIO)}"):
        start(checkpoint("llama"))
    require_unfinished(tmp_path / "out")


def test_a_file_system_without_locks_is_refused(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OutputError, match="cannot be locked against a second run") as error:
        start(checkpoint("llama"))
    assert "local disk" in error.value.hint
    require_unfinished(tmp_path / "out")


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.ENOSPC, "free some space, or choose another --out"),
        (errno.EDQUOT, "quota, or choose another --out"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permissions"),
    ],
)
def test_each_write_error_has_its_own_hint(
    number: int, part: str, start: Start, checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OutputError, match=os.strerror(number)) as caught:
        start(checkpoint("llama"))
    assert part in caught.value.hint
    assert ("free some" in caught.value.hint) == (number in (errno.ENOSPC, errno.EDQUOT))
