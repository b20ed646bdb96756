"""makers: every solver thread is busy, hashing holds up nobody, and an attempt that ends late replaces nothing."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.tiny_models import contents

from milora_init.checkpoint.hashing import sha256 as hash_file
from milora_init.errors import SolveError
from milora_init.linalg.split import split as split_weight
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest
from milora_init.run import initialize as initializing
from milora_init.run import makers, shard, weight
from milora_init.run.makers import LocalMakers
from milora_init.run.progress import Progress, ShardResult

CPU = torch.device("cpu")
TIMEOUT_S = 20  # long enough for a busy machine
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

Start = Callable[..., Manifest]


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 18 files that hold 40 weights to split: two or three each, as those of a large model."""
    folder = tmp_path_factory.mktemp("many-files")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    config.save_pretrained(folder)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    split = [name for name in tensors if name.split(".")[-2] in TARGETS]
    assert len(split) == 40
    file_of = {name: f"model-{number % 18 + 1:05d}-of-00018.safetensors" for number, name in enumerate(split)}
    file_of = {
        name: f"model-{number % 18 + 1:05d}-of-00018.safetensors" for number, name in enumerate(tensors)
    } | file_of
    for file in sorted(set(file_of.values())):
        held = {name: tensor.contiguous() for name, tensor in tensors.items() if file_of[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return folder


def solve_on(devices: int, threads_per_device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initializing, "solver_devices", lambda _: ((CPU,) * devices, threads_per_device))


@pytest.mark.parametrize(("devices", "threads_per_device"), [(16, 1), (8, 2)])
def test_all_devices_solve_at_the_same_time_until_less_weights_are_left_than_devices(
    devices: int, threads_per_device: int, many_files: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solves meet at a barrier as many at a time as there are devices: so the time is the ideal one.

    With 16 devices 40 weights take three rounds, with 8 devices five.
    """
    together = threading.Barrier(devices, timeout=TIMEOUT_S)
    begun: Iterator[int] = iter(range(40))
    real = split_weight

    def split(*args: Any, **kwargs: Any) -> Any:
        if next(begun) < 40 // devices * devices:
            together.wait()
        return real(*args, **kwargs)

    monkeypatch.setattr(weight, "split", split)
    solve_on(devices, threads_per_device, monkeypatch)
    assert len(start(many_files, rank=2, target=TARGETS).weights) == 40
    assert next(begun, None) is None


def test_weights_are_solved_while_files_are_hashed(
    many_files: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With eight makers: no hash ends before the last weight of their files and of the next ones is solved."""
    solved, all_solved, hashed = [0], threading.Event(), []
    real_split, real_sha256 = split_weight, hash_file

    def split(*args: Any, **kwargs: Any) -> Any:
        result = real_split(*args, **kwargs)
        solved[0] += 1
        if solved[0] == 16:
            all_solved.set()
        return result

    def sha256(path: Path, **kwargs: Any) -> str:
        hashed.append(all_solved.wait(TIMEOUT_S))
        return real_sha256(path, **kwargs)

    monkeypatch.setattr(weight, "split", split)
    monkeypatch.setattr(shard, "sha256", sha256)
    solve_on(8, 1, monkeypatch)
    start(many_files, rank=2, target=TARGETS)
    assert len(hashed) == 36  # each file and its part of the adapter once
    assert all(hashed)


def test_a_slow_file_does_not_stop_those_behind_it(
    many_files: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first weight of the first file ends when all others are solved. The files get their names in order."""
    others_solved, count, lock = threading.Event(), [0], threading.Lock()
    real = weight.run

    def run(job: Any, *rest: Any) -> Any:
        with lock:
            count[0] += 1
            mine = count[0]
        if mine == 1:
            assert others_solved.wait(TIMEOUT_S)
        result = real(job, *rest)
        with lock:
            count[0] += 1
        if count[0] >= 79:
            others_solved.set()
        return result

    class Names(Progress):
        def __init__(self) -> None:
            self.names: list[str] = []

        def shard(self, result: ShardResult[Any], *_: Any) -> None:
            self.names.append(result.shard)

    monkeypatch.setattr(weight, "run", run)
    solve_on(2, 1, monkeypatch)
    seen = Names()
    start(many_files, rank=2, target=TARGETS, progress=seen)
    assert seen.names == sorted(seen.names)
    assert len(seen.names) == 18


def test_any_number_of_files_at_a_time_makes_the_same_bytes(
    many_files: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name, devices, most in (("a", 1, 1), ("b", 16, None)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        solve_on(devices, 1, monkeypatch)
        monkeypatch.setattr(LocalMakers, "MOST_FILES", most)
        start(many_files, out="out", rank=2, target=TARGETS)
        made.append({file: content for file, content in contents(Path("out")).items() if file != MANIFEST})
    assert made[0] == made[1]
    assert len(made[0]) == 18 + 4  # and index, config.json and the adapter


def test_a_failed_weight_ends_the_run_and_removes_what_is_unfinished(
    many_files: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = weight.run, [0]

    def run(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 20:
            raise SolveError("the twentieth")
        return real(*args)

    monkeypatch.setattr(weight, "run", run)
    solve_on(8, 2, monkeypatch)
    with pytest.raises(SolveError, match="the twentieth"):
        start(many_files, rank=2, target=TARGETS)
    attempts = tmp_path / "out" / WORK_FOLDER / "attempts"
    assert not attempts.exists() or not [path for path in attempts.rglob("*") if path.suffix == ".partial"]
    monkeypatch.setattr(weight, "run", real)
    assert len(start(many_files, rank=2, target=TARGETS).weights) == 40
    assert not (tmp_path / "out" / WORK_FOLDER).exists()


def test_the_limit_on_open_files_is_raised_or_bounds_the_number_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, set_to = [(1024, 4096)], []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: set_to.append(limit))
    assert makers._most_open_files(16, 18) == 18
    assert set_to == []
    assert makers._most_open_files(256, 258) == 258
    assert set_to == [(64 + 4 * 256 + 3 * 258, 4096)]
    limits[0] = (1024, 1200)
    assert makers._most_open_files(256, 258) == (1200 - 64 - 4 * 256) // 3
    assert set_to[1:] == [(1200, 1200)]
    limits[0] = (256, 256)
    assert makers._most_open_files(256, 258) == 1
