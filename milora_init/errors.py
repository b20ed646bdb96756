"""The errors that milora-init raises for bad input, a full disk, a missing network and the like.

    MiloraError                 exit status 1
    ├── UsageError              exit status 2: a wrong option, recipe key or path
    ├── CheckpointError         a model or an adapter cannot be read, or cannot be trusted
    ├── PlanError               the model can be read, but the options do not fit it
    ├── OutputError             the output folder cannot be written, or must not be replaced
    ├── SolveError              a weight that cannot be decomposed or stored
    └── HubError                the Hub refused, or cannot be reached

The message names the value and what was expected. The hint is the command or the edit that repairs it.
"""

from __future__ import annotations

import errno
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "free some space",
    errno.EMFILE: "raise the limit on open files: ulimit -n 4096",
    errno.ENFILE: "close other programs: the whole machine has too many files open",
    errno.ENOMEM: "close other programs, or raise the limit on memory",
    errno.EROFS: "its file system is read-only: mount it for writing",
    errno.EACCES: "look at its permissions and at those of the folders above it",
    errno.EPERM: "look at its permissions and at those of the folders above it",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ELOOP: "look at the links on the way to it",
    errno.EIO: "look at the disk, which reports an error",
}
_NOT_OF_THE_PATH = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # another path does not help


class MiloraError(Exception):
    """Base class of all errors of milora-init.

    Args:
        message: What is wrong, with the offending value.
        hint: The command or the edit that repairs it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.__notes__ = [f"hint: {hint}"]  # a traceback shows it, from Python 3.11 on

    def __reduce__(self) -> tuple[object, ...]:
        # The default calls the class with the message alone, and would lose the hint when an error is pickled.
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(cls: type[MiloraError], message: str, hint: str) -> MiloraError:
    return cls(message, hint=hint)


class UsageError(MiloraError):
    """A wrong option, recipe key or path, or options that exclude each other. It always has a hint."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)

    @classmethod
    def no_folder(cls, given: object, path: Path, *, hint: str) -> UsageError:
        """For a folder that is not there, or is a file: as it was given, and its path."""
        return cls(f"{given}: {'a file, not a folder' if path.is_file() else 'no such folder'}", hint=hint)


class CheckpointError(MiloraError):
    """A model or an adapter cannot be read, or cannot be trusted."""


class PlanError(MiloraError):
    """The model can be read, but the options do not fit it."""


class OutputError(MiloraError):
    """The output folder cannot be written, or holds something that must not be replaced."""


class SolveError(MiloraError):
    """A weight that cannot be decomposed, or whose residual does not fit its dtype."""


class HubError(MiloraError):
    """The Hub refused, or cannot be reached."""


def remedy(error: OSError, instead: str = "") -> str:
    """How to repair an error of the operating system. `instead` is offered too, where another path helps."""
    found = _REMEDIES.get(error.errno or 0, "look at the path, its permissions and its disk")
    return f"{found}, or {instead}" if instead and error.errno not in _NOT_OF_THE_PATH else found


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of any class says that the machine has no memory left."""
    return isinstance(error, MemoryError) or any(part in str(error) for part in _NO_MEMORY)


def explain(error: BaseException) -> tuple[str, str] | None:
    """Message and hint for an error that the machine or its installation causes; None for what may be our own fault."""
    text = " ".join(str(error).split())
    short = text[:300]
    if "can't start new thread" in text:
        return "no further thread can be started", "raise the limits on processes and memory: ulimit -u, ulimit -v"
    if out_of_memory(error):
        message = f"not enough memory{f': {short}' if short else ''}"
        return message, "raise the limit on memory; --dry-run shows how much is needed"
    if isinstance(error, OSError):
        return (f"{error.filename}: {error.strerror}" if error.filename else short), remedy(error)
    if isinstance(error, ImportError):
        return (
            f"a package cannot be imported: {short}",
            "repair the installation: pip install --force-reinstall milora-init",
        )
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!a} has characters that {error.encoding} does not have", "set LC_ALL=C.UTF-8"
    if "embedded null" in text:
        return "a path contains a NUL character", "name another path"
    return None


_NO_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "annot allocate memory", "bad_alloc",
    "failed to map segment", "error return without exception set",
)  # fmt: skip
