"""The output folder of a run or a merge: its locks, its journals, and its record as the last file.

A finished output has a record, such as milora_init.json. An unfinished one has a journal in its work folder, and is
resumed from it. Files of anybody else are never changed or removed.

A run has the folder's lock for itself. Parts of a run (`--part I/N`) share it, in processes on one or many machines:
each has a lock and a journal of its own, and the run that finishes the output reads the journals of all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from milora_init.checkpoint.side_files import would_be_loaded
from milora_init.checkpoint.writer import partial_of, sync_folder, writing
from milora_init.errors import OutputError
from milora_init.manifest import PART_PREFIX, WORK_FOLDER, WeightRecord, file_of_part
from milora_init.plan.finished import another_request, require_intact
from milora_init.records import RECORDS
from milora_init.run.journal import Entry, Head, Journal
from milora_init.run.pool import FilePool
from milora_init.run.progress import ShardResult
from milora_init.untrusted import path_inside

_LOCK = "lock"
_JOURNAL = "journal.jsonl"


class OutputPlan(Protocol):
    """The part of a plan, for a run or a merge, that an output folder needs."""

    @property
    def source(self) -> Path:
        """The folder that is read."""

    @property
    def overwrite(self) -> bool:
        """Whether an earlier output may be replaced."""

    @property
    def fingerprint(self) -> str:
        """Hash of `inputs`."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """All that determines the output's bytes."""

    @property
    def files(self) -> Sequence[str]:
        """Every file of the output except its record, by the path relative to the folder."""

    @property
    def required_disk_bytes(self) -> int:
        """How much disk space the run needs at its peak."""


class OutputRecord(Protocol):
    """The record of a finished output."""

    @property
    def fingerprint(self) -> str:
        """Hash of `inputs`."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """All that determined the output's bytes."""

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of each file except the record."""


Record = TypeVar("Record", bound=OutputRecord)
# What a run finds: nothing of its own; an output to resume, to replace (--overwrite), or that it need not make again.
FolderState = Literal["new", "unfinished", "replaced", "finished"]


def require_outside(out: Path, folder: Path, instead: str) -> None:
    """Raise OutputError where an output would be inside a folder that is read."""
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        where = "is the folder of what is read" if out.resolve() == folder.resolve() else f"lies inside {folder}"
        raise OutputError(f"--out {out} {where}", hint=f"write beside it: --out {instead}")


def require_no_file(out: Path) -> None:
    """Raise OutputError where an output's path is a file, or a link that leads nowhere."""
    if out.is_symlink() and not out.exists():
        raise OutputError(f"--out {out} is a link to what is not there", hint="make that folder, or name another")
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file", hint="name a folder")


def require_writable(out: Path) -> Path:
    """The folder, or the nearest existing one above it. Raises OutputError without permission to write there."""
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
        why = f"{parent} is on a read-only file system" if read_only else f"no permission in {parent}"
        raise OutputError(f"--out {out} cannot be written: {why}", hint="choose another --out")
    return parent


def require_no_other_output(out: Path, own_record: str) -> None:
    """Raise OutputError where a folder holds an output of another command."""
    for name in RECORDS:
        if name != own_record and (out / name).exists():
            raise OutputError(f"--out {out} holds another output of milora-init: {name}", hint="choose another --out")


