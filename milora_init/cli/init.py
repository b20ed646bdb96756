"""`milora-init [init] MODEL --out DIR`: split a model into a residual base and an adapter."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import (
    CacheDir,
    Json,
    Model,
    Quiet,
    Revision,
    Token,
    Verbose,
    complete_recipe,
    completed_from,
)
from milora_init.cli.streams import may_be_lost
from milora_init.errors import OutputError, UsageError
from milora_init.methods import METHODS, MODES
from milora_init.options import BASES, OUTPUT_DTYPES, InitOptions, split_names

if TYPE_CHECKING:
    from milora_init.cli.progress_bar import Bar
    from milora_init.result import InitResult, PartResult

STARTED = time.monotonic()  # this file is imported when the process starts
_METHOD, _LORA, _MODEL, _RUN, _HUB = "Method", "Adapter", "Model", "Run", "Hub"


def init(
    model_argument: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The original model: a folder or a Hub id.", show_default=False),
    ] = None,
    model: Model = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", "-r", metavar="N", help="Singular triplets per weight. (default: 64)", rich_help_panel=_METHOD
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completed_from(METHODS),
            help="milora, pissa, olora-tail; rlmo, rlpo, mica (no base is written). (default: milora)",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            autocompletion=completed_from(MODES),
            help="Which triplets: min (MiLoRA), max (PiSSA), mid or random. (default: the method's)",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-c",
            metavar="NAME",
            autocompletion=complete_recipe,
            help="A recipe of `milora-init recipes`, or a YAML file. (default: llm-adapters)",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            metavar="NAME",
            help="What to adapt: module suffix, full name, all-linear, re:PATTERN, or kappa:P and energy:P (see scan). "
            "Repeatable. (default: q, k, v, up and down projections, or all-linear)",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What not to adapt. Repeatable.", rich_help_panel=_METHOD),
    ] = None,
    alpha: Annotated[
        int | None, typer.Option(metavar="N", help="lora_alpha. (default: the rank)", rich_help_panel=_LORA)
    ] = None,
    rslora: Annotated[
        bool | None,
        typer.Option("--rslora/--no-rslora", help="Scale by alpha / sqrt(rank). (default: no)", rich_help_panel=_LORA),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(metavar="P", help="lora_dropout. (default: the recipe's, or 0)", rich_help_panel=_LORA),
    ] = None,
    task_type: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="PEFT's task type. (default: the architecture's)", rich_help_panel=_LORA),
    ] = None,
    text_only: Annotated[
        bool | None,
        typer.Option(
            "--text-only",
            help="Of a multimodal model: adapt the text-only class.",
            rich_help_panel=_LORA,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            autocompletion=completed_from(OUTPUT_DTYPES),
            help="Of the residual weights: auto, float32, bfloat16, float16. (default: auto, the model's)",
            rich_help_panel=_LORA,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            autocompletion=completed_from(BASES),
            help="Of a quantised model: dense, or mixed, which dequantises the adapted weights alone. (default: dense)",
            rich_help_panel=_LORA,
        ),
    ] = None,
    nf4: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With pissa, for QLoRA: a base of NF4's numbers, corrected in N rounds, e.g. 5. (default: 0, none)",
            rich_help_panel=_LORA,
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option("--trust-remote-code", help="Run the code in the model's own repository.", rich_help_panel=_MODEL),
    ] = None,
    low_disk: Annotated[
        bool | None,
        typer.Option("--low-disk", help="Keep only a few of a Hub model's shards on the disk.", rich_help_panel=_MODEL),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE", help="auto, cpu, cuda or cuda:N. Repeatable. (default: auto)", rich_help_panel=_RUN
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Make the I-th of N parts of the files and stop; the same command without --part finishes. "
            "`auto`: the numbers of torchrun, a Slurm array or SkyPilot.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Make the files on a Ray cluster: auto, or HOST:PORT. Its nodes must see the model and --out, unless "
            "both are on the Hub.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="For --mode random and the solver's start. (default: 0)", rich_help_panel=_RUN),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; write nothing.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an earlier output in --out, and other contents of the repository.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Push the output to this repository: org/name.",
            show_default=False,
            rich_help_panel=_HUB,
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="The repository, if it is created now. (default: private)", rich_help_panel=_HUB
        ),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Exit with status 1 if the worst leak or error is larger, e.g. leak=0.1. Repeatable.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    cache_dir: CacheDir = None,
    token: Token = None,
    yes: Annotated[bool, typer.Option("--yes", hidden=True)] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Split a model into a residual base and a ready-to-train LoRA adapter.

    The adapter gets r singular triplets of each targeted weight, the base gets the rest. The model is streamed, so it
    need not fit in memory. The same command again keeps the files that an interrupted run has finished, and leaves a
    finished output as it is.

    [bold]Examples[/bold]

    milora-init ./my-model --out ./svd_init

    milora-init --model meta-llama/Llama-2-7b-hf --rank 64 --out ./svd_init

    milora-init ./my-model -o ./pissa --mode max --target all-linear --dry-run
    """
    output.require_one_of_quiet_and_verbose(quiet, verbose)
    limits = output.parse_limits(fail_on or [])
    options = InitOptions.from_recipe(
        recipe, model=_only_model(model_argument, model), out=out, rank=rank, method=method, mode=mode,
        target=_names(target), exclude=_names(exclude), alpha=alpha, rslora=rslora, dropout=dropout,
        task_type=task_type, text_only=text_only, dtype=dtype, base=base, nf4=nf4, revision=revision,
        cache_dir=cache_dir, token=token, trust_remote_code=trust_remote_code, low_disk=low_disk,
        device=device or None, seed=seed, overwrite=overwrite or None, push_to_hub=push_to_hub, private=private,
        part=part, ray=ray,
    )  # fmt: skip
    if limits and not (chosen := options.effective_method).writes_base:
        why = f"method {chosen.name} writes no base, so nothing is rounded and there is no {next(iter(limits))}"
        raise UsageError(f"--fail-on has no meaning: {why}", hint="drop --fail-on")
    if private is not None and not options.push_to_hub:
        hint = "add --push-to-hub ORG/NAME, or drop it"
        raise UsageError("--private and --public are for --push-to-hub, which is not given", hint=hint)
    output.hide_bars_of_the_hub()
    if dry_run:
        _plan(options, as_json=as_json, quiet=quiet)
        return 0
    from milora_init.cli.progress_bar import Bar

    if options.part is not None:
        if limits:
            raise UsageError("--fail-on needs all weights, not a part of them", hint="give it to the last command")
        with Bar(quiet=quiet, verbose=verbose) as bar:
            bar.started = STARTED
            made = _run_part(options, bar, overwrite_repository=yes)
        _print_part(made, as_json=as_json, quiet=quiet)
        return 0
    with Bar(quiet=quiet, verbose=verbose) as bar:
        bar.started = STARTED
        result = _run(options, bar, overwrite_repository=overwrite or yes)
    exceeded = output.exceeded_limits(limits, result.manifest)
    _print_result(result, exceeded, as_json=as_json, quiet=quiet)
    for limit in exceeded:
        output.print_exceeded(limit)
    return 1 if exceeded else 0


