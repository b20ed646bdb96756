"""workers: one device or several, the same results; the first error is the one that is heard."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from milora_init import decompose
from milora_init.errors import UsageError
from milora_init.workers import multiply_rate, resolve_devices, run

CPU = torch.device("cpu")


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "names", "expected"),
    [
        (0, ["auto"], ["cpu"]),
        (0, ["cpu", "cpu"], ["cpu"]),
        (2, ["auto"], ["cuda:0", "cuda:1"]),
        (2, ["cuda"], ["cuda:0", "cuda:1"]),
        (2, ["cuda:1"], ["cuda:1"]),
        (2, ["cuda:1", "cpu", "cuda"], ["cuda:1", "cpu", "cuda:0"]),
    ],
)
def test_devices_are_those_that_are_there(
    count: int, names: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(count, monkeypatch)
    assert [str(device) for device in resolve_devices(names)] == expected


@pytest.mark.parametrize(
    ("count", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2"), (2, "gpu"), (0, "meta"), (0, "")]
)
def test_a_device_that_is_not_there_is_a_usage_error_that_lists_those_that_are(
    count: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(count, monkeypatch)
    with pytest.raises(UsageError, match=f"no device {name!r}") as caught:
        resolve_devices(["cpu", name])
    assert caught.value.hint == "this machine has: " + ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])


def test_the_rate_of_this_machine_is_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0, monkeypatch)
    assert 1e6 < multiply_rate() < 1e15


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_job_is_done_once(count: int) -> None:
    results = list(run(range(30), [CPU] * count, lambda job, device: (job, device.type)))
    assert sorted(results) == [(job, "cpu") for job in range(30)]


def test_no_jobs_are_no_results() -> None:
    assert list(run([], [CPU], lambda job, _: job)) == []
    assert list(run([], [CPU] * 3, lambda job, _: job)) == []


def test_one_device_works_in_the_callers_thread() -> None:
    (thread,) = run([0], [CPU], lambda *_: threading.current_thread())
    assert thread is threading.current_thread()


def test_several_devices_work_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)
    assert len(list(run(range(3), [CPU] * 3, lambda *_: together.wait()))) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_is_raised_and_the_dealing_stops(count: int) -> None:
    begun = []

    def work(job: int, _: torch.device) -> int:
        begun.append(job)
        if job == 3:
            raise KeyError("the first")
        time.sleep(0.005)
        return job

    with pytest.raises(KeyError, match="the first"):
        list(run(range(500), [CPU] * count, work))
    assert len(begun) < 500
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("milora-")]


def test_a_caller_who_leaves_early_waits_for_no_new_job() -> None:
    begun = []

    def work(job: int, _: torch.device) -> int:
        begun.append(job)
        time.sleep(0.005)
        return job

    results = run(range(500), [CPU] * 2, work)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 500
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("milora-")]


def test_several_devices_make_the_same_bytes_as_one(
    start: Callable[..., Any], checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, devices in (("one", (CPU,)), ("three", (CPU,) * 3)):
        monkeypatch.setattr(decompose, "resolve_devices", lambda _, devices=devices: devices)
        monkeypatch.chdir(tmp_path)
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        start(checkpoint("llama", "bfloat16"), out="out", mode="random")
    one, three = (tiny_models.contents(tmp_path / name / "out") for name in ("one", "three"))
    del one["milora_init.json"], three["milora_init.json"]  # it holds seconds
    assert one == three
