"""`milora-init push PAIR REPO`: push a finished output to the Hub."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import Json, Quiet, Token, Verbose
from milora_init.cli.streams import may_be_lost


def push(
    folder: Annotated[str, typer.Argument(metavar="PAIR", help="A folder that milora-init wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository: org/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private/--public", help="The repository, if it is created now.")] = True,
    branch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The branch to write to; it is created if it is not there. (default: main)",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Push also to a repository that holds something else.")
    ] = False,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Push a finished output to the Hub, with a model card.

    Pairs, merged models and converted adapters can be pushed. All files appear in one commit. A push that was
    interrupted sends only the missing files when it is repeated.

    [bold]Example[/bold]

    milora-init push ./svd_init me/llama-2-7b-milora
    """
    output.require_one_of_quiet_and_verbose(quiet, verbose)
    if quiet or as_json or not sys.stderr.isatty():
        output.hide_bars_of_the_hub()
    from milora_init.api import push as push_folder

    pushed = push_folder(folder, repo, private=private, branch=branch, token=token, overwrite=overwrite)
    if as_json:
        output.json_output.give(pushed.to_json())
    elif not quiet:
        with may_be_lost():
            output.print_pushed(pushed, verbose=verbose)
