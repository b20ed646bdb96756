"""Read parts of files on the Hub with HTTP Range requests.

Nothing in an answer is trusted: the range that it claims and the length of its body are compared with the request, and
never more bytes are taken than were asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from milora_init.errors import HubError

_ATTEMPTS = 3  # in a row that break off at the same byte
_CONTENT_RANGE = re.compile(r"bytes\s*(\d+)\s*-\s*\d+\s*/.*", re.IGNORECASE)


class RangesIgnoredError(HubError):
    """The server sends whole files, whatever part is asked for."""


def read_range(url: str, start: int, stop: int, *, token: str | None, description: str) -> Iterator[bytes]:
    """Yield bytes of a URL in chunks. After a broken connection, the next request starts at the first missing byte.

    `http_stream_backoff` repeats a request only until the response begins. An exception inside its `with` block would
    be handled as a failed request, so what the body raises is kept until after the block.

    Args:
        url: The address.
        start, stop: The first byte, and the one after the last.
        token: As in huggingface_hub.
        description: Names the file in errors.

    Raises:
        RangesIgnoredError: The server sends the whole file, and the missing range does not begin at byte 0.
        HubError: The answer is another range, or ends early.
    """
    position, attempts = start, 0
    while position < stop:
        asked = f"bytes={position}-{stop - 1}"
        headers = {**build_hf_headers(token=token), "Range": asked, "Accept-Encoding": "identity"}
        before, failure = position, None
        with http_stream_backoff("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            _require_range(response, position, stop, description)
            try:
                for chunk in response.iter_raw():
                    part = chunk[: stop - position]  # the server may send more than the range
                    position += len(part)
                    yield part
                    if position == stop:
                        break
            except Exception as error:
                failure = error
        attempts = attempts + 1 if position == before else 1
        if position < stop and attempts == _ATTEMPTS:
            raise failure or HubError(
                f"asked for bytes {start} to {stop - 1} of {description}, the answer ended before byte {position}",
                hint="the Hub's listing and its file differ; run the same command again, or download the model first",
            )


def _require_range(response: Any, start: int, stop: int, description: str) -> None:
    """Raise HubError if a response does not begin at `start`: the body could be anything.

    A whole file will do for a range at its beginning.
    """
    content_range, status = str(response.headers.get("Content-Range")), response.status_code
    if status == 200 and response.headers.get("Content-Range") is None:
        if start == 0:
            return
        raise RangesIgnoredError(
            f"asked for bytes {start} to {stop - 1} of {description}, the Hub sends the whole file",
            hint="a mirror or a proxy may ignore Range; download the model first with `hf download`",
        )
    match = _CONTENT_RANGE.fullmatch(content_range)
    length = str(response.headers.get("Content-Length") or "")
    # A body that is longer than the range may begin at another byte than its header says. For byte 0 it is accepted.
    too_long = start > 0 and length.isdigit() and int(length) > stop - start
    encoded = response.headers.get("Content-Encoding") not in (None, "", "identity")
    if status != 206 or match is None or int(match[1]) != start or too_long or encoded:
        raise HubError(
            f"asked for bytes {start} to {stop - 1} of {description}, the Hub answered with status {status}, the range "
            f"{content_range} and {length or 'an unknown number of'} bytes",
            hint="a mirror or a proxy may ignore Range; download the model first with `hf download`",
        )
