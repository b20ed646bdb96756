"""Make stdout and stderr safe to write to: closed, full, without a reader, or in an encoding without accents.

None of these ends a run; what cannot be written is dropped. For stdout the error is kept, because a lost answer is not
a success.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class Stream(io.TextIOWrapper):
    """A text stream whose writes do not fail. `lost` is why something did not arrive."""

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
        with suppress(OSError):  # `write` has flushed, and kept the error
            super().flush()


def secure() -> Stream:
    """Put streams that do not fail in the place of stdout and stderr; returns stdout.

    A standard descriptor that is closed is taken up first: else the next file that is opened, an output say, would get
    its number, and whatever is printed. What is written to a closed stdout still counts as lost.
    """
    for fileno in range(3):
        try:
            os.fstat(fileno)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if fileno == 1 else os.O_RDWR)  # gets the lowest number that is free
    stdout = sys.stdout = _over(sys.stdout, 1)
    sys.stderr = _over(sys.stderr, 2)
    return stdout


def _over(stream: TextIO | None, fileno: int) -> Stream:
    binary = open(fileno, "wb", closefd=False) if stream is None else stream.buffer  # noqa: SIM115
    return Stream(binary, encoding=stream.encoding if stream else "utf-8", errors="backslashreplace")


@contextmanager
def optional() -> Iterator[None]:
    """What is printed inside only tells of what was made. That stands, even where the text is lost."""
    stdout = sys.stdout
    before = stdout.lost if isinstance(stdout, Stream) else None
    yield
    if isinstance(stdout, Stream):
        stdout.lost = before
