"""SIGTERM and SIGINT, sent to the real command: it ends at once with a status and a hint, and can be resumed."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from support import fork_server
from support.tiny_models import contents

from milora_init.errors import OutputError
from milora_init.linalg.split import split
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest
from milora_init.run import weight
from milora_init.run.journal import Journal

Built = Callable[..., Path]
Start = Callable[..., Manifest]

WAIT_S = 60  # on a busy machine; the solve that must not be waited for takes 300


def milora_that_solves_for_minutes(solving: Connection, *arguments: str) -> None:
    """The command line, with a last solve that ignores signals and lets other threads run, like a LAPACK call.

    Args:
        solving: Receives a message when that solve has started and the journal has its head and one shard.
    """
    append = Journal.append
    calls: list[int] = []
    appended = threading.Semaphore(0)

    def split_or_sleep(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:  # the last one
            appended.acquire()
            appended.acquire()
            solving.send(True)
            ctypes.CDLL(None).sleep(300)
        return split(*arguments, **options)

    def append_and_count(self: Journal, line: Any) -> None:
        append(self, line)
        appended.release()

    patch = pytest.MonkeyPatch()
    patch.setattr(weight, "split", split_or_sleep)
    patch.setattr(Journal, "append", append_and_count)
    fork_server.command_line(*arguments)


@pytest.mark.parametrize(
    ("number", "status", "message"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_during_a_long_solve_ends_the_run_at_once_and_it_is_resumed(
    number: signal.Signals, status: int, message: str, start: Start, checkpoint: Built, finished: Built, tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    command = ["-m", str(source), "-o", str(out), "-r", "4", "--device", "cpu"]
    solving, sender = multiprocessing.Pipe(duplex=False)
    with fork_server.Fork(milora_that_solves_for_minutes, sender, *command) as process:
        sender.close()
        assert solving.poll(WAIT_S)
        assert solving.recv(), process.stderr
        with pytest.raises(OutputError, match="another milora-init is writing"):  # two processes, one folder
            start(source)
        process.send_signal(number)
        assert process.wait(WAIT_S) == status
        stderr = process.stderr
    assert f"error: {message}\n\nhint: run the same command again: it keeps the files" in stderr
    assert "Traceback" not in stderr
    left = contents(out)
    assert f"{WORK_FOLDER}/journal.jsonl" in left
    assert not [name for name in left if name.endswith(".partial") or name in (MANIFEST, "config.json")]
    start(source)
    own = (MANIFEST, "lora/adapter_config.json")  # the manifest holds times, and both hold the folder's path
    resumed, uninterrupted = (
        {name: content for name, content in contents(folder).items() if name not in own} for folder in (out, finished())
    )
    assert resumed == uninterrupted
