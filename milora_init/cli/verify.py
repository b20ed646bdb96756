"""`milora-init verify`: check whether a base and an adapter belong together."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli.output import hide_the_hubs_bars, json_output
from milora_init.cli.streams import optional

_ANNOTATIONS = 5  # GitHub shows at most ten for a step


def verify(
    pair: Annotated[str, typer.Argument(metavar="OUT", help="The folder that milora-init wrote.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(help="The original model, to compare every tensor with: local folder or Hub id.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the original model.")] = None,
    all_components: Annotated[
        bool, typer.Option("--all", help="With --against: compute all components again, not a sample.")
    ] = False,
    adapter: Annotated[str | None, typer.Option(help="A trained adapter, to check against the base in OUT.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the model's own repository.")
    ] = False,
    cache_dir: Annotated[str | None, typer.Option(help="Hub cache.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> int:
    """Say whether a folder holds a base and an adapter that belong together, and if not, what is wrong."""
    from milora_init.cli.output import annotate, print_verdict
    from milora_init.cli.progress_bar import waiting
    from milora_init.verify.verify import verify as verify_pair

    hide_the_hubs_bars()  # two bars would overwrite each other
    with waiting("reading and comparing", quiet=quiet):
        verdict = verify_pair(
            pair, model=against, revision=revision, all_components=all_components, adapter=adapter,
            trust_remote_code=trust_remote_code, cache_dir=cache_dir, token=token,
        )  # fmt: skip
    if as_json:
        json_output.give(verdict.to_json())
    elif not quiet or not verdict.ok:
        with optional():  # the exit status gives the answer, even if stdout is closed
            print_verdict(verdict)
    for difference in verdict.differences[:_ANNOTATIONS]:
        annotate(f"{pair} is {verdict.text}; {difference.where}: {difference.what}", difference.hint)
    return 0 if verdict.ok else 1
