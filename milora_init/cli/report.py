"""`milora-init report`: show a finished run again."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli.output import json_output
from milora_init.errors import UsageError


def report(
    out: Annotated[str, typer.Argument(help="The output folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="For a CI step or a pull request.")] = False,
) -> None:
    """Show a finished run again: its figures, its warnings and the lines that load the pair."""
    from dataclasses import replace
    from pathlib import Path

    from milora_init.cli.output import print_markdown, print_summary
    from milora_init.hub.model_card import step_summary
    from milora_init.manifest import require_manifest
    from milora_init.report import summary

    if as_json and as_markdown:
        raise UsageError("--json and --markdown contradict each other", hint="drop one of them")
    manifest = replace(require_manifest(Path(out).expanduser()), out=out)  # it may have been moved since
    if as_json:
        json_output.give(summary(manifest, unchanged=False))
    elif as_markdown:
        print_markdown(step_summary(manifest))
    else:
        print_summary(manifest)
