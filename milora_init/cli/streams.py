"""Make stdout and stderr safe to write to: closed, full, without a reader, or in an encoding without accents.

None of these ends a run: text that cannot be written is dropped. For stdout the error is kept, because a result that
was lost is not a success.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class Stream(io.TextIOWrapper):
    """A text stream whose writes do not fail. `lost` is the error of the first text that was not written."""

    lost: OSError | None = None

    def write(self, text: str, /) -> int:
        try:
            super().write(text)
            super().flush()
        except BrokenPipeError:  # the reader has closed the pipe, as `head` does
            pass
        except OSError as error:
            self.lost = self.lost or error
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):  # `write` has flushed, and has kept the error
            super().flush()


def replace_standard_streams() -> Stream:
    """Replace stdout and stderr by streams whose writes do not fail; return stdout.

    A standard descriptor that is closed is opened first. Otherwise the next file that is opened, for example an output
    file, would get its number and everything that is printed. Text for a closed stdout still counts as lost.
    """
    for fileno in range(3):
        try:
            os.fstat(fileno)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if fileno == 1 else os.O_RDWR)  # gets the lowest free number
    stdout = sys.stdout = _safe_stream(sys.stdout, 1)
    sys.stderr = _safe_stream(sys.stderr, 2)
    return stdout


def _safe_stream(stream: TextIO | None, fileno: int) -> Stream:
    binary = open(fileno, "wb", closefd=False) if stream is None else stream.buffer  # noqa: SIM115
    return Stream(binary, encoding=stream.encoding if stream else "utf-8", errors="backslashreplace")


@contextmanager
def may_be_lost() -> Iterator[None]:
    """Text that is printed inside may be lost without making the command a failure: the files are written already."""
    stdout = sys.stdout
    before = stdout.lost if isinstance(stdout, Stream) else None
    yield
    if isinstance(stdout, Stream):
        stdout.lost = before
