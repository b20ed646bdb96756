"""hub.errors: what fails on the way to the Hub is told from what fails on this machine's disk."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from milora_init.errors import HubError
from milora_init.hub.errors import hub_errors


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        # hf_xet 1.8 raises these, without a number: they are OSErrors all the same
        (ConnectionError("Network error: error sending request for url (http://127.0.0.1:9/v1)"), "check the network"),
        (RuntimeError("Task error: CAS Client Error: Connection refused (os error 111)"), "check the network"),
        (PermissionError("Authentication error: 401 Unauthorized"), "run `hf auth login` with a token"),
        (FileNotFoundError("Object not found: no such XORB"), "check the network"),
        (OSError("I/O error: I/O error: No space left on device (os error 28)"), "free some space"),
        # the operating system raises these
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "check the network"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "check the network"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "check the network"),
        (ssl.SSLError(1, "certificate verify failed"), "check the network"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "look at its permissions"),
    ],
)
@pytest.mark.parametrize("pushing", [False, True])
def test_an_error_of_the_network_is_told_from_one_of_a_file(error: Exception, hint: str, pushing: bool) -> None:
    with pytest.raises(HubError) as caught, hub_errors("tiny/llama", None, pushing=pushing):
        raise error
    assert "tiny/llama" in caught.value.message
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(("status", "hint"), [(404, "check the names"), (503, "look at status.huggingface.co")])
def test_an_answer_of_the_hub_is_not_blamed_on_the_network(status: int, hint: str) -> None:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    with pytest.raises(HubError) as caught, hub_errors("me/out", None, pushing=True):
        raise HfHubHTTPError("Not for you", response=response)
    assert caught.value.hint.startswith(hint)
