"""`milora-init report PAIR`: show a finished run again."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import CacheDir, Json, Pair, Quiet, Token, Verbose
from milora_init.errors import UsageError


def report(
    pair: Pair,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a CI step.")] = False,
    cache_dir: CacheDir = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the figures of a finished run again, and the lines that load the pair.

    With --json, `weights` has the record of every weight.

    [bold]Example[/bold]

    milora-init report ./svd_init
    """
    output.require_one_of_quiet_and_verbose(quiet, verbose)
    if as_json and as_markdown:
        raise UsageError("--json and --markdown exclude each other", hint="drop one of them")
    output.hide_bars_of_the_hub()
    from dataclasses import replace

    from milora_init.hub.pair import locate_pair
    from milora_init.records import require_pair

    folder = locate_pair(pair, only="record", cache_dir=cache_dir, token=token)
    manifest = replace(require_pair(folder, pair), out=pair)  # the folder may have been moved since
    if as_json:
        from milora_init.report import report_json

        output.json_output.give(report_json(manifest))
    elif as_markdown:
        from milora_init.hub.model_card import step_summary

        output.print_markdown(step_summary(manifest))
    elif not quiet:
        output.print_summary(manifest, elapsed_s=manifest.elapsed_s, verbose=verbose)
