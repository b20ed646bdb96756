"""`milora-init --model MODEL --out DIR`: split a model into a residual base and an adapter."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora_init import __version__
from milora_init.cli import output
from milora_init.cli.output import print_version
from milora_init.cli.streams import optional
from milora_init.errors import UsageError

if TYPE_CHECKING:
    from milora_init.options import InitOptions


def _show_version(wanted: bool) -> None:
    if wanted:
        print_version(__version__)
        raise typer.Exit


_WHAT, _ADAPTER, _SOURCE, _RUN = "What to factor out", "The adapter", "The source", "The run"
_TARGET = "The Hub"


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

    from milora_init.cli.output import print_plan, print_published, print_summary
    from milora_init.cli.progress_bar import Bar, waiting
    from milora_init.hub.model_card import write_step_summary
    from milora_init.hub.source import locate_model
    from milora_init.plan.peft_check import require_loadable
    from milora_init.plan.plan import describe, make_plan
    from milora_init.report import summary
    from milora_init.run.devices import multiply_rate
    from milora_init.run.initialize import carry_out
    from milora_init.run.pool import solver_devices

    output.hide_the_hubs_bars()
    with waiting("reading headers and names", quiet=quiet):
        plan = make_plan(options, *locate_model(options))
    if dry_run:
        require_loadable(plan)
        devices = solver_devices(plan)[0]
        estimate_s = plan.solve_flops / multiply_rate(devices[0])
        if as_json:
            output.json_output.give({**describe(plan, len(devices)), "estimate_s": round(estimate_s, 1)})
        else:
            print_plan(plan, estimate_s, plan.peak_memory_bytes(len(devices)))
        return
    with Bar(quiet=quiet, verbose=verbose) as bar:
        manifest, published = carry_out(plan, progress=bar, replace=yes)
    through = options.low_disk and options.push_to_hub is not None  # nothing of the output is here
    if through and not published:
        if as_json:
            output.json_output.give({"status": "unchanged", "pushed": {"repo": options.push_to_hub}})
        elif not quiet:
            with optional():
                print_published(options.push_to_hub or "", unchanged=True)
        return
    unchanged = not bar.began and not through
    write_step_summary(manifest)
    if as_json:
        told = {"pushed": asdict(published)} if published else {}
        output.json_output.give({**summary(manifest, unchanged=unchanged), **told})
    elif not quiet:
        with optional():
            print_summary(manifest, ended="already done, nothing to do" if unchanged else "")
            if published:
                print_published(published.url)
