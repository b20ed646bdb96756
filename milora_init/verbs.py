"""The verbs beside the main job: judge, show and push an output, take a trained adapter back. One call, and print."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from milora_init.errors import UsageError
from milora_init.streams import optional

_ANNOTATIONS = 5  # of a verdict; GitHub shows ten of a step


class Answer:
    """The one JSON object that a command prints. What comes after it, a signal say, adds no second one."""

    def __init__(self) -> None:
        self._given = False

    def expect(self) -> None:
        """A command begins."""
        self._given = False

    def give(self, content: Mapping[str, Any]) -> None:
        """Print the object, if none was."""
        if not self._given:
            self._given = True
            from milora_init.terminal import print_json

            print_json(content)


answer = Answer()


def hide_the_hubs_bars() -> None:
    """Draw none of huggingface_hub's progress bars."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported
    if "huggingface_hub" in sys.modules:
        from milora_init.hub import hide_bars

        hide_bars()


def verify(
    out: Annotated[str, typer.Argument(help="The output folder.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(help="The source, to judge every tensor by: local folder or Hub id.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="With --against: solve every component anew, not a sample.")
    ] = False,
    adapter: Annotated[str | None, typer.Option(help="A trained adapter, to judge by the base in OUT.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the model's own repository.")
    ] = False,
    cache_dir: Annotated[str | None, typer.Option(help="Hub cache.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> int:
    """Say whether a folder holds a base and an adapter that belong together, and if not, what is wrong."""
    from milora_init.terminal import annotate, print_verdict, waiting
    from milora_init.verify import verify as judge

    hide_the_hubs_bars()  # they would be drawn over ours
    with waiting("reading and comparing", quiet=quiet):
        verdict = judge(
            out, model=against, revision=revision, every=every, trained=adapter,
            trust_remote_code=trust_remote_code, cache_dir=cache_dir, token=token,
        )  # fmt: skip
    if as_json:
        answer.give(verdict.to_json())
    elif not quiet or not verdict.ok:
        with optional():  # the exit status says it too
            print_verdict(verdict)
    for difference in verdict.differences[:_ANNOTATIONS]:
        annotate(f"{out} is {verdict.kind}; {difference.where}: {difference.what}", difference.hint)
    return 0 if verdict.ok else 1


def report(
    out: Annotated[str, typer.Argument(help="The output folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="For a CI step or a pull request.")] = False,
) -> None:
    """Show a finished run again: its figures, its warnings and the lines that load the pair."""
    from dataclasses import replace
    from pathlib import Path

    from milora_init.card import step_summary
    from milora_init.manifest import require_manifest
    from milora_init.report import summary
    from milora_init.terminal import print_markdown, print_summary

    if as_json and as_markdown:
        raise UsageError("--json and --markdown contradict each other", hint="drop one of them")
    manifest = replace(require_manifest(Path(out).expanduser()), out=out)  # it may have been moved since
    if as_json:
        answer.give(summary(manifest, unchanged=False))
    elif as_markdown:
        print_markdown(step_summary(manifest))
    else:
        print_summary(manifest)


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

    from milora_init.publish import push as publish
    from milora_init.terminal import print_published

    published = publish(out, repo, private=private, revision=revision, token=token, overwrite=yes)
    if as_json:
        answer.give({"status": "done", **asdict(published)})
    elif not quiet:
        with optional():
            print_published(published.url)


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

    from milora_init.merge import merge as join
    from milora_init.terminal import by_files, print_merged

    hide_the_hubs_bars()
    with by_files("merging", quiet=quiet) as progress:
        merged = join(
            base, out, trained=adapter, overwrite=overwrite, against=against, revision=revision,
            cache_dir=cache_dir, token=token, progress=progress,
        )  # fmt: skip
    if as_json:
        told = {name: value for name, value in asdict(merged).items() if name not in ("inputs", "unchanged")}
        answer.give({"status": "unchanged" if merged.unchanged else "done", **told})
    elif not quiet:
        with optional():
            print_merged(merged)


def convert(
    init: Annotated[str, typer.Option("--init", help="The adapter as it was before training: OUT/lora.")],
    trained: Annotated[str, typer.Option(help="The trained adapter.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write; must not exist.")],
    base: Annotated[str | None, typer.Option(help="The original model. (default: as the manifest says)")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Compress to it. (default: twice the rank)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Turn a trained adapter into a plain LoRA for the original model."""
    from dataclasses import asdict
    from pathlib import Path

    from milora_init.convert import convert
    from milora_init.terminal import print_converted, waiting
    from milora_init.trained import CONFIG, read_config

    with waiting("converting", quiet=quiet):
        modules = convert(*(Path(p).expanduser() for p in (init, trained, out)), base=base, rank=rank)
    if as_json:
        answer.give({"status": "done", "out": out, "modules": [asdict(m) for m in modules]})
    elif not quiet:
        original = read_config(Path(out).expanduser() / CONFIG)["base_model_name_or_path"]
        with optional():
            print_converted(out, original, modules, compressed=rank is not None)
