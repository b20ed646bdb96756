"""Write safetensors files in place: each tensor at its own offset, in any order, from any thread.

A `WriteTarget` is a value. It can be passed to another thread, or to another process that sees the same disk, and that
one writes the tensor. The `SafetensorsWriter` lays out the file, records which tensors are written, and renames the
file to its final name at the end.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from milora_init.checkpoint.header import DTYPE_NAMES, DTYPES, Header, bytes_of
from milora_init.errors import CheckpointError, OutputError, remedy

_CHUNK_BYTES = 1 << 26  # small enough that an interruption is noticed, large enough that calls cost nothing
_NAME_BYTES = 255
_NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.EIO)


@dataclass(frozen=True, slots=True)
class WriteTarget:
    """Where one tensor belongs: `offset` bytes into a file that is laid out already."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def at(self, row: int) -> WriteTarget:
        """The place of one entry of the tensor's first dimension."""
        shape = self.shape[1:]
        size_bytes = math.prod(shape) * DTYPES[self.dtype].itemsize
        return replace(self, shape=shape, offset=self.offset + row * size_bytes)

    def rows(self, start: int, stop: int) -> WriteTarget:
        """The place of some entries of the tensor's first dimension."""
        size_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * size_bytes)

    @contextmanager
    def opened(self) -> Iterator[Callable[[Tensor], None]]:
        """A function that writes the tensor, which must have this dtype and shape. Raises OutputError.

        The file is opened here, before the tensor is computed: should the run fail meanwhile, its file is removed and
        a late write goes nowhere, instead of into the file that the next run has put in its place.
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
    """A file's name with a suffix; where that is longer than file systems take, a hash stands for the name."""
    if len(os.fsencode(name + suffix)) > _NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return name + suffix


def partial_of(path: Path) -> Path:
    """Where a file grows until it may have its name."""
    return path.with_name(extended(path.name, ".partial"))


class SafetensorsWriter:
    """Writes one safetensors file whose header is known: each tensor at its own offset, in any order, once.

    The file grows at `partial_of` its path and takes its name only in `finish()`, after every byte the header promises
    was written and synced. Left without `finish()`, it is removed. `mode` is what the umask is applied to.

    Raises:
        OutputError: Disk full, no permission, and the like; an unfinished or a doubly written tensor.
    """

    def __init__(self, path: Path, header: Header, *, mode: int = 0o666) -> None:
        self.path = path
        self._header, self._mode = header, mode
        self._partial = partial_of(path)
        self._unplaced, self._missing = set(header.tensors), set(header.tensors)
        self._fileno: int | None = None
        self._flusher: ThreadPoolExecutor | None = None
        self._flushed: Future[None] | None = None

    def __enter__(self) -> SafetensorsWriter:
        try:
            with writing(self._partial):
                # What stands there is of a run that was killed, or a link that somebody laid: it is not written into.
                self._partial.unlink(missing_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._fileno = os.open(self._partial, flags, self._mode | stat.S_IWUSR)  # tensors are written by name
                # Reserve the room at once: a full disk is found here, not after an hour of work.
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
            with suppress(OSError):  # why the file was left unfinished is what has to be told
                os.close(fileno)
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)

    def place(self, name: str) -> WriteTarget:
        """Where somebody else is to write a tensor. Once it is there, `written` must be told."""
        if name not in self._unplaced:
            raise OutputError(f"{self.path}: {name} was written twice, or never planned")
        self._unplaced.remove(name)
        info = self._header.tensors[name]
        return WriteTarget(self._partial, name, info.dtype, info.shape, len(self._header.raw) + info.start)

    def written(self, name: str) -> None:
        """A tensor stands in its place."""
        self._missing.remove(name)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; its dtype and shape must be those of the header."""
        with self.place(name).opened() as write:
            write(tensor)
        self.written(name)

    def copy(self, name: str, source: int, offset: int, origin: Path) -> None:
        """Copy a tensor's bytes from `offset` of the open file `source`, inside the kernel where it can.

        `origin` is what that file is called, for the CheckpointError of one that cannot be read.
        """
        place = self.place(name)
        with writing(self._partial):
            length = self._header.tensors[name].size_bytes
            done = _copy_in_kernel(source, self._open(), length, offset, place.offset)
            while done < length:
                chunk = _read(source, min(length - done, 1 << 24), offset + done, f"{origin}: cannot read {name}")
                _write_all(self._open(), memoryview(chunk), place.offset + done)
                done += len(chunk)
        self.written(name)

    def flush(self) -> None:
        """Send to the disk what is there, while others go on: `finish` then has little left to wait for."""
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushed = self._flusher.submit(os.fsync, self._open())

    def finish(self) -> int:
        """Sync the file and give it its name; return its size in bytes. The name is safe once its folder is synced."""
        if self._missing:
            raise OutputError(
                f"{self.path}: {len(self._missing)} tensors were never written, {min(self._missing)} first"
            )
        fileno = self._open()
        with writing(self._partial):
            if self._flushed is not None:
                self._flushed.result()  # the system reports a failed write once, and to whoever asked first
            os.fsync(fileno)
            size_bytes, mode = os.fstat(fileno).st_size, stat.S_IMODE(os.fstat(fileno).st_mode)
            if mode & ~self._mode:
                os.fchmod(fileno, mode & self._mode)
            self._fileno = None  # first: an interruption between the two must not close somebody else's
            os.close(fileno)
            self._partial.replace(self.path)
        return size_bytes

    def _open(self) -> int:
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
    """Turn an operating system's refusal to write into an OutputError that names the path."""
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
    """Copy as many bytes as the file systems do by themselves; return how many."""
    done = 0
    while done < length and hasattr(os, "copy_file_range"):
        size = min(length - done, _CHUNK_BYTES)
        try:
            count = os.copy_file_range(source, target, size, source_offset + done, target_offset + done)
        except OSError as error:
            # Another file system, or one that cannot; or a disk that fails, and reading by hand tells which.
            if error.errno in _NOT_IN_KERNEL:
                break
            raise
        if count == 0:
            break
        done += count
    return done


def _read(source: int, size: int, offset: int, complaint: str) -> bytes:
    try:
        chunk = os.pread(source, size, offset)
    except OSError as error:
        raise CheckpointError(f"{complaint}: {error.strerror}") from error
    if not chunk:
        raise CheckpointError(f"{complaint}: the file ended early; it changed during the run")
    return chunk
