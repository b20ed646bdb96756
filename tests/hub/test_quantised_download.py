"""A quantised model on the Hub: scales in another file are read by range, and the bytes are those of a local run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import quantised
from support.hub_server import Command, Hub, client
from support.marks import wide
from support.tiny_models import contents

INIT = ("--model", "tiny/fp8", "--out", "out", "--rank", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised.save_fp8(tmp_path_factory.mktemp("fp8") / "model", files=quantised.codes_apart)


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    with Hub() as server:
        server.publish("tiny/fp8", source)
        yield server


def own_files(out: Path) -> dict[str, bytes]:
    """All files but those that name the source and the folder."""
    return {n: c for n, c in contents(out).items() if n not in ("milora_init.json", "lora/adapter_config.json")}


def test_shapes_that_bitsandbytes_keeps_in_the_weights_are_read_by_range(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    """NF4: the plan needs the JSON text beside each weight."""
    source = quantised.save_nf4(tmp_path / "nf4")
    start(source, out=str(tmp_path / "local"))
    with Hub() as hub:
        hub.publish("tiny/nf4", source)
        milora: Command = client(hub, tmp_path)
        done = milora("--model", "tiny/nf4", *INIT[2:], "--low-disk")
    assert done.returncode == 0, done.stderr
    assert own_files(tmp_path / "local") == own_files(tmp_path / "out")


@pytest.mark.parametrize("low_disk", [False, wide(True)])
def test_scales_in_a_file_that_comes_later_are_read_by_range(
    low_disk: bool, hub: Hub, source: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    milora: Command = client(hub, tmp_path)
    done = milora(*INIT, *(["--low-disk"] if low_disk else []))
    assert done.returncode == 0, done.stderr
    start(source, out=str(tmp_path / "local"))
    assert own_files(tmp_path / "local") == own_files(tmp_path / "out")


@pytest.mark.wide
@pytest.mark.parametrize("low_disk", [pytest.param(False, marks=pytest.mark.slow), True])
def test_parts_read_scales_of_files_that_other_parts_make_and_push(
    low_disk: bool, hub: Hub, source: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    milora: Command = client(hub, tmp_path)
    words = (*INIT, "--push-to-hub", "me/parts", *(["--low-disk"] if low_disk else []))
    for part in ("2/2", "1/2"):
        done = milora(*words, "--part", part)
        assert done.returncode == 0, done.stderr
    sent = dict(hub.uploads)
    done = milora(*words)
    assert done.returncode == 0, done.stderr
    assert {digest: hub.uploads[digest] for digest in sent} == sent  # no shard was made or sent again
    start(source, out=str(tmp_path / "local"))
    own = {"milora_init.json", "lora/adapter_config.json"}  # they name the source and the folder
    expected = {name: content for name, content in contents(tmp_path / "local").items() if name not in own}
    assert {name: hub.repositories["me/parts"].files[name] for name in expected} == expected


def test_a_range_that_fails_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    milora: Command = client(hub, tmp_path)
    count = 0

    def fail(method: str, path: str) -> int | None:
        nonlocal count
        count += "00002-of" in path and method == "GET"
        return 404 if count > 1 else None

    hub.fault = fail
    done = milora(*INIT)
    assert done.returncode == 1
    assert not (tmp_path / "out" / "config.json").exists()
    hub.fault = lambda *_: None
    assert milora(*INIT).returncode == 0


def test_without_a_base_only_the_parts_of_adapted_weights_are_read(hub: Hub, tmp_path: Path) -> None:
    """By range: codes from one file, scales from the other; and the factors are those of a local run."""
    milora: Command = client(hub, tmp_path)
    done = milora(*INIT, "--method", "rlmo", "--target", "q_proj")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["tiny/fp8"].files
    sizes = {name: len(content) for name, content in files.items() if name.endswith(".safetensors")}
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    # For the headers the first 100 kB are read, which is all of these small files; then the two weights of 64 x 64.
    assert hub.served[f"tiny/fp8/{first}"] == sizes[first] + 2 * 64 * 64
    assert hub.served[f"tiny/fp8/{second}"] == sizes[second] + 2 * 2 * 2 * 4
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
