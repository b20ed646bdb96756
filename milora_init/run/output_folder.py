"""Own the output folder: lock, journal, resume, and the manifest as the last file."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.side_files import WEIGHT_SUFFIXES
from milora_init.checkpoint.writer import partial_of, sync_folder, writing
from milora_init.errors import OutputError
from milora_init.manifest import WORK_FOLDER
from milora_init.untrusted import path_inside, plain_file, relative_name

_LOCK = "lock"
_HASHES = 4  # at a time


class OutputPlan(Protocol):
    """What an output folder asks of a plan, be it of the main job or of a merge."""

    @property
    def source(self) -> Path:
        """The folder that is read."""

    @property
    def overwrite(self) -> bool:
        """Whether an earlier output may be replaced."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def files(self) -> Sequence[str]: ...
    @property
    def room_bytes(self) -> int:
        """What the run needs on the disk at its peak."""


class OutputRecord(Protocol):
    """What stands in a finished output as its record."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def files(self) -> Mapping[str, int]:
        """Bytes of each file but the record."""

    def to_json(self) -> dict[str, Any]: ...


F = TypeVar("F", bound=OutputRecord)


def require_outside(out: Path, folder: Path, instead: str) -> None:
    """Raise OutputError where an output would lie inside a folder that is read."""
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise OutputError(f"--out {out} lies inside {folder}", hint=f"write beside it: --out {instead}")


class OutputFolder(Generic[F]):
    """One output folder and its journal.

    Args:
        path: The folder.
        name: Of its record.
        read: Reads the record of a folder; None where there is none. Raises OutputError.
    """

    def __init__(self, path: Path, name: str, read: Callable[[Path], F | None]) -> None:
        self.path, self._name, self._read = path, name, read
        self.work = path / WORK_FOLDER
        self.journal = self.work / "journal.jsonl"
        self._lock: int | None = None

    def enter(self, plan: OutputPlan) -> F | None:
        """Make the folder ready for a plan, fresh or to be resumed; or find it carried out and return its record.

        Raises:
            OutputError: The folder holds something else, or cannot be written, or the disk is too small.
        """
        self._require_apart(plan.source)
        self._require_no_links(plan.files)
        record, journal = self._read(self.path), self._read_journal()
        ours: list[str] = []
        if (record or journal) and plan.overwrite:
            ours = list(record.files if record else journal[0]["files"])
        elif record:
            self._require_same(record.fingerprint, record.inputs, plan)
            self._require_whole(record)
            self._sweep()
            return record
        elif journal:
            self._require_same(journal[0]["fingerprint"], journal[0]["inputs"], plan)
        resuming = bool(journal) and not ours
        if not resuming:
            self._require_empty(plan, ours)
        self._require_room(plan, ours)
        # All that can be refused has been; from here on the folder is this run's.
        self._take_lock()
        if self._read_journal() != journal or self._read(self.path) != record:
            raise self._busy()
        if resuming:
            return None
        try:
            if ours:
                if record and not journal:
                    # Cut off while it is cleared, the folder must still be known as ours.
                    old = {"fingerprint": record.fingerprint, "inputs": record.inputs, "files": ours}
                    self.record(old)
                self._clear(ours)
            self.record({"fingerprint": plan.fingerprint, "inputs": plan.inputs, "files": list(plan.files)})
        except BaseException:
            self.abandon()
            raise
        return None

    def record(self, line: dict[str, Any]) -> None:
        """Append a line to the journal, safe on disk when this returns."""
        with writing(self.journal), self.journal.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a line that was cut off would swallow this one
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def record_shard(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Append the line of a finished shard with the SHA-256 of each of its files, and return it."""
        hashed = {**line, "hashes": {name: sha256(self.path / name) for name in line["files"]}}
        self.record(hashed)
        return hashed

    def done(self, elsewhere: Callable[[Mapping[str, str]], set[str]] | None = None) -> dict[str, dict[str, Any]]:
        """Journal lines of finished shards whose files still stand as they were made, by file name.

        `elsewhere` tells which of those that were pushed, by SHA-256, stand where they went.
        """
        lines = self._shard_lines()
        pushed = {name: line["pushed"] for name, line in lines.items() if "pushed" in line}
        there = elsewhere(pushed) if elsewhere else set()
        for name in pushed.keys() - there:  # to another repository, say: what stands here has to go there yet
            del lines[name]["pushed"]
        files = {(name, file) for name, line in lines.items() for file in line["files"]} - {(n, n) for n in there}
        with ThreadPoolExecutor(_HASHES, thread_name_prefix="hash") as pool:
            whole = dict(zip(files, pool.map(lambda pair: self._is_whole(lines[pair[0]], pair[1]), files), strict=True))
        return {
            name: line
            for name, line in lines.items()
            if all(whole.get((name, file), True) for file in line["files"])
        }  # fmt: skip

    def _is_whole(self, line: Mapping[str, Any], file: str) -> bool:
        """Whether a file of a finished shard has the bytes that it was made with."""
        path, size_bytes = self._place(file), line["files"][file]
        if not path.is_file() or path.stat().st_size != size_bytes:
            return False
        return bool(sha256(path) == line.get("hashes", {}).get(file))

    def abandon(self) -> None:
        """Remove what a run left that recorded no shard; an empty folder goes with it.

        Why the run failed is what has to be told: what fails here stands, and the same command takes it up.
        """
        with suppress(OSError, OutputError):
            lines = self._read_journal()
            if len(lines) <= 1:
                # Other devices may have finished shards since the failure; without a line they would look foreign.
                self._clear(lines[0]["files"] if lines else ())
                shutil.rmtree(self.work, ignore_errors=True)
                if self.path.is_dir() and not any(self.path.iterdir()):
                    self.path.rmdir()
        with suppress(OSError):
            self._release_lock()

    def write(self, name: str, content: bytes | Iterable[bytes], *, mode: int = 0o666) -> None:
        """Write a file whole: under another name first, then renamed. `mode` is what the umask is applied to."""
        path = self._place(name)
        partial = partial_of(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # not written into: it may be a link
            try:
                with open(partial, "xb", opener=lambda path, flags: os.open(path, flags, mode)) as file:
                    for chunk in [content] if isinstance(content, bytes) else content:
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)

    def finish(self, record: F) -> None:
        """Write the record: from here on the output is whole."""
        try:
            self.write(self._name, (json.dumps(record.to_json(), indent=1) + "\n").encode())
            shutil.rmtree(self.work, ignore_errors=True)
        finally:
            self._release_lock()

    def discard(self, files: Iterable[str]) -> None:
        """Remove an output that has gone elsewhere as a whole, and its journal; an empty folder goes with it."""
        try:
            self._clear(files)
            shutil.rmtree(self.work, ignore_errors=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        finally:
            self._release_lock()

    def _sweep(self) -> None:
        """Remove what a run left that was cut off behind its manifest, unless it is still at it."""
        if self.work.is_dir():
            with suppress(OutputError):
                self._take_lock()
                shutil.rmtree(self.work, ignore_errors=True)
                self._release_lock()

    def _take_lock(self) -> None:
        with writing(self.path):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended meanwhile took its lock file with it, and who comes next locks another one.
            mine = os.path.samestat(os.fstat(self._lock), (self.work / _LOCK).stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError as error:
            self._release_lock()
            raise OutputError(
                f"{self.path} cannot be locked against a second run: {error.strerror}",
                hint="choose an --out on a file system with locks, such as a local disk",
            ) from error
        if not mine:
            raise self._busy()

    def _release_lock(self) -> None:
        if self._lock is not None:
            fileno, self._lock = self._lock, None
            os.close(fileno)

    def _busy(self) -> OutputError:
        self._release_lock()
        hint = "wait for it, or choose another --out"
        return OutputError(f"another milora-init is writing to {self.path} at this moment", hint=hint)

    def _shard_lines(self) -> dict[str, dict[str, Any]]:
        """The last line of each shard in the journal."""
        return {line["shard"]: line for line in self._read_journal()[1:]}

    def _read_journal(self) -> list[dict[str, Any]]:
        try:
            content = plain_file(self.journal).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise OutputError(f"{self.journal}: {error.strerror}") from error
        try:
            # What stands behind the last newline was cut off while it was written: it was never done.
            journal = [dict(json.loads(line)) for line in content.decode().split("\n")[:-1]]
            for number, line in enumerate(journal):
                for name in (line["shard"], *dict.keys(line["files"])) if number else line["files"]:
                    relative_name(name)
                dict.keys(line.get("hashes", {}))
            kinds = ({"fingerprint", "inputs", "files"}, {"shard", "files", "records"})
            if all(kinds[number > 0] <= line.keys() for number, line in enumerate(journal)):
                return journal
        except (ValueError, TypeError, KeyError):
            pass
        raise OutputError(f"{self.journal} is damaged", hint=f"choose another --out, or remove {self.path}")

    def _require_apart(self, source: Path) -> None:
        out, model = self.path.resolve(), source.resolve()
        if out == model or model in out.parents:
            where = "is the model's folder" if out == model else "lies inside the model's folder"
            raise OutputError(f"--out {self.path} {where}", hint="write beside it: --out ./svd_init")
        if self.path.is_symlink() and not self.path.exists():
            hint = "make that folder, or name another"
            raise OutputError(f"--out {self.path} is a link to what is not there", hint=hint)
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"--out {self.path} is a file", hint="name a folder")

    def _require_no_links(self, names: Iterable[str]) -> None:
        """Raise OutputError where a name of ours is a link out of the folder: what is behind it is not ours."""
        for place, folders, files in os.walk(self.work):
            for path in (Path(place), *(Path(place, name) for name in (*folders, *files))):
                if path.is_symlink():
                    raise OutputError(f"{path} is a link", hint="remove it, or choose another --out")
        for name in (*names, self._name):
            self._place(name)

    def _place(self, name: str) -> Path:
        """The path of a file of the output."""
        try:
            return path_inside(self.path, name)
        except ValueError as error:
            raise OutputError(f"--out {self.path}: {error}", hint="remove the link, or choose another --out") from error

    def _require_same(self, fingerprint: str, before: Mapping[str, Any], plan: OutputPlan) -> None:
        if fingerprint == plan.fingerprint:
            return
        changed = [key for key, value in plan.inputs.items() if before.get(key) != value]
        what = "; ".join(_difference(key, before.get(key), plan.inputs[key]) for key in changed)
        raise OutputError(
            f"{self.path} holds the output of another request: {what}",
            hint="choose another --out, or replace it with --overwrite",
        )

    def _require_whole(self, record: OutputRecord) -> None:
        for name, size in record.files.items():
            path = self._place(name)
            if not path.is_file() or path.stat().st_size != size:
                raise OutputError(
                    f"{self.path} was finished, but {name} has since been changed or removed",
                    hint="make it again with --overwrite",
                )

    def _require_empty(self, plan: OutputPlan, ours: Iterable[str] = ()) -> None:
        if not self.path.is_dir():
            return
        planned = {Path(name).parts[0] for name in (*plan.files, self._name)}
        known = {Path(name).parts[0] for name in (*ours, self._name)} if ours else set()
        known |= {partial_of(Path(name)).name for name in known}
        for path in sorted(self.path.iterdir()):
            if path.name in known:
                continue
            if path.name in planned or (path.is_file() and path.suffix.lower() in WEIGHT_SUFFIXES):
                raise OutputError(
                    f"{self.path} already holds {path.name}, which is not an output of milora-init",
                    hint="choose another --out, or move it away",
                )

    def _require_room(self, plan: OutputPlan, ours: Iterable[str] = ()) -> None:
        parent = self.path.absolute()
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"--out {self.path} cannot be written: no permission in {parent}")
        needed = plan.room_bytes
        standing = ours or [name for line in self._shard_lines().values() for name in line["files"]]
        needed -= sum(path.stat().st_size for path in map(self._place, standing) if path.is_file())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OutputError(
                f"--out {self.path} needs {needed / 1e6:,.0f} MB, its disk has {free / 1e6:,.0f} MB free",
                hint="free some space, or choose an --out on another disk",
            )

    def _clear(self, files: Iterable[str]) -> None:
        # The marks of a finished output go first: cut off here, the folder is nobody's model.
        (self.path / self._name).unlink(missing_ok=True)
        (self.path / "config.json").unlink(missing_ok=True)
        inside = [self._place(name) for name in files]
        for path in inside:
            path.unlink(missing_ok=True)
            partial_of(path).unlink(missing_ok=True)
        folders = {self.path / parent for name in files for parent in Path(name).parents} - {self.path}
        for folder in sorted(folders, reverse=True):  # the deeper ones first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        # The journal goes last: as long as anything of ours stands, it says whose it is.
        shutil.rmtree(self.work / "source", ignore_errors=True)
        for path in sorted(self.work.iterdir(), key=self.journal.__eq__) if self.work.is_dir() else ():
            if path.name != _LOCK:
                path.unlink()


def _difference(key: str, before: Any, now: Any) -> str:
    if key not in ("source", "side_files"):
        return f"{key} was {_short(before)}, now {_short(now)}"
    if isinstance(before, dict) and isinstance(now, dict):
        first = min(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        return f"the source's files differ, {first} first"
    return "the source's files differ"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
