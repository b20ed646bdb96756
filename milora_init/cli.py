"""The command line: parse, one call, print. Data goes to stdout, all else to stderr.

Nothing heavy is imported here, so that `--help` and a mistyped option answer at once; torch comes with the run.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from milora_init import __version__, streams, verbs
from milora_init.errors import MiloraError, UsageError, explain

if TYPE_CHECKING:
    from milora_init.options import InitOptions


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
for _verb in (verbs.verify, verbs.report, verbs.push, verbs.merge, verbs.convert):
    app.command()(_verb)

_RESUME = "run the same command to resume"
_AGAIN = "run the same command again"  # of verbs that begin anew


class _Terminated(BaseException):
    """SIGTERM, on its way out like a KeyboardInterrupt."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of `milora-init`: run, and leave with the exit status."""
    stdout = streams.secure()
    signal.signal(signal.SIGTERM, _terminate)
    status = run(sys.argv[1:] if argv is None else argv)
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
    verbs.answer.expect()
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
    from milora_init.terminal import annotate, print_error, print_traceback

    if os.environ.get("MILORA_DEBUG") and error is not None:
        print_traceback(error)
    print_error(message, hint)
    annotate(message, hint)
    if "--json" in argv:
        verbs.answer.give({"status": "failed", "error": message, "hint": hint, "exit_code": status})
    return status


def _terminate(*_: object) -> None:
    raise _Terminated


def _offending_value(argv: list[str], parameter: object) -> str:
    """What was given for the option that typer complains about: its messages do not always say."""
    for option, value in pairwise([part for word in argv for part in word.split("=", 1)]):
        if option in getattr(parameter, "opts", ()):
            return f" (got {value!r})"
    return ""


def _show_version(wanted: bool) -> None:
    if wanted:
        from milora_init.terminal import print_version

        print_version(__version__)
        raise typer.Exit


_WHAT, _ADAPTER, _SOURCE, _RUN = "What to factor out", "The adapter", "The source", "The run"
_TARGET = "The Hub"


@app.callback(invoke_without_command=True)
def init(
    context: typer.Context,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Local folder or Hub id. Required.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder to write. Required.")] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-r", help="Singular triplets per weight. (default: 64)", rich_help_panel=_WHAT),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="min (MiLoRA), max (PiSSA), mid or random. (default: min)", rich_help_panel=_WHAT)
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            "--config",
            "-c",
            help="Recipe: a name in configs/ or a YAML file. (default: llm-adapters)",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = "llm-adapters",
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="Module suffix, full name, all-linear, or re:PATTERN. Repeatable.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="What to leave out, in the same language. Repeatable.", rich_help_panel=_WHAT),
    ] = None,
    alpha: Annotated[int | None, typer.Option(help="lora_alpha. (default: the rank)", rich_help_panel=_ADAPTER)] = None,
    rslora: Annotated[
        bool | None, typer.Option("--rslora/--no-rslora", help="Scale by alpha / sqrt(rank).", rich_help_panel=_ADAPTER)
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="lora_dropout. (default: the recipe's)", rich_help_panel=_ADAPTER)
    ] = None,
    task_type: Annotated[
        str | None, typer.Option(help="PEFT's task type. (default: the architecture's)", rich_help_panel=_ADAPTER)
    ] = None,
    text_only: Annotated[
        bool | None,
        typer.Option(
            "--text-only",
            help="For AutoModelForCausalLM, where it builds a model's text part alone.",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the residual weights: auto, float32, bfloat16, float16. (default: auto, the source's)",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=_SOURCE)
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Hub cache.", rich_help_panel=_SOURCE)] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN", rich_help_panel=_SOURCE)] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="auto, cpu, cuda or cuda:N. Repeatable. (default: auto)", rich_help_panel=_RUN),
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code", help="Run the code in the model's own repository.", rich_help_panel=_SOURCE
        ),
    ] = None,
    low_disk: Annotated[
        bool | None,
        typer.Option("--low-disk", help="Keep only a few of a Hub model's shards at a time.", rich_help_panel=_SOURCE),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="For --mode random and the solver's start. (default: 0)", rich_help_panel=_RUN)
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="Push the output to this repository.", rich_help_panel=_TARGET)
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="If it is made now. (default: private)", rich_help_panel=_TARGET),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Also over a repository of something else.", rich_help_panel=_TARGET)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan; write nothing.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output of milora-init.", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=_RUN)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.", rich_help_panel=_RUN)] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A line for every weight.", rich_help_panel=_RUN)
    ] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version.", rich_help_panel=_RUN
        ),
    ] = False,
) -> None:
    """Factor singular components of a checkpoint into a LoRA adapter: a residual base and a ready-to-train lora/."""
    if verb := context.invoked_subcommand:
        _refuse_options_before(verb, context)
        return
    if quiet and verbose:
        raise UsageError("--quiet and --verbose contradict each other", hint="drop one of them")
    from milora_init.options import InitOptions

    options = InitOptions.from_recipe(
        config, model=model, out=out, rank=rank, mode=mode, target=target or None, exclude=exclude or None,
        alpha=alpha, rslora=rslora, dropout=dropout, task_type=task_type, text_only=text_only, dtype=dtype,
        revision=revision, cache_dir=cache_dir, token=token, trust_remote_code=trust_remote_code, low_disk=low_disk,
        device=device or None, seed=seed, overwrite=overwrite or None, push_to_hub=push_to_hub, private=private,
    )  # fmt: skip
    _initialize(options, dry_run=dry_run, as_json=as_json, quiet=quiet, verbose=verbose, yes=yes)


