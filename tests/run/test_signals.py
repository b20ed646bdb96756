"""SIGTERM and Ctrl-C, sent to the real command: gone at once, with a status and a hint, and resumable."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_models import contents

from milora_init.errors import OutputError
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest

Built = Callable[..., Path]
Start = Callable[..., Manifest]

AT_ONCE_S = 3
# A factorisation that takes minutes: like LAPACK, a call that lets other threads run and hears no signal.
COMMAND = """
import ctypes, sys, threading
from milora_init.cli.main import main
from milora_init.run import weight
from milora_init.run.journal import Journal

solve, calls, recorded = weight.split, [], threading.Semaphore(0)

def split(*arguments, **options):
    calls.append(1)
    if len(calls) == 10:  # the last one
        recorded.acquire()
        recorded.acquire()  # the journal has its head and one shard
        print("solving", flush=True)
        ctypes.CDLL(None).sleep(300)
    return solve(*arguments, **options)

def append(self, line, real=Journal.append):
    real(self, line)
    recorded.release()

weight.split = split
Journal.append = append
main(sys.argv[1:])
"""


def _hears_an_interruption() -> None:
    """Also where the tests themselves were started with SIGINT ignored, in the background say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "status", "message"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_in_the_middle_of_a_long_solve_is_obeyed_at_once_and_the_run_resumed(
    number: signal.Signals, status: int, message: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, "-m", str(source), "-o", str(out), "-r", "4", "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_hears_an_interruption
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "solving\n"
            with pytest.raises(OutputError, match="another milora-init is writing"):  # two processes, one folder
                start(source)
            sent = time.monotonic()
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
            took_s = time.monotonic() - sent
        finally:
            process.kill()
    assert took_s < AT_ONCE_S
    assert process.returncode == status
    assert f"error: {message}\n\nhint: run the same command to resume\n" in stderr
    assert "Traceback" not in stderr
    left = contents(out)
    assert f"{WORK_FOLDER}/journal.jsonl" in left
    assert not [name for name in left if name.endswith(".partial") or name in (MANIFEST, "config.json")]
    start(source)
    start(source, out=str(tmp_path / "straight"))
    own = (MANIFEST, "lora/adapter_config.json")  # the one holds seconds, both the name of the folder
    resumed, straight = (
        {name: content for name, content in contents(folder).items() if name not in own}
        for folder in (out, tmp_path / "straight")
    )
    assert resumed == straight
