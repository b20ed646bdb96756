"""Every error that milora-init raises on purpose.

    MiloraError                 exit status 1
    ├── UsageError              exit status 2: an option or a recipe key that cannot be meant
    ├── CheckpointError         the source cannot be read, or cannot be trusted
    ├── PlanError               the source is sound, but the request does not fit it
    ├── OutputError             the output folder cannot take, or must not take, this output
    ├── SolveError              a weight that cannot be decomposed or stored
    └── HubError                the Hub, or the way to it

A message names the value and what was expected; the hint is the command or the edit that repairs it.
"""

from __future__ import annotations

import errno

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
_EVERYWHERE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # another path does not help


class MiloraError(Exception):
    """Base of the tree.

    Args:
        message: What is wrong, with the offending value.
        hint: What repairs it, as a command or an edit; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the message alone and lose the hint on the way between processes.
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(cls: type[MiloraError], message: str, hint: str) -> MiloraError:
    return cls(message, hint=hint)


class UsageError(MiloraError):
    """An option, a recipe key or a combination of them that cannot be meant."""

    exit_code = 2


class CheckpointError(MiloraError):
    """The source checkpoint cannot be read or cannot be trusted."""


class PlanError(MiloraError):
    """A sound checkpoint and a request that does not fit it."""


class OutputError(MiloraError):
    """The output folder cannot take, or must not take, this output."""


class SolveError(MiloraError):
    """A weight that cannot be decomposed, or whose residual cannot be stored."""


class HubError(MiloraError):
    """The Hub refused, or cannot be reached."""


def remedy(error: OSError, instead: str = "") -> str:
    """What repairs a refusal of the operating system's; `instead` is another way, where another path is one."""
    found = _REMEDIES.get(error.errno or 0, "look at the path, its permissions and its disk")
    return f"{found}, or {instead}" if instead and error.errno not in _EVERYWHERE else found


def out_of_memory(error: BaseException) -> bool:
    """Whether it is the machine's memory that an error is about, in whatever class it comes."""
    return isinstance(error, MemoryError) or any(part in str(error) for part in _NO_MEMORY)


def explain(error: BaseException) -> tuple[str, str] | None:
    """Message and repair of what the machine refused, wherever it happened; None for what may be a fault of ours."""
    text = " ".join(str(error).split())
    short = text[:300]
    if "can't start new thread" in text:
        return "no further thread can be started", "raise the limits on processes and memory: ulimit -u, ulimit -v"
    if out_of_memory(error):
        message = f"the memory does not suffice{f': {short}' if short else ''}"
        return message, "raise the limit on memory; --dry-run tells how much is needed"
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
        return "a path holds a NUL character", "name another path"
    if "home directory" in text:  # of Path.expanduser
        return "a path begins with ~ and no such user is known", "write the path without ~"
    return None


_NO_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "annot allocate memory", "bad_alloc",
    "failed to map segment", "error return without exception set",
)  # fmt: skip
