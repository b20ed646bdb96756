"""`milora-init convert`: convert a trained adapter into a plain LoRA of the original model."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli.output import json_output
from milora_init.cli.streams import optional


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

    from milora_init.cli.output import print_converted
    from milora_init.cli.progress_bar import waiting
    from milora_init.export.convert import convert
    from milora_init.lora.folder import CONFIG_FILE, read_config

    with waiting("converting", quiet=quiet):
        modules = convert(*(Path(p).expanduser() for p in (init, trained, out)), model=base, rank=rank)
    if as_json:
        json_output.give({"status": "done", "out": out, "modules": [asdict(m) for m in modules]})
    elif not quiet:
        original = read_config(Path(out).expanduser() / CONFIG_FILE)["base_model_name_or_path"]
        with optional():
            print_converted(out, original, modules, compressed=rank is not None)
