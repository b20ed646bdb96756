"""Fixtures for every test: no network, no settings of the developer, tiny checkpoints built once."""

from __future__ import annotations

import gc
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from milora_init.run.makers import LocalMakers
from support import examples, remembered, tiny_models
from support.runs import initialize

# Hypothesis draws the same examples in every run: a test result changes only if the code changes.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

pytest_plugins = ["support.hub_server", "support.training_folders"]

Built = Callable[..., Path]


def pytest_collection_finish() -> None:
    """Keep the garbage collector from searching all that is imported and collected, again and again."""
    gc.collect()
    gc.freeze()


class NetworkUsedError(RuntimeError):
    """A test tried to use the network."""


def _is_local(host: object) -> bool:
    return host in ("127.0.0.1", "localhost")


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections and name lookups raise, except for 127.0.0.1 and Unix sockets."""
    if request.node.get_closest_marker("network"):
        return

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: socket.socket, *args: Any) -> Any:
            address = args[-1]
            is_remote = isinstance(address, tuple) and not _is_local(address[0])
            if is_remote and self.family != socket.AF_UNIX:
                raise NetworkUsedError(f"a test tried to reach {address}; mark it `network` if it must")
            return method(self, *args)

        return call

    def resolved(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(host: object, *args: Any, **kwargs: Any) -> Any:
            if host is not None and not _is_local(host):
                raise NetworkUsedError(f"a test tried to look up {host!r}; mark it `network` if it must")
            return function(host, *args, **kwargs)

        return call

    for name in ("connect", "connect_ex", "sendto", "sendmsg"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    for name in ("getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, resolved(getattr(socket, name)))


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the environment variables by which a developer configures the program."""
    for name in ("HF_TOKEN", "MILORA_DEBUG", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("MILORA_PICTURE", "0")  # drawing one takes longer than the rest of a push


@pytest.fixture(scope="session", autouse=True)
def _models_are_asked_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        remembered.remember(patch)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """checkpoint(kind, dtype="float32") is a tiny model's folder with several shards; tests must not write into it."""
    built: dict[tuple[str, str], Path] = {}

    def get(kind: str, dtype: str = "float32") -> Path:
        if (kind, dtype) not in built:
            folder = tmp_path_factory.mktemp(f"{kind.replace(' ', '-')}-{dtype}-")
            built[kind, dtype] = tiny_models.save(folder, kind, getattr(torch, dtype))
        return built[kind, dtype]

    return get


@pytest.fixture(scope="session")
def pickled(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """pickled(shards) is the tiny llama in float32 as one pytorch_model.bin, or as several with an index."""
    built: dict[int, Path] = {}

    def get(shards: int) -> Path:
        if shards not in built:
            folder = tmp_path_factory.mktemp(f"pickled-{shards}-")
            built[shards] = tiny_models.as_pickles(checkpoint("llama"), folder, shards=shards)
        return built[shards]

    return get


@pytest.fixture
def own(checkpoint: Built, tmp_path: Path) -> Built:
    """own(kind, dtype="float32") is a copy of a tiny checkpoint that the test may change."""

    def get(kind: str, dtype: str = "float32") -> Path:
        folder = tmp_path / "own"
        folder.mkdir()
        for path in checkpoint(kind, dtype).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return get


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Manifest]:
    """start(model, **options) runs `initialize` on the CPU. The output is tmp_path/out unless `out` is given."""

    def run(model: Path, /, **options: Any) -> Manifest:
        progress = options.pop("progress", None)
        given = {"out": str(tmp_path / "out"), "rank": 4, "device": ("cpu",), **options}
        return initialize(InitOptions(model=str(model), **given), progress=progress)

    return run


@pytest.fixture(scope="session")
def finished(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """finished(kind="llama", dtype="float32", **options) is an output, made once; tests must not write into it."""
    built: dict[str, Path] = {}

    def get(kind: str = "llama", dtype: str = "float32", **options: Any) -> Path:
        key = repr((kind, dtype, sorted(options.items())))
        if key not in built:
            out = tmp_path_factory.mktemp("finished-") / "out"
            given: dict[str, Any] = {"rank": 4, "device": ("cpu",), **options}
            initialize(InitOptions(model=str(checkpoint(kind, dtype)), out=str(out), **given))
            built[key] = out
        return built[key]

    return get


@pytest.fixture
def out(finished: Built, tmp_path: Path) -> Path:
    """A copy of the tiny llama's output in tmp_path/out; base_model_name_or_path still names the first folder."""
    return Path(shutil.copytree(finished(), tmp_path / "out"))


@pytest.fixture
def file_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of an output is begun only when the one before it was recorded: for tests that count finished files."""
    monkeypatch.setattr(LocalMakers, "MOST_FILES", 1)


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """example_files(folder) copies the files of the documentation's examples into a folder."""
    made = tmp_path_factory.mktemp("examples")
    examples.make(made)

    def copy(folder: Path) -> None:
        shutil.copytree(made, folder, dirs_exist_ok=True)

    return copy
