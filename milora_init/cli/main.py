"""Entry point of the command line: commands, exit statuses, error messages.

Results go to stdout, everything else to stderr. Nothing heavy is imported here, so `--help` and a mistyped option are
answered at once.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import cleandoc
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from milora_init import __version__
from milora_init.cli import convert, env, init, merge, output, push, recipes, report, scan, verify
from milora_init.cli.output import annotate, print_error, print_traceback, print_version
from milora_init.cli.params import current_spelling
from milora_init.cli.streams import replace_standard_streams
from milora_init.envelope import envelope
from milora_init.errors import MiloraError, UsageError, explain

DEFAULT_COMMAND = "init"
COMMANDS: Mapping[str, Callable[..., int | None]] = {
    "init": init.init,
    "scan": scan.scan,
    "verify": verify.verify,
    "report": report.report,
    "merge": merge.merge,
    "convert": convert.convert,
    "push": push.push,
    "recipes": recipes.recipes,
    "env": env.env,
}
_ROOT_OPTIONS = ("--help", "-h", "--version", "-V", "--install-completion", "--show-completion")
_RESUMED = ("init", "merge", "push")  # commands that keep the files that were finished
_EXTRA = re.compile(r"Got unexpected extra argument(?:s|\(s\))? \(([^ )]+)")
_MISSING = re.compile(r"Missing (?:option|argument) '([^']+)'")
_NO_NUMBER = re.compile(r"\bvalid (integer|number|float)\b")  # in the messages of typer's versions
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Command(TyperCommand):
    """A command that also accepts other spellings of its options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The terminal breaks the lines of a paragraph, not the source.
        self.help = "\n\n".join(" ".join(part.split("\n")) for part in cleandoc(self.help or "").split("\n\n"))

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_type_of_flags(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = current_spelling(ctx.info_name or "", args)
        for flag in self.params:  # `--private/--public`
            one, other = ({*names} & {*words} for names in (flag.opts, flag.secondary_opts))
            if one and other:
                raise UsageError(f"{min(one)} and {min(other)} exclude each other", hint="drop one of them")
        return super().parse_args(ctx, words)


class _Commands(TyperGroup):
    """The commands. Words that start with none of them are for `init`."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_type_of_flags(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_command(args))

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete the options of `init` too, because its name can be left out."""
        command = self.get_command(ctx, DEFAULT_COMMAND)
        options = command.shell_complete(ctx, incomplete) if command and incomplete.startswith("-") else []
        return [*super().shell_complete(ctx, incomplete), *options]


def _without_type_of_flags(parameters: list[Any]) -> list[Any]:
    """The parameters, of which the flags, --help among them, show no type."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def with_command(words: list[str]) -> list[str]:
    """A command line with its command. Raises UsageError for a mistyped command."""
    if not words or words[0] in COMMANDS or words[0].partition("=")[0] in _ROOT_OPTIONS:
        return words
    first = words[0]
    if first == "help" and not Path(first).exists():
        return [*(word for word in words[1:2] if word in COMMANDS), "--help"]
    close = get_close_matches(first, COMMANDS, n=1, cutoff=0.7)
    if close and not first.startswith("-") and not Path(first).exists():
        raise UsageError(f"no command {first!r}", hint=f"did you mean `milora-init {close[0]}`?")
    return [DEFAULT_COMMAND, *words]


def _print_version(wanted: bool) -> None:
    if wanted:
        print_version(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make LoRA adapters from the singular components of a model's weights (MiLoRA, PiSSA).

    The word `init` can be left out: milora-init MODEL --out DIR.
    """


_EXAMPLES = """\
[bold]Examples[/bold]

milora-init --model meta-llama/Llama-2-7b-hf --rank 64 --out ./svd_init

milora-init merge ./svd_init --adapter ./trained --out ./merged

milora-init push ./svd_init me/llama-2-7b-milora

`milora-init COMMAND --help` shows all options of a command. The documentation is in README.md and docs/.
"""

app = typer.Typer(
    cls=_Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_SETTINGS,
    epilog=_EXAMPLES,
)
app.callback()(_root)
for _name, _function in COMMANDS.items():
    app.command(_name, cls=_Command, context_settings=_SETTINGS)(_function)


class _Terminated(BaseException):
    """SIGTERM, raised like a KeyboardInterrupt."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of `milora-init`: run the command line and exit with its status."""
    stdout = replace_standard_streams()
    signal.signal(signal.SIGTERM, _terminate)
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = run(argv)
    except MemoryError:  # there was not even memory for the message
        os.write(2, b"error: not enough memory\n")
        status = 1
    if stdout.lost and not status:
        status = _fail([], f"stdout cannot be written: {stdout.lost.strerror}", "check where it is redirected to", 1)
    # After a failure a factorisation or a download may still run in a thread, which cannot be interrupted, and the
    # interpreter would wait for it for minutes. It can only write into files that are removed already. After a success
    # all files are written, and an orderly end of torch would only cost time.
    os._exit(status)


def run(argv: list[str]) -> int:
    """Run a command line; return its exit status: 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated."""
    command = commands()
    if not argv:
        command(["--help"], standalone_mode=False, prog_name="milora-init")
        return 2
    output.json_output.reset()
    quiet = bool({"--quiet", "-q"} & {*argv})
    logging.getLogger("milora_init").handlers = [logging.NullHandler() if quiet else output.Notes()]
    resume = "run the same command again"
    if _command_of(argv) in _RESUMED:
        resume += ": it keeps the files that were finished, and makes the others anew"
    try:
        if any("\0" in word for word in argv):
            what = "an option contains a NUL character, which no path and no name can have"
            raise UsageError(what, hint=_usage_hint(argv))
        status = int(command(argv, standalone_mode=False, prog_name="milora-init") or 0)
        # Some versions of typer return a bare status for an interruption.
        return _fail(argv, "interrupted", resume, 130, KeyboardInterrupt()) if status == 130 else status
    except MiloraError as error:
        return _fail(argv, error.message, error.hint, error.exit_code, error)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(argv, "interrupted", resume, 130, error)
    except _Terminated as error:
        return _fail(argv, "terminated", resume, 143, error)
    except Exception as error:
        # Typer's own usage errors. Which package defines their class depends on its version.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _hide_suggestions(error)
            message = _usage_message(argv, error)
            return _fail(argv, message, _usage_hint(argv, message), error.exit_code, error)
        message, hint = explain(error) or (
            f"{type(error).__name__}: {error}",
            "please report this, with the output of `milora-init env`; MILORA_DEBUG=1 prints the traceback",
        )
        return _fail(argv, message, hint, 1, error)


@functools.cache
def commands() -> Any:
    """All commands with their options, which typer reads from the signatures of the functions."""
    return typer.main.get_command(app)


def _command_of(argv: list[str]) -> str:
    return argv[0] if argv and argv[0] in COMMANDS else DEFAULT_COMMAND


def _option_before_extra(argv: list[str], message: str) -> str:
    """The option whose values stand one after another, as in `--target q_proj v_proj`; empty for another error."""
    found = _EXTRA.match(message)
    if not found or found[1] not in argv[2:]:
        return ""
    place = argv.index(found[1], 2) - 1
    while place > 0 and not argv[place].startswith("-"):
        place -= 1
    command = _command_of(argv)
    repeatable = {o for p in commands().commands[command].params if getattr(p, "multiple", False) for o in p.opts}
    return argv[place] if {*current_spelling(command, [argv[place]])} & repeatable else ""


def _usage_hint(argv: list[str], message: str = "") -> str:
    """Where to read on after a usage error of typer's."""
    later = next((word for word in argv if word in COMMANDS), None)
    if later and argv[0].startswith("-"):
        return f"options come after the command: milora-init {later} ...; see milora-init {later} --help"
    if option := _option_before_extra(argv, message):
        return f"give each value with its own option: {option} A {option} B"
    extra, command = _EXTRA.match(message), _command_of(argv)
    words = list(takewhile(lambda word: not word.startswith("-"), argv[1:]))
    if message == "no --out given" and len(words) > 1:
        adapter = f"the trained adapter --adapter {words[1]} and " if len(words) > 2 else ""
        return f"only PAIR is given without an option: {adapter}the folder to write --out {words[-1]}"
    if message == "no --adapter given" and len(words) > 1:
        return f"a trained adapter is an option: --adapter {words[1]}"
    if extra and command == DEFAULT_COMMAND and not {"--out", "-o"} & {*argv}:
        return f"the folder to write is an option: --out {extra[1]}"
    if extra and command in ("verify", "report", "merge", "convert") and not {"--adapter", "-a"} & {*argv}:
        return f"a trained adapter is an option: --adapter {extra[1]}"
    return f"milora-init {_command_of(argv)} --help"


def _hide_suggestions(error: Exception) -> None:
    """Take options that `--help` does not show out of those that a usage error of typer's suggests."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    hidden = {
        name for option in getattr(command, "params", ()) if getattr(option, "hidden", False) for name in option.opts
    }
    if possible := getattr(error, "possibilities", None):
        error.possibilities = [name for name in possible if name not in hidden]  # type: ignore[attr-defined]


def _fail(argv: list[str], message: str, hint: str, status: int, error: BaseException | None = None) -> int:
    if os.environ.get("MILORA_DEBUG") and error is not None:
        print_traceback(error)
    print_error(message, hint)
    annotate(message, hint)
    if "--json" in argv:
        kind = type(error).__name__ if isinstance(error, MiloraError) else "UsageError" if status == 2 else None
        output.json_output.give(
            envelope(_command_of(argv), "failed", error=message, hint=hint, error_type=kind, exit_code=status)
        )
    return status


def _terminate(*_: object) -> None:
    raise _Terminated


def _usage_message(argv: list[str], error: Any) -> str:
    """A usage error of typer's, with the value that was given: its messages do not always show it."""
    message = str(error.format_message())
    if missing := _MISSING.match(message):
        return f"no {missing[1]} given"
    for option, value in pairwise([part for word in argv for part in word.split("=", 1)]):
        if option in getattr(getattr(error, "param", None), "opts", ()):
            if kind := _NO_NUMBER.search(message):
                return f"{option} {value!r} is not {'a whole' if kind[1] == 'integer' else 'a'} number"
            return f"{message} (got {value!r})"
    return message
