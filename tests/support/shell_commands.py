"""A folder for PATH with a `milora-init` that starts in a tenth of a second: a fork of the fork server.

A shell or a script starts the command as any other. It is a small program that imports nothing large: it sends its
arguments, its environment and its folder to the test, which forks. The fork writes into the streams of the program.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from support import fork_server

PROGRAM = """#!{python} -IS
import json, os, socket, sys
asked = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd(), "pid": os.getpid()}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    connection.sendall(json.dumps(asked).encode() + b"\\n")
    sys.exit(int(connection.makefile().readline() or 1))
"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` with the command; it works until the context ends."""
    commands = folder / "commands"
    commands.mkdir()
    address = str(commands / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        program = commands / "milora-init"
        program.write_text(PROGRAM.format(python=sys.executable, address=address), encoding="utf-8")
        program.chmod(0o755)
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        try:
            yield commands
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _serve(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # the context has ended
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        asked = json.loads(connection.makefile().readline())
        stdin, stdout, stderr = (Path(f"/proc/{asked['pid']}/fd/{number}") for number in range(3))
        with fork_server.Fork(
            fork_server.command_line, *asked["arguments"], cwd=asked["cwd"], environment=asked["environment"],
            stdin=stdin, stdout=stdout, stderr=stderr,
        ) as fork:  # fmt: skip
            connection.sendall(f"{fork.wait(120)}\n".encode())
