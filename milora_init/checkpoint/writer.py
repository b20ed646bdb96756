"""Write safetensors files in place: each tensor at its own offset, in any order, from any thread.

A `WriteTarget` is a value: it can be passed to another thread, or to a process on another machine that sees the same
disk, which then writes the tensor. The `SafetensorsWriter` lays out the file, records which tensors are written, and
renames the file to its final name at the end.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from milora_init.checkpoint.dtypes import DTYPE_NAMES, bytes_of
from milora_init.checkpoint.header import SAFETENSORS_DTYPES, Header
from milora_init.errors import CheckpointError, OutputError, remedy

_CHUNK_BYTES = 1 << 26  # small enough that an interruption is noticed, large enough that the calls cost nothing
_NAME_BYTES = 255
_KERNEL_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.EIO)


@dataclass(frozen=True, slots=True)
class WriteTarget:
    """Where one tensor is to be written: at `offset` bytes of a file that is laid out already."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def at(self, row: int) -> WriteTarget:
        """The target of one entry of the tensor's first dimension."""
        entry = self.rows(row, row + 1)
        return replace(entry, shape=self.shape[1:])

    def rows(self, start: int, stop: int) -> WriteTarget:
        """The target of the entries `start` to `stop` of the tensor's first dimension."""
        row_bytes = math.prod(self.shape[1:]) * SAFETENSORS_DTYPES[self.dtype].itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * row_bytes)

    @contextmanager
    def opened(self) -> Iterator[Callable[[Tensor], None]]:
        """A function that writes the tensor, which must have this dtype and shape. Raises OutputError.

        The file is opened here, before the tensor is computed. If the run fails meanwhile, the file is deleted. A late
        write then goes into the deleted file, and not into a new file of the same name that the next run made.
        """
        with writing(self.path):
            fileno = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)

        def write(tensor: Tensor) -> None:
            if (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (self.dtype, self.shape):
                planned = f"planned {self.dtype} {list(self.shape)}"
                raise OutputError(f"{self.name} is {tensor.dtype} {list(tensor.shape)}, {planned}")
            with writing(self.path):
                _write_all(fileno, bytes_of(tensor), self.offset)

        try:
            yield write
        finally:
            os.close(fileno)


def extended(name: str, suffix: str) -> str:
    """A file's name with a suffix. A hash replaces the name where the result is longer than file systems allow."""
    if len(os.fsencode(name + suffix)) > _NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return name + suffix


def partial_of(path: Path) -> Path:
    """The name of a file until it is finished."""
    return path.with_name(extended(path.name, ".partial"))


class SafetensorsWriter:
    """Writes one safetensors file whose header is known: each tensor at its own offset, in any order, once.

    Until `finish()` the file has the name `partial_of(path)`. `finish()` renames it after every tensor of the header is
    written and synced. If the `with` block ends without `finish()`, the file is removed.

    Args:
        path: The final name.
        header: The layout.
        mode: The file's permissions, before the umask.

    Raises:
        OutputError: Disk full, no permission, and the like; a tensor that was written twice, or never.
    """

    def __init__(self, path: Path, header: Header, *, mode: int = 0o666) -> None:
        self.path = path
        self._header, self._mode = header, mode
        self._partial = partial_of(path)
        self._without_target, self._unwritten = set(header.tensors), set(header.tensors)
        self._fileno: int | None = None
        self._flusher: ThreadPoolExecutor | None = None
        self._flushed: Future[None] | None = None

    def __enter__(self) -> SafetensorsWriter:
        try:
            with writing(self._partial):
                # A file of that name is from a killed run, or a link that somebody made: nothing is written into it.
                self._partial.unlink(missing_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                # Write permission even for a read-only mode: each WriteTarget opens the file by its name.
                self._fileno = os.open(self._partial, flags, self._mode | stat.S_IWUSR)
                # Allocate the whole file at once: a full disk is found here, not after an hour of work.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._fileno, 0, self._header.file_bytes)
                else:
                    os.ftruncate(self._fileno, self._header.file_bytes)
                _write_all(self._fileno, memoryview(self._header.raw), 0)
        except BaseException:  # __exit__ is not called for what fails here
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._flusher is not None:
            self._flusher.shutdown()
        if self._fileno is not None:
            fileno, self._fileno = self._fileno, None
            with suppress(OSError):  # the error that left the file unfinished is the one to report
                os.close(fileno)
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)

    def target(self, name: str) -> WriteTarget:
        """Where another thread or process is to write a tensor. Once it has, call `mark_written`."""
        if name not in self._without_target:
            raise OutputError(f"{self.path}: {name} was written twice, or never planned")
        self._without_target.remove(name)
        info = self._header.tensors[name]
        return WriteTarget(self._partial, name, info.dtype, info.shape, len(self._header.raw) + info.start)

    def mark_written(self, name: str) -> None:
        """Record that a tensor is in the file."""
        self._unwritten.remove(name)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; its dtype and shape must be those of the header."""
        with self.target(name).opened() as write:
            write(tensor)
        self.mark_written(name)

    def copy(self, name: str, source_fileno: int, offset: int, source_path: Path) -> None:
        """Copy a tensor's bytes from `offset` of the open file `source_fileno`, inside the kernel where it can.

        `source_path` names that file in the CheckpointError if it cannot be read.
        """
        target = self.target(name)
        with writing(self._partial):
            length = self._header.tensors[name].size_bytes
            copied = _copy_in_kernel(source_fileno, self._open_fileno(), length, offset, target.offset)
            while copied < length:
                size = min(length - copied, 1 << 24)
                chunk = _read(source_fileno, size, offset + copied, f"{source_path}: cannot read {name}")
                _write_all(self._open_fileno(), memoryview(chunk), target.offset + copied)
                copied += len(chunk)
        self.mark_written(name)

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a tensor's bytes, which come in chunks. Raises OutputError for more or fewer than the header says."""
        target, written = self.target(name), 0
        length = self._header.tensors[name].size_bytes
        for chunk in chunks:
            if written + len(chunk) > length:
                break
            with writing(self._partial):
                _write_all(self._open_fileno(), memoryview(chunk), target.offset + written)
            written += len(chunk)
        if written != length:
            raise OutputError(f"{self.path}: {name} has {length} bytes, other bytes were given")
        self.mark_written(name)

    def flush(self) -> None:
        """Start to sync in the background what is written so far, so that `finish` has little left to wait for."""
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushed = self._flusher.submit(os.fsync, self._open_fileno())

    def finish(self) -> int:
        """Sync the file and give it its final name; return its size in bytes.

        The name survives a power cut only once its folder is synced, see `sync_folder`.
        """
        if self._unwritten:
            raise OutputError(
                f"{self.path}: {len(self._unwritten)} tensors were never written, {min(self._unwritten)} first"
            )
        fileno = self._open_fileno()
        with writing(self._partial):
            if self._flushed is not None:
                self._flushed.result()  # raises its error: the system reports a failed write only to the first fsync
            os.fsync(fileno)
            size_bytes, mode = os.fstat(fileno).st_size, stat.S_IMODE(os.fstat(fileno).st_mode)
            if mode & ~self._mode:
                os.fchmod(fileno, mode & self._mode)
            # None before the file is closed: if an interrupt came between the two lines, __exit__ would otherwise close
            # a number that another file may have by then.
            self._fileno = None
            os.close(fileno)
            self._partial.replace(self.path)
        return size_bytes

    def _open_fileno(self) -> int:
        if self._fileno is None:
            raise OutputError(f"{self.path}: not open for writing")
        return self._fileno


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fileno = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fileno)
    finally:
        os.close(fileno)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError that names the path."""
    try:
        yield
    except OSError as error:
        hint = remedy(error, "choose another --out")
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=hint) from error


def _write_all(fileno: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fileno, data[:_CHUNK_BYTES], offset)
        data, offset = data[count:], offset + count


def _copy_in_kernel(source: int, target: int, length: int, source_offset: int, target_offset: int) -> int:
    """Copy as many of `length` bytes as the file systems can copy themselves; return how many."""
    copied = 0
    while copied < length and hasattr(os, "copy_file_range"):
        size = min(length - copied, _CHUNK_BYTES)
        try:
            count = os.copy_file_range(source, target, size, source_offset + copied, target_offset + copied)
        except OSError as error:
            # The kernel cannot copy between these two files: pread and pwrite do it instead. If a disk is failing, they
            # raise an error that says whether it is the source's or the target's.
            if error.errno in _KERNEL_CANNOT_COPY:
                break
            raise
        if count == 0:
            break
        copied += count
    return copied


def _read(source: int, size: int, offset: int, complaint: str) -> bytes:
    try:
        chunk = os.pread(source, size, offset)
    except OSError as error:
        raise CheckpointError(f"{complaint}: {error.strerror}") from error
    if not chunk:
        raise CheckpointError(f"{complaint}: the file ended early; it changed during the run")
    return chunk
