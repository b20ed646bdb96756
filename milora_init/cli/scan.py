"""`milora-init scan MODEL`: show the singular spectra of a model's weights."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import CacheDir, Html, Json, Plot, Quiet, Revision, Token, TrustRemoteCode, Verbose
from milora_init.errors import UsageError
from milora_init.options import split_names


def scan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model: a folder or a Hub id.", show_default=False)],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            metavar="NAME",
            help="Which weights: names and patterns as in init. (default: what init adapts)",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Which weights not. Repeatable.", show_default=False)
    ] = None,
    rank: Annotated[
        list[str] | None,
        typer.Option(
            "--rank", "-r", metavar="N", help="Give figures for these ranks: 8,16. (default: 8, 16, 32, 64, 128)"
        ),
    ] = None,
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="With --json: all singular values of each weight.")
    ] = False,
    html: Html = None,
    plot: Plot = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a line for each weight.")] = False,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N. Repeatable. (default: auto)"),
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Of a multimodal model: scan the text-only class.")
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    cache_dir: CacheDir = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the singular spectra of a model's weights, to choose rank, targets and dtype.

    Each weight is read once, and nothing is written but the page or picture that is asked for.

    [bold]Examples[/bold]

    milora-init scan ./my-model

    milora-init scan meta-llama/Llama-2-7b-hf --target all-linear --html scan.html
    """
    output.require_one_of_quiet_and_verbose(quiet, verbose)
    forms = {"--json": as_json, "--markdown": as_markdown, "--csv": as_csv}
    given = [name for name, wanted in forms.items() if wanted]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint="choose one")
    if spectrum and not as_json:
        raise UsageError("--spectrum is given without --json, which alone prints all values", hint="add --json")
    output.hide_bars_of_the_hub()
    from milora_init.cli.progress_bar import Bar

    with Bar(quiet=quiet, verbose=verbose) as bar:
        bar.planning(model)
        from milora_init.api import scan as scan_model

        result = scan_model(
            model, target=_names(target), exclude=_names(exclude) or (), rank=_ranks(rank), spectrum=spectrum,
            html=html, plot=plot, device=device or ("auto",), text_only=text_only, revision=revision,
            trust_remote_code=trust_remote_code, cache_dir=cache_dir, token=token, progress=bar,
        )  # fmt: skip
    if as_json:
        output.json_output.give(result.to_json())
    elif as_csv:
        output.print_text(result.to_csv())
    elif as_markdown:
        from milora_init.hub.model_card import scan_summary

        output.print_markdown(scan_summary(result))
    elif not quiet:
        output.print_scan(result, verbose=verbose)
        output.print_written(html, plot)


def _ranks(given: list[str] | None) -> list[int] | None:
    """The ranks, which may be separated by commas. Raises UsageError."""
    words = [word.strip() for text in given or () for word in text.split(",")]
    for word in words:
        if not word.isdecimal():
            raise UsageError(f"--rank {word!r} is not a number", hint="for example --rank 8,16,32")
    return [*map(int, words)] or None


def _names(given: list[str] | None) -> list[str] | None:
    return [name for text in given for name in split_names(text)] if given else None
