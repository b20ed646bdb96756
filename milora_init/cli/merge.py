"""`milora-init merge`: merge an adapter into its residual base."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli.output import hide_the_hubs_bars, json_output
from milora_init.cli.streams import optional


def merge(
    base: Annotated[str, typer.Argument(metavar="OUT", help="The output folder: the residual base.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write.")],
    adapter: Annotated[str | None, typer.Option(help="The trained adapter. (default: the one in OUT)")] = None,
    against: Annotated[
        str | None, typer.Option(help="The source, folder or Hub id: count the entries that are its to the bit.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Hub cache.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Merge an adapter into its residual base: one plain model in the source's dtype."""
    from dataclasses import asdict

    from milora_init.cli.output import print_merged
    from milora_init.cli.progress_bar import by_files
    from milora_init.export.merge import merge as join

    hide_the_hubs_bars()
    with by_files("merging", quiet=quiet) as progress:
        merged = join(
            base, out, adapter=adapter, overwrite=overwrite, model=against, revision=revision,
            cache_dir=cache_dir, token=token, progress=progress,
        )  # fmt: skip
    if as_json:
        told = {name: value for name, value in asdict(merged).items() if name not in ("inputs", "unchanged")}
        json_output.give({"status": "unchanged" if merged.unchanged else "done", **told})
    elif not quiet:
        with optional():
            print_merged(merged)