def _only_model(argument: str | None, option: str | None) -> str | None:
    """The model, which is given as the first word or by --model. Raises UsageError for a command in its place."""
    from milora_init.cli.main import COMMANDS

    if argument is not None and argument in COMMANDS and not Path(argument).exists():
        raise UsageError(
            f"options stand before the command `{argument}`",
            hint=f"write the command first: milora-init {argument} ...; its options: milora-init {argument} --help",
        )
    if argument is not None and option is not None and argument != option:
        raise UsageError(f"two models are given: {argument} and {option}", hint="drop one of them")
    return option if argument is None else argument


def _names(given: list[str] | None) -> list[str] | None:
    return [name for text in given for name in split_names(text)] if given else None


def _run(options: InitOptions, bar: Bar, *, overwrite_repository: bool) -> InitResult:
    from milora_init.api import run

    bar.planning(options.model)
    return run(options, progress=bar, overwrite_repository=overwrite_repository)


def _run_part(options: InitOptions, bar: Bar, *, overwrite_repository: bool) -> PartResult:
    from milora_init.api import run_part

    bar.planning(options.model)
    return run_part(options, progress=bar, overwrite_repository=overwrite_repository)


def _print_part(result: PartResult, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        output.json_output.give(result.to_json())
    elif not quiet:
        with may_be_lost():
            output.print_part(result, elapsed_s=time.monotonic() - STARTED)


def _plan(options: InitOptions, *, as_json: bool, quiet: bool) -> None:
    """Print the plan."""
    from milora_init.cli.progress_bar import waiting

    with waiting(f"reading headers and module names of {options.model}", quiet=quiet or as_json):
        from milora_init.hub.source import locate_model
        from milora_init.plan.peft_check import require_loadable
        from milora_init.plan.plan import describe, make_plan
        from milora_init.run.devices import multiply_rate
        from milora_init.run.initialize import look
        from milora_init.run.pool import solver_devices, weights_in_memory
        from milora_init.run.scan import measured_targets

        located = locate_model(options)
        measured = measured_targets(options, *located)
        plan = make_plan(options, *located, measured=measured)
        require_loadable(plan)
        estimate_s = plan.solve_flops / multiply_rate(solver_devices(plan)[0][0])
        at_once, others = weights_in_memory(plan)
        state: str = "refused"
        refusal: OutputError | None = None
        try:
            state = look(plan)
        except OutputError as error:
            refusal = error
    if as_json:
        planned = describe(plan, at_once, estimate_s, others)
        if refusal:
            planned["warnings"] = [*planned["warnings"], f"the run would be refused: {refusal.message}; {refusal.hint}"]
        output.json_output.give({**planned, "out_state": state})
    elif not quiet:
        output.print_plan(plan, estimate_s, plan.peak_memory_bytes(at_once, others), measured)
        output.print_out_state(options.out, state, refusal)
    elif refusal:
        output.print_warnings([f"the run would be refused: {refusal.message}; {refusal.hint}"])


def _print_result(result: InitResult, exceeded: list[output.Exceeded], *, as_json: bool, quiet: bool) -> None:
    from milora_init.hub.model_card import write_step_summary

    write_step_summary(result.manifest, [limit.text for limit in exceeded])
    if as_json:
        limits = {"exceeded": [asdict(limit) for limit in exceeded], "exit_code": 1} if exceeded else {}
        output.json_output.give(result.to_json() | limits)
    elif not quiet:
        with may_be_lost():
            unchanged = result.status == "unchanged"
            output.print_summary(result.manifest, elapsed_s=None if unchanged else result.manifest.elapsed_s)
            if result.pushed:
                output.print_pushed(result.pushed)