class OutputFolder(Generic[Record]):
    """One output folder.

    `prepare` comes first. The run then ends with `finish`, `discard`, `leave` or `abandon`, which release the locks.

    Args:
        path: The folder.
        record_name: The file name of its record.
        read_record: Reads the record of a folder; None where there is none. Raises OutputError.
        part: Number and count of the part that this process makes; None for the whole output.
    """

    def __init__(
        self,
        path: Path,
        record_name: str,
        read_record: Callable[[Path], Record | None],
        part: tuple[int, int] | None = None,
    ) -> None:
        self.path, self._record_name, self._read_record = path, record_name, read_record
        self.work = path / WORK_FOLDER
        self.journal = Journal(self.work / _JOURNAL, out=path)  # of the whole output; its head says what that is
        self._part = part
        self._own = self.journal if part is None else Journal(self.work / file_of_part(part, _JOURNAL), out=path)
        self.attempts = self.work / ("attempts" if part is None else file_of_part(part, "attempts"))
        self._locks: list[int] = []
        self._has_part = False  # whether the part is locked by this object

    def look(self, plan: OutputPlan) -> FolderState:
        """What a run of the plan would find. Nothing is written, and no lock is taken. Raises as `prepare`."""
        state, *_ = self._look(plan)
        return state

    def _look(
        self, plan: OutputPlan
    ) -> tuple[FolderState, Record | None, tuple[Head | None, tuple[Entry, ...]], list[str]]:
        """The state, the record, the content of the journal, and the files of an earlier output that is replaced."""
        self._require_outside_source(plan.source)
        self._require_no_links(plan.files)
        record, journal = self._read_record(self.path), self.journal.read()
        head, _ = journal
        state: FolderState = "new"
        earlier_files: list[str] = []
        if (record or head) and plan.overwrite:
            state, earlier_files = "replaced", list(record.files if record else head.files if head else ())
        elif record:
            self._require_finished(plan, record)
            return "finished", record, journal, []
        elif head:
            self._require_same_request(head.fingerprint, head.inputs, plan)
            state = "unfinished"
        if state != "unfinished":
            self._require_no_foreign_files(plan, earlier_files)
        self._require_disk_space(plan, earlier_files)
        return state, record, journal, earlier_files

    def prepare(self, plan: OutputPlan) -> Record | None:
        """Lock the folder for a plan, which starts or is resumed. If the plan was finished before, return its record.

        Raises:
            OutputError: The folder holds something else, or cannot be written, or the disk is too small.
        """
        state, record, journal, earlier_files = self._look(plan)
        if state == "finished":
            self._remove_leftover_work_folder()
            return record
        if self._part is not None:
            return self._prepare_part(plan)
        head, _ = journal
        # Every check that may refuse is done; from here on the folder belongs to this run.
        self._take_lock()
        if self.journal.read() != journal or self._read_record(self.path) != record:
            raise self._release_busy()
        for attempts in self.work.glob(f"*{self.attempts.name}"):  # of runs and parts that were killed
            shutil.rmtree(attempts, ignore_errors=True)
        if state == "unfinished":
            return None
        try:
            if earlier_files:
                if record and not head:
                    # If the removal is interrupted, the journal shows that the rest of the files are ours.
                    self.journal.append(Head(record.fingerprint, record.inputs, tuple(earlier_files)))
                self._remove(earlier_files)
            self.journal.append(Head(plan.fingerprint, plan.inputs, tuple(plan.files)))
        except BaseException:
            self.abandon()
            raise
        return None

    def _prepare_part(self, plan: OutputPlan) -> Record | None:
        """Lock this part of the folder; see `prepare`. The first part writes the head of the folder's journal."""
        assert self._part is not None
        try:
            self._take_lock(_LOCK, shared=True)
            with self._alone():
                self._take_part_lock(*self._part)
                if record := self._read_record(self.path):
                    self._release_lock()
                    self._require_finished(plan, record)
                    self._remove_leftover_work_folder()
                    return record
                head, _ = self.journal.read()
                if head:
                    self._require_same_request(head.fingerprint, head.inputs, plan)
                else:
                    self.journal.append(Head(plan.fingerprint, plan.inputs, tuple(plan.files)))
            shutil.rmtree(self.attempts, ignore_errors=True)
            if self._own.read()[0] is None:
                self._own.append(Head(plan.fingerprint, plan.inputs, tuple(plan.files)))
        except BaseException:
            self.abandon()
            raise
        return None

    def _require_finished(self, plan: OutputPlan, record: Record) -> None:
        """Raise OutputError unless the record is of this request and its files are there."""
        self._require_same_request(record.fingerprint, record.inputs, plan)
        require_intact(self.path, record.files, may_replace=self._part is None)

    def _take_part_lock(self, number: int, count: int) -> None:
        """Lock this part. Raises OutputError while it is made elsewhere, or while parts of another count are made.

        Those would make the same files.
        """
        own = f"{_LOCK}.parts-of-{count}"
        for path in self.work.glob(f"{_LOCK}.parts-of-*"):
            if path.name != own:
                other = path.name.rpartition("-")[2]
                busy = f"parts I/{other} of {self.path} are being made; parts I/{count} would make the same files"
                self._take_lock(path.name, busy=busy)
                os.close(self._locks.pop())
        self._take_lock(own, shared=True)
        busy = f"part {number}/{count} of {self.path} is being made by another process"
        self._take_lock(file_of_part((number, count), _LOCK), busy=busy)
        self._has_part = True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other part is here at the same time; one waits for the other."""
        with writing(self.path), (self.work / f"{_LOCK}.head").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def entries(self) -> dict[str, Entry]:
        """The last entry of each shard in the journals of this run and of all parts, by the shard's name."""
        return {name: entry for journal in self._journals() for name, entry in journal.shards().items()}

    def _journals(self) -> list[Journal]:
        """The journal of the output, then those of the parts. Raises OutputError for one of another request."""
        paths = sorted(self.work.glob(f"{PART_PREFIX}*.{_JOURNAL}"))
        head, _ = self.journal.read()
        journals = [Journal(path, out=self.path) for path in paths]
        for journal in journals:
            found, _ = journal.read()
            if found is not None and (head is None or found.fingerprint != head.fingerprint):
                hint = f"choose another --out, or remove {self.path}"
                raise OutputError(f"{journal.path} belongs to another request", hint=hint)
        return [self.journal, *journals]

    def leave(self) -> None:
        """End a part: its files stay for the run that finishes the output."""
        with suppress(OSError):
            if self._has_part:
                shutil.rmtree(self.attempts, ignore_errors=True)
            self._has_part = False
            self._release_lock()

    def attempt(self) -> Path:
        """The folder for an attempt at one shard, which nobody else uses; it is not created here."""
        return self.attempts / uuid.uuid4().hex

    def commit(self, result: ShardResult[WeightRecord | None]) -> Entry:
        """Give the files of a finished shard their final names and append its entry to the journal; return the entry.

        Only the process that holds the lock of the folder calls this, and only for an attempt that it has waited for.
        """
        made = self.attempts / result.attempt
        paths = [self._path_of(name) for name in result.files if not (result.uploaded and name == result.shard)]
        for path in paths:
            with writing(path):
                (made / path.name).replace(path)
        with writing(made):
            made.rmdir()
        for folder in {path.parent for path in paths}:
            with writing(folder):
                sync_folder(folder)
        pushed = result.hashes[result.shard] if result.uploaded else None
        records = tuple(record for record in result.records if record)
        entry = Entry(result.shard, result.files, records, result.hashes, pushed)
        self._own.append(entry)
        return entry

    def remove_pushed(self, entry: Entry) -> Entry:
        """Record that a shard was uploaded, and remove it from the disk; return its new entry."""
        pushed = replace(entry, pushed=entry.hashes[entry.shard])
        self._own.append(pushed)
        self._path_of(entry.shard).unlink()
        return pushed

    def finished_shards(
        self,
        files: FilePool,
        uploaded: Callable[[Mapping[str, tuple[int, str]]], set[str]] | None = None,
        *,
        among: Container[str] | None = None,
    ) -> dict[str, Entry]:
        """The journal's entries of shards whose files still have the recorded bytes, by the shard's name.

        Args:
            files: Hashes the files.
            uploaded: Given size and SHA-256 of shards that were uploaded, returns the names of those that are still
                where this run uploads to. None if all shards are to be on the disk.
            among: Look at these shards only; None for all.
        """
        entries = {name: entry for name, entry in self.entries().items() if among is None or name in among}
        pushed = {name: (e.files.get(name, 0), e.pushed) for name, e in entries.items() if e.pushed is not None}
        elsewhere = uploaded(pushed) if uploaded else set()
        for name in pushed.keys() - elsewhere:  # uploaded to another repository, for example
            entries[name] = replace(entries[name], pushed=None)
        hashes = {
            name: {
                file: self._start_hash(files, file, size_bytes)
                for file, size_bytes in entry.files.items()
                if not (file == name and name in elsewhere)  # no longer on the disk; its part of the adapter is
            }
            for name, entry in entries.items()
        }
        return {
            name: entry
            for name, entry in entries.items()
            if all(
                found is not None and found.result() == entry.hashes.get(file) for file, found in hashes[name].items()
            )
        }

    def abandon(self) -> None:
        """End a run that failed. If it has recorded no shard, remove its files, and the folder if it is empty then.

        Errors in here are suppressed: the one that ended the run is the one to report. Files that could not be removed
        are removed or resumed by the next run.
        """
        with suppress(OSError, OutputError):
            if self._part is not None:
                self.leave()
                self._take_lock()  # or another part is at work
            head, _ = self.journal.read()
            if not self.entries():
                # Other threads may have finished shards after the failure. Without an entry they would look foreign.
                self._remove(head.files if head else ())
                shutil.rmtree(self.work, ignore_errors=True)
                if self.path.is_dir() and not any(self.path.iterdir()):
                    self.path.rmdir()
        with suppress(OSError):
            self._release_lock()

    def write(self, name: str, content: bytes | Iterable[bytes], *, mode: int = 0o666) -> None:
        """Write a whole file: under a partial name first, then renamed. `mode` is its permissions before the umask."""
        path = self._path_of(name)
        partial = partial_of(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # it may be a link: nothing is written through it
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

    def finish(self, content: Mapping[str, Any]) -> None:
        """Write the record's content: the output is finished. Then remove the work folder."""
        try:
            self.write(self._record_name, (json.dumps(content, indent=1) + "\n").encode())
            shutil.rmtree(self.work, ignore_errors=True)
        finally:
            self._release_lock()

    def discard(self, files: Iterable[str]) -> None:
        """Remove an output that was uploaded as a whole, and its journal, and the folder if it is empty then."""
        try:
            self._remove(files)
            shutil.rmtree(self.work, ignore_errors=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        finally:
            self._release_lock()

    def _start_hash(self, files: FilePool, file: str, size_bytes: int) -> Future[str] | None:
        """The SHA-256 of a file, None where there is no such file of that size."""
        path = self._path_of(file)
        if not path.is_file() or path.stat().st_size != size_bytes:
            return None
        return files.sha256(path)

    def _remove_leftover_work_folder(self) -> None:
        """Remove the work folder of a run that was killed after it wrote the record, unless it still runs."""
        if self.work.is_dir():
            with suppress(OutputError):
                self._take_lock()
                shutil.rmtree(self.work, ignore_errors=True)
                self._release_lock()

    def _take_lock(self, name: str = _LOCK, *, shared: bool = False, busy: str = "") -> None:
        """Lock a file of the work folder. Raises OutputError, with the message `busy`, if another process has it."""
        with writing(self.path):
            self.work.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.work / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._locks.append(lock)
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # A run that ended meanwhile has removed this lock file, and the next run locks a new one.
            locked = os.path.samestat(os.fstat(lock), (self.work / name).stat())
        except (BlockingIOError, FileNotFoundError):
            locked = False
        except OSError as error:
            self._release_lock()
            raise OutputError(
                f"{self.path} cannot be locked against a second run: {error.strerror}",
                hint="choose an --out on a file system with locks, such as a local disk",
            ) from error
        if not locked:
            raise self._release_busy(busy)

    def _release_lock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def _release_busy(self, busy: str = "") -> OutputError:
        """Release the locks; return the error for a folder that another run uses."""
        self._release_lock()
        hint = "wait for it, or choose another --out"
        return OutputError(busy or f"another milora-init is writing to {self.path} at this moment", hint=hint)

    def _require_outside_source(self, source: Path) -> None:
        out, model = self.path.resolve(), source.resolve()
        if out == model or model in out.parents:
            where = "is the model's folder" if out == model else "lies inside the model's folder"
            raise OutputError(f"--out {self.path} {where}", hint="write beside it: --out ./svd_init")
        require_no_file(self.path)

    def _require_no_links(self, names: Iterable[str]) -> None:
        """Raise OutputError where one of our names is a link that leads out of the folder."""
        below = (Path(folder, name) for folder, *names_in in os.walk(self.work) for name in chain(*names_in))
        for path in chain([self.work], below):
            if path.is_symlink():
                raise OutputError(f"{path} is a link", hint="remove it, or choose another --out")
        for name in (*names, self._record_name):
            self._path_of(name)

    def _path_of(self, name: str) -> Path:
        """The path of a file of the output. Raises OutputError for a name that leads out of the folder."""
        try:
            return path_inside(self.path, name)
        except ValueError as error:
            raise OutputError(f"--out {self.path}: {error}", hint="remove the link, or choose another --out") from error

    def _require_same_request(self, fingerprint: str, inputs: Mapping[str, Any], plan: OutputPlan) -> None:
        if fingerprint != plan.fingerprint:
            raise another_request(self.path, inputs, plan.inputs, may_replace=self._part is None)

    def _require_no_foreign_files(self, plan: OutputPlan, earlier_files: Iterable[str]) -> None:
        """Raise OutputError for a file that is not ours and that the output would replace, or be loaded with."""
        if not self.path.is_dir():
            return
        require_no_other_output(self.path, self._record_name)
        planned = {Path(name).parts[0] for name in (*plan.files, self._record_name)}
        ours = {Path(name).parts[0] for name in (*earlier_files, self._record_name)} if earlier_files else set()
        ours |= {partial_of(Path(name)).name for name in ours}
        for path in sorted(self.path.iterdir()):
            if path.name in ours:
                continue
            if path.name in planned or (path.is_file() and would_be_loaded(path.name)):
                raise OutputError(
                    f"{self.path} already holds {path.name}, which is not an output of milora-init",
                    hint="choose another --out, or move it away",
                )

    def _require_disk_space(self, plan: OutputPlan, earlier_files: Iterable[str]) -> None:
        parent = require_writable(self.path)
        existing = earlier_files or [name for entry in self.entries().values() for name in entry.files]
        existing_bytes = sum(path.stat().st_size for path in map(self._path_of, existing) if path.is_file())
        needed = plan.required_disk_bytes - existing_bytes
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OutputError(
                f"--out {self.path} needs {needed / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB free",
                hint="free some space, or choose an --out on another disk",
            )

    def _remove(self, files: Iterable[str]) -> None:
        """Remove files of an output, what a run left of them, folders that are empty then, and the journal."""
        # First what makes the folder look finished: after an interruption it must not be loaded as a model.
        (self.path / self._record_name).unlink(missing_ok=True)
        (self.path / "config.json").unlink(missing_ok=True)
        inside = [self._path_of(name) for name in files]
        for path in inside:
            path.unlink(missing_ok=True)
            partial_of(path).unlink(missing_ok=True)
        folders = {self.path / parent for name in files for parent in Path(name).parents} - {self.path}
        for folder in sorted(folders, reverse=True):  # the deeper ones first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        # The journal last: as long as a file of ours exists, it shows whose it is.
        for folder in (path for path in self.work.iterdir() if path.is_dir()) if self.work.is_dir() else ():
            shutil.rmtree(folder, ignore_errors=True)
        for path in sorted(self.work.iterdir(), key=self.journal.path.__eq__) if self.work.is_dir() else ():
            if path.name != _LOCK:
                path.unlink()
