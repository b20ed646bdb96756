"""Options that several commands share, each declared once; and older or foreign spellings of options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated

import typer

from milora_init.errors import UsageError
from milora_init.options import DTYPE_FLAGS, SYNONYMS, recipe_names


def completed_from(values: Iterable[str]) -> Callable[[str], list[str]]:
    """What a shell completes an option's value from: the values that begin as the typed word does."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def complete_recipe(incomplete: str) -> list[str]:
    """The same from the names of the recipes."""
    return completed_from(recipe_names())(incomplete)


Pair = Annotated[
    str,
    typer.Argument(metavar="PAIR", help="The folder that milora-init wrote, or its Hub id.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="The original model: folder or Hub id.", show_default=False),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", metavar="DIR", help="The trained adapter: folder or Hub id.", show_default=False),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of the original model.", show_default=False),
]
CacheDir = Annotated[str | None, typer.Option(metavar="DIR", help="Cache of the Hub's files.", show_default=False)]
Token = Annotated[str | None, typer.Option(metavar="TOKEN", help="Hub token.", envvar="HF_TOKEN", show_default=False)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code in the model's own repository.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")]
Html = Annotated[
    str | None,
    typer.Option("--html", metavar="FILE", help="Write a self-contained page with pictures.", show_default=False),
]
Plot = Annotated[
    str | None,
    typer.Option("--plot", metavar="FILE", help="Write a picture (PNG); needs matplotlib.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more: each weight, shard, module or file.")]

# Spellings that are accepted and not shown. None: the value is an argument without an option.
_OTHER_SPELLINGS: Mapping[str, Mapping[str, str | None]] = {
    "init": {"--config": "--recipe", **{f"--{old.replace('_', '-')}": f"--{new}" for old, new in SYNONYMS.items()}},
    "scan": {"--model": None, "--targets": "--target", "--ranks": "--rank"},
    "verify": {"--against": "--model"},
    "merge": {"--against": "--model", "--output-dir": "--out"},
    "convert": {"--base": "--model", "--trained": "--adapter", "--init": None, "--output-dir": "--out"},
    "push": {"--revision": "--branch", "--yes": "--overwrite"},
}


def current_spelling(command: str, words: list[str]) -> list[str]:
    """The words of a command with the option names that `--help` shows.

    Raises:
        UsageError: One option is given by two names.
    """
    spellings = _OTHER_SPELLINGS.get(command, {})
    found: list[str] = []
    given: dict[str | None, str] = {}  # the spelling of each option
    for place, word in enumerate(words):
        if word == "--":
            return [*found, *words[place:]]
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            found.append(word)
            continue
        as_given, name = name, name.replace("_", "-")
        dtype = DTYPE_FLAGS.get(name.removeprefix("--")) if command == "init" and not equals else None
        current = "--dtype" if dtype else spellings.get(name, name)
        if given.setdefault(current, as_given) != as_given and current is not None:
            raise UsageError(f"{given[current]} and {as_given} are two names of one option", hint="keep one of them")
        if dtype:
            found += ["--dtype", dtype]
        else:
            found += [value] * bool(equals) if current is None else [f"{current}{equals}{value}"]
    return found
