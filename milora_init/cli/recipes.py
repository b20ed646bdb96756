"""`milora-init recipes [NAME]`: list the recipes, or print one."""

from __future__ import annotations

from typing import Annotated

import typer

from milora_init.cli import output
from milora_init.cli.params import Json, Quiet, complete_recipe
from milora_init.envelope import envelope
from milora_init.options import DEFAULT_RECIPE, read_recipe, recipe_names, recipe_text


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=complete_recipe,
            help="Print this recipe's YAML.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the recipes, or print one as YAML.

    [bold]Examples[/bold]

    milora-init recipes

    milora-init recipes math > mine.yaml
    """
    if as_json:
        names = recipe_names() if name is None else [name]
        output.json_output.give(envelope("recipes", "done", recipes={name: read_recipe(name) for name in names}))
    elif quiet:
        return
    elif name is None:
        output.print_recipes({name: read_recipe(name) for name in recipe_names()}, default=DEFAULT_RECIPE)
    else:
        output.print_text(recipe_text(name))
