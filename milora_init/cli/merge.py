"""`milora-init merge PAIR --out DIR`: merge an adapter into its residual base."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import (
    Adapter,
    CacheDir,
    Json,
    Model,
    Overwrite,
    Pair,
    Quiet,
    Revision,
    Token,
    Verbose,
    completed_from,
)
from milora_init.cli.streams import may_be_lost
from milora_init.options import OUTPUT_DTYPES


def merge(
    pair: Pair,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.", show_default=False)],
    adapter: Adapter = None,
    model: Model = None,
    revision: Revision = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=completed_from(OUTPUT_DTYPES),
            help="Of the merged model: auto, float32, bfloat16 or float16.",
        ),
    ] = "auto",
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The most bytes of a file, such as 5GB. (default: the files of the base)"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The tokenizer to write. (default: the base's, or the adapter's if the vocabulary was resized)",
        ),
    ] = None,
    overwrite: Overwrite = False,
    cache_dir: CacheDir = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge an adapter into its residual base: one plain model.

    It is written in the original's dtype. Without --adapter the initial adapter is merged, which gives the original
    model again. With --model the entries that equal the original's are counted.

    [bold]Examples[/bold]

    milora-init merge ./svd_init --adapter ./trained --out ./merged

    milora-init merge ./svd_init --out ./back --model ./my-model
    """
    output.require_one_of_quiet_and_verbose(quiet, verbose)
    output.hide_bars_of_the_hub()
    from milora_init.cli.progress_bar import by_files

    with by_files("merging", quiet=quiet or as_json) as progress:
        from milora_init.export.merge import merge as merge_pair

        merged = merge_pair(
            pair, out, adapter=adapter, dtype=dtype, shard_size=shard_size, tokenizer=tokenizer, overwrite=overwrite,
            model=model, revision=revision,
            cache_dir=cache_dir, token=token, progress=progress,
        )  # fmt: skip
    if as_json:
        output.json_output.give(merged.to_json())
    elif not quiet:
        with may_be_lost():
            output.print_merged(merged, verbose=verbose)
