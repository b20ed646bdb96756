"""`milora-init push`: push a finished output to the Hub."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from milora_init.cli.output import hide_the_hubs_bars, json_output
from milora_init.cli.streams import optional


def push(
    out: Annotated[str, typer.Argument(help="The output folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="The repository: org/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private/--public", help="If it is made now.")] = True,
    revision: Annotated[str | None, typer.Option(help="The branch to write to.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Also over a repository of something else.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Push a finished output to the Hub: the base at the root, the adapter in lora/, and a model card."""
    if quiet or as_json or not sys.stderr.isatty():
        hide_the_hubs_bars()
    from dataclasses import asdict

    from milora_init.cli.output import print_published
    from milora_init.hub.upload import push as publish

    published = publish(out, repo, private=private, revision=revision, token=token, overwrite=yes)
    if as_json:
        json_output.give({"status": "done", **asdict(published)})
    elif not quiet:
        with optional():
            print_published(published.url)
