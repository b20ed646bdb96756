"""pool: on each device one thread solves while another reads, and the first error ends the pool."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from support import matrices
from support.marks import wide
from support.tiny_models import contents

from milora_init.errors import UsageError
from milora_init.linalg.svd import Triplets, singular_triplets
from milora_init.manifest import MANIFEST
from milora_init.methods import Mode
from milora_init.run import devices
from milora_init.run import initialize as initializing
from milora_init.run import pool as pools
from milora_init.run.devices import multiply_rate, resolve_devices
from milora_init.run.pool import DeviceLock, FilePool, SolverPool
from milora_init.run.progress import Progress

CPU = torch.device("cpu")
TIMEOUT_S = 20  # long enough for a busy machine


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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
def test_device_names_resolve_to_the_available_devices(
    count: int, names: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(count, monkeypatch)
    assert [str(device) for device in resolve_devices(names)] == expected


@pytest.mark.parametrize(
    ("count", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2"), (2, "gpu"), (0, "meta"), (0, "")]
)
def test_an_unavailable_device_is_a_usage_error_that_lists_the_available_ones(
    count: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(count, monkeypatch)
    with pytest.raises(UsageError, match=f"no device {name!r}") as caught:
        resolve_devices(["cpu", name])
    assert caught.value.hint == "this machine has: " + ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])


def test_the_measured_multiply_rate_is_plausible() -> None:
    assert 1e6 < multiply_rate(torch.device("cpu")) < 1e15


def test_the_number_of_weights_at_once_is_limited_by_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 28 < devices.memory_bytes() < 1 << 50
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(pools, "memory_bytes", lambda: 4000)
    assert pools.weights_at_once([10] * 9) == 4  # limited by the cores
    assert pools.weights_at_once([10, 10]) == 2
    assert pools.weights_at_once([600, 1000, 800]) == 2  # the largest two take 1800 of the 2000 bytes available
    assert pools.weights_at_once([5000, 1]) == 1  # at least one


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_job_runs_once_and_returns_its_own_result(count: int) -> None:
    done: list[int] = []

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> tuple[int, str]:
        done.append(job)
        return job, device.type

    with SolverPool([CPU] * count) as pool:
        results = [pool.submit(work, job).result(TIMEOUT_S) for job in range(30)]
    assert results == [(job, "cpu") for job in range(30)]
    assert sorted(done) == list(range(30))


def test_one_job_of_a_device_solves_while_another_reads() -> None:
    """The second job waits for the lock while the first one holds it."""
    second_waits, first_left = threading.Event(), threading.Event()
    solving: list[int] = []
    together: list[int] = []

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> bool:
        if job == 1:
            second_waits.set()
        with device_lock:
            solving.append(job)
            together.append(len(solving))
            was_read_meanwhile = job == 1 or second_waits.wait(TIMEOUT_S)
            first_left_before = job == 0 or first_left.is_set()
            solving.remove(job)
            if job == 0:
                first_left.set()
        return was_read_meanwhile and first_left_before

    with SolverPool([CPU]) as pool:
        futures = [pool.submit(work, job) for job in range(2)]
        assert all(future.result(TIMEOUT_S) for future in futures)
    assert together == [1, 1]


def test_devices_solve_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=TIMEOUT_S)

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> int:
        with device_lock:
            return together.wait()

    with SolverPool([CPU] * 3) as pool:
        # Each thread waits at the barrier with its lock: three at once are three devices.
        assert sorted(f.result(TIMEOUT_S) for f in [pool.submit(work, job) for job in range(3)]) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_jobs_are_started_than_there_are_threads(count: int) -> None:
    """This bounds the memory: a queued job holds no tensor."""
    threads_per_device = count * SolverPool.THREADS_PER_DEVICE
    release = threading.Event()
    all_threads = threading.Barrier(threads_per_device + 1, timeout=TIMEOUT_S)
    running: list[int] = []

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> bool:
        running.append(job)
        if job < threads_per_device:
            all_threads.wait()
        return release.wait(TIMEOUT_S)

    with SolverPool([CPU] * count) as pool:
        futures = [pool.submit(work, job) for job in range(50)]
        all_threads.wait()
        assert sorted(running) == list(range(threads_per_device))
        release.set()
        assert all(future.result(TIMEOUT_S) for future in futures)
    assert len(running) == 50


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_is_raised_unchanged_and_cancels_the_queued_jobs(count: int) -> None:
    release = threading.Event()
    running: list[int] = []

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> None:
        running.append(job)
        if job == 0:
            raise KeyError("the first")
        release.wait(TIMEOUT_S)

    def fail() -> None:
        with SolverPool([CPU] * count) as pool:
            futures.extend(pool.submit(work, job) for job in range(500))
            futures[0].result(TIMEOUT_S)

    futures: list[Any] = []
    with pytest.raises(KeyError, match="the first"):
        fail()
    release.set()
    assert len(running) <= 1 + count * SolverPool.THREADS_PER_DEVICE
    with pytest.raises(CancelledError):
        futures[-1].result(TIMEOUT_S)


def test_a_failed_run_does_not_wait_for_a_running_solve() -> None:
    """A LAPACK call cannot be interrupted, and Ctrl-C must not wait for it."""
    solving, release, finished = threading.Event(), threading.Event(), threading.Event()

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> None:
        with device_lock:
            solving.set()
            release.wait(TIMEOUT_S)
        finished.set()

    def interrupted() -> None:
        with SolverPool([CPU]) as pool:
            pool.submit(work, 0)
            assert solving.wait(TIMEOUT_S)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not finished.is_set()
    release.set()
    assert finished.wait(TIMEOUT_S)


def test_the_next_pool_starts_after_the_running_solve_has_ended(two_threads: None) -> None:
    """Otherwise the old solve could write into files of the next run, and change its number of threads."""
    solving, release = threading.Event(), threading.Event()

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> None:
        with device_lock:
            solving.set()
            release.wait(TIMEOUT_S)

    def interrupted() -> None:
        with SolverPool([CPU]) as pool:
            pool.submit(work, 0)
            assert solving.wait(TIMEOUT_S)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    threading.Timer(0.1, release.set).start()
    with SolverPool([CPU]) as pool:
        assert release.is_set()
        assert pool.submit(lambda *_: torch.get_num_threads(), 0).result(TIMEOUT_S) == 1
    assert torch.get_num_threads() == 2


def test_a_finished_pool_leaves_no_thread() -> None:
    with SolverPool([CPU] * 2) as pool:
        names = [pool.submit(lambda *_: threading.current_thread().name, job).result(TIMEOUT_S) for job in range(4)]
    assert all(name.startswith("milora") for name in names)
    assert not [thread for thread in threading.enumerate() if thread.name in names]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("fails", [False, True])
def test_the_number_of_threads_is_restored(count: int, fails: bool, two_threads: None) -> None:
    class FailureError(Exception):
        pass

    def run() -> None:
        with SolverPool([CPU] * count) as pool:
            inside.append(pool.submit(lambda *_: torch.get_num_threads(), 0).result(TIMEOUT_S))
            if fails:
                raise FailureError

    inside: list[int] = []
    if fails:
        with pytest.raises(FailureError):
            run()
    else:
        run()
    assert torch.get_num_threads() == 2
    assert inside == [1]


def test_every_thread_of_a_pool_computes_on_one_cpu_thread(two_threads: None) -> None:
    """The order of sums in a product, and so the last bits, depends on the number of threads."""

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> int:
        torch.ones(2).add(1)  # the first torch call in this thread, as when a weight is read
        with device_lock:
            return torch.get_num_threads()

    with SolverPool([CPU]) as pool:
        assert {pool.submit(work, job).result(TIMEOUT_S) for job in range(4)} == {1}


@pytest.mark.parametrize(
    ("shape", "mode", "path"),
    [
        ((600, 600), "min", "lanczos"),
        wide((800, 1700), "min", "lanczos"),
        ((600, 600), "max", "mixed"),
        ((300, 200), "mid", "eigh"),
    ],
    ids=str,
)
def test_a_solve_has_the_same_bits_for_any_number_of_cores(
    shape: tuple[int, int], mode: Mode, path: str, two_threads: None
) -> None:
    W = matrices.language_model_like(*shape)

    def work(job: int, device: torch.device, device_lock: DeviceLock, progress: Progress) -> Triplets:
        with device_lock:
            return singular_triplets(W, 10, mode=mode)

    results = []
    for threads, copies in ((1, 1), (2, 1), (2, 2), (3, 3)):
        torch.set_num_threads(threads)
        with SolverPool([CPU] * copies) as pool:
            results += [future.result() for future in [pool.submit(work, job) for job in range(copies)]]
        assert torch.get_num_threads() == threads
    assert results[0].certificate.path == path
    for other in results[1:]:
        for name in ("U", "s", "V"):
            assert torch.equal(getattr(results[0], name), getattr(other, name))
        assert results[0].certificate == other.certificate


@pytest.mark.parametrize("mode", ["min", "random"])
def test_several_devices_make_the_same_bytes_as_one(
    mode: str,
    start: Callable[..., Any],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    for count, threads_per_device in ((1, 2), (2, 2), (3, 1)):
        (tmp_path / str(count)).mkdir()
        monkeypatch.chdir(tmp_path / str(count))
        monkeypatch.setattr(
            initializing,
            "solver_devices",
            lambda _, count=count, threads_per_device=threads_per_device: ((CPU,) * count, threads_per_device),
        )
        start(checkpoint("llama", "bfloat16"), out="out", mode=mode)
        made.append(contents(Path("out")))
        del made[-1][MANIFEST]  # it holds times
    assert made[0] == made[1] == made[2]
    assert {"lora/adapter_model.safetensors", "model.safetensors.index.json"} < made[0].keys()


def test_after_a_failure_a_running_hash_is_cancelled(tmp_path: Path) -> None:
    """An interrupted run does not wait for the hash of a file."""
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 38)  # a sparse file, which takes minutes to hash

    def fail() -> None:
        with FilePool() as pool:
            futures.append(pool.sha256(tmp_path / "large"))
            raise KeyboardInterrupt

    futures: list[Future[str]] = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(CancelledError):
        futures[0].result(TIMEOUT_S)


def test_the_file_pool_returns_the_sha256_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 3_000_000)
    with FilePool() as pool:
        assert pool.sha256(tmp_path / "x").result(TIMEOUT_S) == hashlib.sha256(b"x" * 3_000_000).hexdigest()
