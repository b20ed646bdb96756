"""`milora-init verify PAIR`: check whether a base and an adapter belong together."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import (
    Adapter,
    CacheDir,
    Json,
    Model,
    Pair,
    Quiet,
    Revision,
    Token,
    TrustRemoteCode,
)
from milora_init.cli.streams import may_be_lost

_MOST_ANNOTATIONS = 5  # GitHub shows at most ten for a step


def verify(
    pair: Pair,
    model: Model = None,
    all_components: Annotated[
        bool, typer.Option("--all", help="With --model: compute all components again, not a sample.")
    ] = False,
    adapter: Adapter = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    cache_dir: CacheDir = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print all differences, not only the first.")
    ] = False,
) -> int:
    """Check that base and adapter belong together and are unchanged.

    Exit status 0 is yes, 1 is no. Knows pairs, adapters, merged models and converted adapters.

    [bold]Examples[/bold]

    milora-init verify ./svd_init

    milora-init verify ./svd_init --model meta-llama/Llama-2-7b-hf

    milora-init verify ./svd_init --adapter ./trained
    """
    output.require_one_of_quiet_and_verbose(quiet, verbose)
    output.hide_bars_of_the_hub()  # two bars would overwrite each other
    from milora_init.cli.progress_bar import waiting

    with waiting("reading and comparing", quiet=quiet or as_json):
        from milora_init.api import verify as verify_pair

        verdict = verify_pair(
            pair, model=model, revision=revision, all_components=all_components, adapter=adapter,
            trust_remote_code=trust_remote_code, cache_dir=cache_dir, token=token,
        )  # fmt: skip
    if as_json:
        output.json_output.give(verdict.to_json())
    elif not quiet or not verdict.ok:
        with may_be_lost():  # the exit status is the answer
            output.print_verdict(verdict, verbose=verbose)
    for difference in verdict.differences[:_MOST_ANNOTATIONS]:
        output.annotate(f"{pair} is {verdict.text}; {difference.where}: {difference.what}", difference.hint)
    return 0 if verdict.ok else 1