def _refuse_options_before(verb: str, context: typer.Context) -> None:
    """Raise UsageError where options stand before a verb, with the command that was meant if the verb has them."""
    command: Any = context.command  # a group, whose class typer and click each have
    own = {name for parameter in command.commands[verb].params for name in parameter.opts}
    given = [
        parameter
        for parameter in command.params
        if getattr(context.get_parameter_source(parameter.name or ""), "name", "") == "COMMANDLINE"
    ]
    if not given:
        return
    first = next((parameter for parameter in given if not own & set(parameter.opts)), None)
    if first:
        raise UsageError(
            f"{first.opts[0]} stands before `{verb}`: it is an option of the main job, not of `{verb}`",
            hint=f"milora-init {verb} --help",
        )
    moved = [word for parameter in given for word in _spelled(parameter, context.params[parameter.name])]
    raise UsageError(
        f"{given[0].opts[0]} stands before `{verb}`: the options of a verb stand behind it",
        hint=shlex.join(["milora-init", *context.obj, *moved]),
    )


def _spelled(parameter: Any, value: Any) -> list[str]:
    """An option as it is written on a command line; a token is not repeated."""
    if isinstance(value, bool):
        return [parameter.opts[0] if value else parameter.secondary_opts[0]]
    values = value if isinstance(value, (list, tuple)) else [value]
    shown = "TOKEN" if parameter.name == "token" else None
    return [word for one in values for word in (parameter.opts[0], shown or str(one))]


def _initialize(options: InitOptions, *, dry_run: bool, as_json: bool, quiet: bool, verbose: bool, yes: bool) -> None:
    from dataclasses import asdict

    from milora_init.card import write_step_summary
    from milora_init.decompose import carry_out, locate, seats
    from milora_init.plan import describe, make_plan
    from milora_init.report import summary
    from milora_init.self_check import require_loadable
    from milora_init.terminal import Bar, print_plan, print_published, print_summary, waiting
    from milora_init.workers import multiply_rate

    verbs.hide_the_hubs_bars()
    with waiting("reading headers and names", quiet=quiet):
        plan = make_plan(options, *locate(options))
    if dry_run:
        require_loadable(plan)
        devices = seats(plan)[0]
        estimate_s = plan.solve_flops / multiply_rate(devices[0])
        if as_json:
            verbs.answer.give({**describe(plan, len(devices)), "estimate_s": round(estimate_s, 1)})
        else:
            print_plan(plan, estimate_s, plan.peak_memory_bytes(len(devices)))
        return
    with Bar(quiet=quiet, verbose=verbose) as bar:
        manifest, published = carry_out(plan, progress=bar, replace=yes)
    through = options.low_disk and options.push_to_hub is not None  # nothing of the output is here
    if through and not published:
        if as_json:
            verbs.answer.give({"status": "unchanged", "pushed": {"repo": options.push_to_hub}})
        elif not quiet:
            with streams.optional():
                print_published(options.push_to_hub or "", unchanged=True)
        return
    unchanged = not bar.began and not through
    write_step_summary(manifest)
    if as_json:
        told = {"pushed": asdict(published)} if published else {}
        verbs.answer.give({**summary(manifest, unchanged=unchanged), **told})
    elif not quiet:
        with streams.optional():
            print_summary(manifest, ended="already done, nothing to do" if unchanged else "")
            if published:
                print_published(published.url)
