"""The house: which file may import which, and who touches the network and the terminal."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "milora_init"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# Bottom to top: a file imports only from files before it. A new file takes its place here.
ORDER = [
    "errors", "untrusted", "layout", "safetensors_format", "safetensors_writer", "manifest", "cholesky", "scaled",
    "certificate",
    "krylov", "svd", "split", "digest", "checkpoint", "factors", "meta_model", "naming", "targets", "options",
    "adapter", "weight_plan", "plan", "self_check", "pieces", "supply", "output", "workers", "weight_job", "hub",
    "report", "card", "publish", "progress", "open_shard", "decompose", "audit", "trained", "kinship",
    "verify", "convert", "merge_shard", "merge", "streams", "terminal", "verbs", "cli", "__main__",
]  # fmt: skip

# Who alone may import a package, wherever in the file the import stands.
DOORKEEPERS = {
    "huggingface_hub": ("hub", "publish"), "typer": ("cli", "verbs"), "rich": ("terminal",),
    "yaml": ("options",),
}  # fmt: skip

# Ways to the network other than huggingface_hub: nobody takes them.
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "ssl"}


def imports(module: str) -> Iterator[str]:
    """Full names of all that a file imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Names of the package's own files that a file imports."""
    inside = (name.split(".")[1:2] for name in imports(module) if name.split(".")[0] == "milora_init")
    return {parts[0] for parts in inside if parts and parts[0] in MODULES}


def test_every_file_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_up_the_list(module: str) -> None:
    above = set(ORDER[: ORDER.index(module)])
    assert own_imports(module) <= above


@pytest.mark.parametrize("module", MODULES)
def test_packages_with_a_doorkeeper_enter_by_that_file_only(module: str) -> None:
    packages = {name.split(".")[0] for name in imports(module)}
    assert {package for package, keepers in DOORKEEPERS.items() if module not in keepers} & packages == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_file_reaches_the_network_past_the_hub(module: str) -> None:
    assert {name.split(".")[0] for name in imports(module)} & NETWORK == set()


def test_the_mathematics_knows_no_files_and_the_files_no_mathematics() -> None:
    mathematics = {"cholesky", "scaled", "certificate", "krylov", "svd", "split"}
    for module in mathematics:
        assert own_imports(module) <= mathematics
        assert {name.split(".")[0] for name in imports(module)} & {"os", "pathlib", "safetensors", "io"} == set()
    for module in ("safetensors_format", "checkpoint", "manifest"):
        assert own_imports(module) & mathematics == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_file_trusts_a_pickle(module: str) -> None:
    """torch.load only with weights_only=True, and no pickle, eval or exec at all."""
    assert {name.split(".")[0] for name in imports(module)} & {"pickle", "marshal", "shelve", "dill"} == set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "__import__")
            if called == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True"
            assert not any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "True" for k in node.keywords)


@pytest.mark.parametrize("module", ["milora_init", "milora_init.cli", "milora_init.options", "milora_init.terminal"])
def test_what_the_command_line_starts_with_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'huggingface_hub'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_the_promised_ones() -> None:
    import milora_init
    from milora_init.decompose import initialize
    from milora_init.options import InitOptions

    assert milora_init.initialize is initialize
    assert milora_init.InitOptions is InitOptions


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_the_tests_themselves_cannot_reach_the_network(address: tuple[str, int]) -> None:
    for name in ("connect", "connect_ex"):
        with socket.socket() as local, pytest.raises(RuntimeError, match="tried to reach"):
            getattr(local, name)(address)
    with socket.socket(type=socket.SOCK_DGRAM) as local, pytest.raises(RuntimeError, match="tried to reach"):
        local.sendto(b"x", address)
    with pytest.raises(RuntimeError, match="tried to"):
        socket.create_connection(address, timeout=1)


def test_the_tests_may_talk_to_themselves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        connection, _ = server.accept()
        with connection:
            client.sendall(b"x")
            assert connection.recv(1) == b"x"
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"y")
        assert other.recv(1) == b"y"


def test_the_readme_promises_the_architectures_that_are_tested() -> None:
    import support_table
    from families import FAMILIES

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == support_table.with_table(readme, support_table.table(FAMILIES))
