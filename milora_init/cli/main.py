"""Entry point of the command line: commands, exit statuses, error messages.

Data goes to stdout, everything else to stderr. Nothing heavy is imported here, so `--help` and a mistyped option
answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from milora_init.cli import convert, init, merge, output, push, report, verify
from milora_init.cli.output import annotate, print_error, print_traceback
from milora_init.cli.streams import secure
from milora_init.errors import MiloraError, UsageError, explain


class _Verbs(TyperGroup):
    """Keeps the words from the verb on, which the context forgets: `context.obj` is the list that they go into."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        ctx.obj[:] = args
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback(invoke_without_command=True)(init.init)
for _verb in (verify.verify, report.report, push.push, merge.merge, convert.convert):
    app.command()(_verb)
_RESUME = "run the same command to resume"
_AGAIN = "run the same command again"  # of verbs that begin anew


class _Terminated(BaseException):
    """SIGTERM, on its way out like a KeyboardInterrupt."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of `milora-init`: run, and leave with the exit status."""
    stdout = secure()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = run(sys.argv[1:] if argv is None else argv)
    except MemoryError:  # not even the message could be made
        os.write(2, b"error: the memory does not suffice\n")
        status = 1
    if stdout.lost and not status:
        status = _fail([], f"stdout cannot be written: {stdout.lost.strerror}", "look at where it goes to", 1)
    # After a failure a factorisation or a download may still run, which cannot be interrupted: the interpreter would
    # wait minutes for its thread. All that it could still do is write into files that are gone. After a success all
    # is on the disk, and taking torch down would only cost time.
    os._exit(status)


def run(argv: list[str]) -> int:
    """Run a command line; return its exit status: 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated."""
    if not argv:
        app(["--help"], standalone_mode=False, prog_name="milora-init")
        return 2
    output.json_output.expect()
    words: list[str] = []  # from the verb on
    try:
        if any("\0" in word for word in argv):
            raise UsageError("an option holds a NUL character, which no path and no name has")
        status = int(app(argv, standalone_mode=False, prog_name="milora-init", obj=words) or 0)
        # Some versions of typer turn an interruption into a bare status.
        return _fail(argv, "interrupted", _go_on(words), 130, KeyboardInterrupt()) if status == 130 else status
    except MiloraError as error:
        return _fail(argv, error.message, error.hint, error.exit_code, error)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(argv, "interrupted", _go_on(words), 130, error)
    except _Terminated as error:
        return _fail(argv, "terminated", _go_on(words), 143, error)
    except Exception as error:
        # Typer's own usage errors; which package defines their class depends on its version.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            message = error.format_message() + _offending_value(argv, getattr(error, "param", None))
            command = getattr(getattr(error, "ctx", None), "command_path", "milora-init")
            return _fail(argv, message, f"{command} --help", error.exit_code, error)
        message, hint = explain(error) or (
            f"{type(error).__name__}: {error}",
            "please report this; MILORA_DEBUG=1 shows where it happened",
        )
        return _fail(argv, message, hint, 1, error)


def _go_on(words: list[str]) -> str:
    """What to do after an interruption of the command that these words begin, the main job where there are none."""
    return _AGAIN if words and words[0] in ("verify", "report", "convert") else _RESUME


def _fail(argv: list[str], message: str, hint: str, status: int, error: BaseException | None = None) -> int:
    if os.environ.get("MILORA_DEBUG") and error is not None:
        print_traceback(error)
    print_error(message, hint)
    annotate(message, hint)
    if "--json" in argv:
        output.json_output.give({"status": "failed", "error": message, "hint": hint, "exit_code": status})
    return status


def _terminate(*_: object) -> None:
    raise _Terminated


def _offending_value(argv: list[str], parameter: object) -> str:
    """What was given for the option that typer complains about: its messages do not always say."""
    for option, value in pairwise([part for word in argv for part in word.split("=", 1)]):
        if option in getattr(parameter, "opts", ()):
            return f" (got {value!r})"
    return ""
