"""Every command and Python example of README.md and docs/ runs, or says in the page why it is not run."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import yaml
from support import fork_server, shell_commands
from support.marks import wide

from milora_init.options import InitOptions

Files = Callable[[Path], None]
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("bash", "python", "yaml", "json", "text", "bibtex")
FENCE = re.compile(r"^(?:<!-- (?P<mark>(?:not )?run.*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
SHELL_ONLY = set("|<>&;$`")  # a block with one of these needs a shell


@dataclass(frozen=True)
class Snippet:
    """A code block. `mark` is the text of the comment in front of it."""

    page: str
    line: int
    language: str
    code: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(*languages: str) -> list[Snippet]:
    """The code blocks of all pages in these languages; in all of them if none is named."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text[: match.start("language")].count("\n") + 1
            name = str(page.relative_to(ROOT))
            found.append(Snippet(name, line, match["language"], match["code"], match["mark"] or ""))
    return [snippet for snippet in found if not languages or snippet.language in languages]


# `make test` runs the commands of these pages; those of the others are wide.
QUICK = ("README.md", "docs/index.md", "docs/errors.md", "docs/merge-convert.md", "docs/json.md")
RUN = [snippet for snippet in snippets("bash", "python") if not snippet.mark]


def test_every_code_block_is_found_and_names_a_known_language() -> None:
    for page in PAGES:
        fences = re.findall(r"^\s*```", page.read_text(encoding="utf-8"), re.M)
        name = str(page.relative_to(ROOT))
        assert len(fences) == 2 * len([snippet for snippet in snippets() if snippet.page == name]), name
    assert {snippet.language for snippet in snippets()} <= set(LANGUAGES)


@pytest.mark.parametrize("snippet", [snippet for snippet in snippets() if snippet.mark], ids=str)
def test_a_block_that_is_not_run_here_says_why_or_where(snippet: Snippet) -> None:
    assert snippet.language in ("bash", "python")
    if where := re.fullmatch(r"run by (\S+): (\w+)", snippet.mark):
        assert "docs" in (ROOT / where[1]).read_text(encoding="utf-8")
        assert snippet.page == "docs/trainers.md"
    else:
        assert re.fullmatch(r"not run: \w.{5,}", snippet.mark)


@pytest.mark.parametrize("snippet", [s if s.page in QUICK else wide(s) for s in RUN if s.language == "bash"], ids=str)
def test_the_commands_run(snippet: Snippet, example_files: Files, tmp_path: Path) -> None:
    example_files(tmp_path)
    lines = [line for line in snippet.code.replace("\\\n", "").splitlines() if line.strip()]
    _remove_outputs(snippet.code, tmp_path)
    if not all(line.startswith("milora-init ") for line in lines) or SHELL_ONLY & set(snippet.code):
        _run_in_a_shell(snippet.code, tmp_path)
        return
    for line in lines:
        done = fork_server.milora(*shlex.split(line, comments=True)[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def _remove_outputs(code: str, folder: Path) -> None:
    """Remove the example files that the commands write."""
    for name in re.findall(r"--out (\S+)", code):
        shutil.rmtree(folder / name, ignore_errors=True)


def _run_in_a_shell(code: str, folder: Path) -> None:
    with shell_commands.served(folder) as commands:
        environment = os.environ | {"PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        script = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("snippet", [s for s in RUN if s.language == "python"], ids=str)
def test_the_python_examples_run(snippet: Snippet, example_files: Files, tmp_path: Path) -> None:
    example_files(tmp_path)
    (tmp_path / "example.py").write_text(snippet.code, encoding="utf-8")
    done = fork_server.run(run_file, "example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def run_file(name: str) -> None:
    """Run a Python file as a script."""
    runpy.run_path(name, run_name="__main__")


@pytest.mark.parametrize("snippet", [s for s in snippets("yaml") if s.code.startswith("target:")], ids=str)
def test_the_recipes_are_read(snippet: Snippet, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(snippet.code, encoding="utf-8")
    InitOptions.from_recipe(str(recipe), model="m", out="o")


@pytest.mark.parametrize("snippet", [s for s in snippets("yaml") if s.code.startswith("- uses:")], ids=str)
def test_the_examples_of_the_action_name_its_inputs(snippet: Snippet) -> None:
    action = yaml.safe_load((ROOT / ".github" / "actions" / "prepare-base" / "action.yml").read_text(encoding="utf-8"))
    (step,) = yaml.safe_load(snippet.code)
    assert step["with"].keys() <= action["inputs"].keys()


@pytest.mark.parametrize("snippet", snippets("json"), ids=str)
def test_the_json_examples_follow_the_schema(snippet: Snippet) -> None:
    schema = json.loads((ROOT / "docs" / "output.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads(snippet.code), schema, jsonschema.Draft202012Validator)
