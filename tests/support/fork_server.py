"""Start test processes quickly: forks of one server process that has already imported torch and transformers.

The server is the one of the standard library (`multiprocessing`, start method "forkserver"). Each pytest worker has
one: the first test that needs it starts it, and it ends with the worker. It has one thread: OMP_NUM_THREADS is 1.

huggingface_hub reads the environment when it is imported, so every fork computes its constants again.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

NULL = Path(os.devnull)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch", "transformers", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
        "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2", "safetensors.torch",
        "transformers.models.auto.tokenization_auto", "transformers.models.bloom.modeling_bloom", "httpx", "pytest",
        "rich.console", "rich.progress", "rich.table", "tokenizers", "typer.rich_utils", "yaml", "peft",
        "fsspec.compression", "typer._adapters", "milora_init.export.convert", "milora_init.export.merge",
        "milora_init.hub.upload", "milora_init.run.initialize", "milora_init.verification.verify", "support.warm_up",
    ]
)  # fmt: skip


class Fork:
    """A forked process that calls a function, with the interface of `subprocess.Popen`; stdout and stderr go to files.

    Args:
        function: A function of an importable module. If it raises, stderr has the traceback and the exit status is 1.
        arguments: Arguments of the function. They are pickled; connections of `multiprocessing` are allowed.
        cwd: The current folder of the process.
        environment: Environment variables to change; None unsets one.
        stdin: A file to read from; None closes the descriptor.
        stdout: A file to write to instead of a temporary one; None closes the descriptor. stderr is the same.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: Any,
        cwd: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
        stdin: Path | None = NULL,
        stdout: Path | str | None = "",
        stderr: Path | str | None = "",
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        folder = Path(self._temporary.name)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        files = (stdin, self._stdout if stdout == "" else stdout, self._stderr if stderr == "" else stderr)
        # The child unpickles the function, and so imports its module, after it has set the environment of the test.
        self._process = _context.Process(
            target=_child,
            args=(
                {**os.environ, **(environment or {})}, str(cwd or Path.cwd()), [f and str(f) for f in files],
                pickle.dumps(function), arguments,
            ),
        )  # fmt: skip
        _ensure_server()
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, a signal as a negative number, or None while it runs."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """The text written so far."""
        return _text(self._stdout)

    @property
    def stderr(self) -> str:
        """The text written so far."""
        return _text(self._stderr)

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: The process still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"the fork {self.pid}", timeout, self.stdout, self.stderr)
        return self.returncode

    def __enter__(self) -> Fork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._process.join()
        self._process.close()
        self._temporary.cleanup()


@functools.cache
def _ensure_server() -> None:
    """Start the server. It imports `support.warm_up` and `milora_init` from the tree of this file."""
    before = os.environ.get("PYTHONPATH")
    tests, root, *_ = Path(__file__).parents[1:]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tests), str(root), before)))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run(function: Callable[..., object], *arguments: Any, timeout: float = 120, **options: Any) -> Done:
    """Call a function in a fork, wait until it ends, and return its status and output, as `subprocess.run` does."""
    with Fork(function, *arguments, **options) as fork:
        status = fork.wait(timeout)
        return subprocess.CompletedProcess([*map(str, arguments)], status, fork.stdout, fork.stderr)


Done = subprocess.CompletedProcess[str]


def milora(*arguments: object, **options: Any) -> Done:
    """Run `milora-init` with these arguments. The options are those of `Fork`, and `timeout` in seconds."""
    return run(command_line, *map(str, arguments), **options)


def command_line(*arguments: str) -> None:
    """Do what the installed command `milora-init` does."""
    from milora_init.cli import init, main

    init.STARTED = time.monotonic()
    sys.argv = ["milora-init", *arguments]
    main.main()


def forget(*packages: str) -> None:
    """Called in a fork: the next import of these packages is the first one, as in a newly started process."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]


def _child(
    environment: dict[str, str | None], cwd: str, files: list[str | None], function: bytes, arguments: tuple[Any, ...]
) -> None:
    """Give this fork the state of a newly started process, and call the function."""
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if value is not None})
    os.chdir(cwd)
    for number, file in enumerate(files):
        _connect(number, file)
    # sys.stdin and sys.__stdin__ are set together: a stream closes its buffer when its last reference is deleted.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _stream(number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    # A test run started in the background ignores SIGINT, and the fork would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    time.tzset()
    _compute_constants_of_the_hub()
    pickle.loads(function)(*arguments)


def _compute_constants_of_the_hub() -> None:
    """Compute the constants of huggingface_hub from the environment again, also where a module has copies of them."""
    constants = importlib.import_module("huggingface_hub.constants")
    before = {name: value for name, value in vars(constants).items() if name.isupper()}
    importlib.reload(constants)
    for name, module in list(sys.modules.items()):
        if name.startswith("huggingface_hub."):
            for constant, value in before.items():
                if vars(module).get(constant, ...) is value:
                    setattr(module, constant, getattr(constants, constant))


def _connect(number: int, file: str | None) -> None:
    """Open a file as standard stream `number`; None closes the descriptor."""
    if file is None:
        os.close(number)
        return
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY, 0o600)
    os.dup2(opened, number)
    os.close(opened)


def _stream(number: int) -> TextIO | None:
    """The standard stream `number` as the interpreter creates it: None if the descriptor is closed."""
    try:
        os.fstat(number)
    except OSError:
        return None
    errors = "backslashreplace" if number == 2 else "strict"
    return open(number, "w" if number else "r", encoding="utf-8", errors=errors, closefd=False)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""
