"""`milora-init convert PAIR --adapter DIR --out DIR`: make a trained adapter a plain LoRA of the original model."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import CacheDir, Json, Model, Overwrite, Pair, Quiet, Token, Verbose, completed_from
from milora_init.cli.streams import may_be_lost
from milora_init.serving import FORMS

_READER = "Reader"


def convert(
    pair: Pair,
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter", "-a", metavar="DIR", help="The trained adapter: folder or Hub id.", show_default=False
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.", show_default=False)],
    model: Model = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-r", metavar="N", help="Keep the best N directions. (default: twice the rank, exact)"),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Instead of --rank: keep this share of the energy of each module's update, such as 0.99.",
            show_default=False,
        ),
    ] = None,
    for_: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="NAME",
            autocompletion=completed_from(FORMS),
            help="What reads the adapter: peft, vllm or sglang.",
            rich_help_panel=_READER,
        ),
    ] = "peft",
    text_only: Annotated[
        bool | None,
        typer.Option(
            "--text-only/--no-text-only",
            help="Module names of the text-only class, or of the class in config.json.",
            show_default=False,
            rich_help_panel=_READER,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be kept and lost; write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    cache_dir: CacheDir = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a trained adapter into a plain LoRA of the original model.

    The plain LoRA needs no residual base. Its rank is twice the trained one, unless --rank or --energy cuts it.

    [bold]Examples[/bold]

    milora-init convert ./svd_init --adapter ./trained --out ./plain

    milora-init convert ./svd_init --adapter ./trained --out ./served --for vllm
    """
    output.require_one_of_quiet_and_verbose(quiet, verbose)
    output.hide_bars_of_the_hub()
    from milora_init.cli.progress_bar import waiting

    with waiting("converting", quiet=quiet or as_json):
        from milora_init.api import convert as convert_adapter

        converted = convert_adapter(
            pair, adapter, out, model=model, rank=rank, energy=energy, for_=for_, text_only=text_only,
            dry_run=dry_run,
            overwrite=overwrite, cache_dir=cache_dir, token=token,
        )  # fmt: skip
    if as_json:
        output.json_output.give(converted.to_json())
    elif not quiet:
        with may_be_lost():
            output.print_converted(converted, verbose=verbose)
