"""`milora-init report PAIR`: show a finished run again."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import Adapter, CacheDir, Html, Json, Model, Pair, Plot, Quiet, Token, Verbose
from milora_init.errors import UsageError


def report(
    pair: Pair,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a CI step.")] = False,
    html: Html = None,
    plot: Plot = None,
    adapter: Adapter = None,
    model: Model = None,
    cache_dir: CacheDir = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the figures of a finished run again, and the lines that load the pair.

    With --json, `weights` has the record of every weight. With --adapter the report is on the training: how far each
    weight moved, how much of it into the smallest and the largest directions of the original weight, and how many
    intruder dimensions it got.

    [bold]Examples[/bold]

    milora-init report ./svd_init

    milora-init report ./svd_init --html report.html
    """
    output.require_one_of_quiet_and_verbose(quiet, verbose)
    if as_json and as_markdown:
        raise UsageError("--json and --markdown exclude each other", hint="drop one of them")
    if adapter is not None and (as_markdown or html):
        option = "--markdown" if as_markdown else "--html"
        raise UsageError(f"--adapter and {option} exclude each other", hint="use --plot or --json with --adapter")
    if model is not None and adapter is None:
        raise UsageError("--model is for a report on a trained adapter", hint="add --adapter DIR, or drop --model")
    output.hide_bars_of_the_hub()
    if adapter is not None:
        _report_training(
            pair, adapter, model, plot=plot, as_json=as_json, quiet=quiet, cache_dir=cache_dir, token=token
        )
        return
    from dataclasses import replace

    from milora_init.pictures.files import prepared

    write_html, write_plot = prepared(html, "--html"), prepared(plot, "--plot")
    from milora_init.hub.pair import locate_pair
    from milora_init.records import require_pair

    folder = locate_pair(pair, only="record", cache_dir=cache_dir, token=token)
    manifest = replace(require_pair(folder, pair), out=pair)  # the folder may have been moved since
    if write_html:
        from milora_init.pictures.page import report_page

        write_html(report_page(manifest).encode())
    if write_plot:
        from milora_init.pictures.plots import report_plot

        write_plot(report_plot(manifest))
    if as_json:
        from milora_init.report import report_json

        output.json_output.give(report_json(manifest))
    elif as_markdown:
        from milora_init.hub.model_card import step_summary

        output.print_markdown(step_summary(manifest))
    elif not quiet:
        output.print_summary(manifest, elapsed_s=manifest.elapsed_s, verbose=verbose)
        output.print_written(html, plot)


def _report_training(
    pair: str,
    adapter: str,
    model: str | None,
    *,
    plot: str | None,
    as_json: bool,
    quiet: bool,
    cache_dir: str | None,
    token: str | None,
) -> None:
    """Measure what a training did to the weights, and show it."""
    from milora_init.pictures.files import prepared

    write_plot = prepared(plot, "--plot")
    from milora_init.cli.progress_bar import by_weights

    with by_weights("measuring", quiet=quiet or as_json) as measured:
        from milora_init.export.merge import plan_of
        from milora_init.export.movement import groups, measure, movement_json, movement_plot
        from milora_init.lora.compatibility import UNTRAINED

        plan, folder = plan_of(pair, adapter, model=model, cache_dir=cache_dir, token=token)
        weights = measure(plan, folder, measured)
    warnings = [f"{adapter} {UNTRAINED}"] if plan.untrained else []
    if write_plot:
        write_plot(movement_plot(weights, f"{adapter} on {pair}"))
    if as_json:
        output.json_output.give(movement_json(plan.manifest, adapter, weights, warnings))
    elif not quiet:
        if plan.untrained:  # the figures would be those of rounding
            output.print_warnings(warnings)
        else:
            output.print_movement(groups(weights), pair=pair, adapter=adapter)
        output.print_written(None, plot)
