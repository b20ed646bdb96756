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
