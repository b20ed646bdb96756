"""The layout: folders import only downwards, and some packages are imported in one folder only."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fork_server

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "milora_init"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# A folder imports only from folders above it in this list, and from itself.
FOLDERS = [
    ".",  # errors, options, manifest, report, accuracy, spectra
    "checkpoint",
    "linalg",
    "pictures",
    "model",
    "lora",
    "hub",
    "plan",
    "verification",
    "run",
    "export",
    "cli",
]
INDEPENDENT = ("checkpoint", "linalg")  # linalg knows no files, checkpoint knows no mathematics
ENTRY_POINTS = {"__init__.py", "__main__.py", "api.py", "result.py"}  # they may import from any folder

# The only folder or file that may import a package.
ONLY_IN = {"huggingface_hub": "hub", "typer": "cli", "rich": "cli", "yaml": "options.py", "ray": "ray_makers.py"}
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "ssl"}
PICKLES = {"pickle", "marshal", "shelve", "dill"}


def tree(file: Path) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imports(file: Path) -> Iterator[str]:
    """Full names of all imports of a file, also those inside functions and for type checkers."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else "."


def own_folders(file: Path) -> set[str]:
    """The package's folders that a file imports from."""
    names = [name.split(".") for name in imports(file) if name.split(".")[0] == "milora_init"]
    return {parts[1] if (PACKAGE / parts[1]).is_dir() else "." for parts in names if len(parts) > 1}


def test_every_folder_is_in_the_list() -> None:
    assert {folder_of(file) for file in FILES} == set(FOLDERS)
    assert {len(file.parts) for file in FILES} <= {1, 2}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_downwards(folder: str) -> None:
    below = set(FOLDERS[: FOLDERS.index(folder) + 1])
    wrong = {str(f): own_folders(f) - below for f in FILES if folder_of(f) == folder and str(f) not in ENTRY_POINTS}
    assert {file: folders for file, folders in wrong.items() if folders} == {}


def test_linalg_and_checkpoint_do_not_import_each_other() -> None:
    for file in FILES:
        if folder_of(file) in INDEPENDENT:
            assert own_folders(file) & set(INDEPENDENT) <= {folder_of(file)}
        if folder_of(file) == "linalg":
            above = {name for name in imports(file) if name.startswith("milora_init.") and ".linalg" not in name}
            assert {name.split(".")[1] for name in above} <= {"methods", "accuracy"}
            assert {name.split(".")[0] for name in imports(file)} & {"os", "pathlib", "safetensors", "io"} == set()


@pytest.mark.parametrize("file", FILES, ids=str)
def test_restricted_packages_are_imported_only_in_their_folder(file: Path) -> None:
    packages = {name.split(".")[0] for name in imports(file)}
    assert packages & NETWORK == set()
    assert packages & PICKLES == set()
    assert {name for name, place in ONLY_IN.items() if name in packages and place not in file.parts} == set()


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_module_runs_code_from_a_file(file: Path) -> None:
    """torch.load only with weights_only=True; no eval or exec; no constant trust_remote_code=True."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "__import__")
            if called == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True"
            assert not any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "True" for k in node.keywords)


@pytest.mark.parametrize(
    "module", ["milora_init", "milora_init.cli.main", "milora_init.options", "milora_init.cli.output"]
)
def test_the_modules_that_start_the_command_line_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'huggingface_hub'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def require_the_public_names() -> None:
    fork_server.forget("milora_init")
    import milora_init

    for name in milora_init.__all__:
        assert getattr(milora_init, name) is not None
    importlib.import_module("milora_init.verification.verify")
    assert dir(milora_init) == milora_init.__all__
    assert callable(milora_init.verify)
    assert callable(milora_init.initialize)


def test_the_public_names_are_the_documented_ones() -> None:
    done = fork_server.run(require_the_public_names)
    assert done.returncode == 0, done.stderr
