"""Thread pools of a run: one solves weights on the CPU or on GPUs, as many at a time as fit; one copies and hashes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch

from milora_init.checkpoint.hashing import sha256
from milora_init.plan.plan import Plan
from milora_init.run.devices import memory_bytes, resolve_devices
from milora_init.run.progress import Progress

P = ParamSpec("P")
Job = TypeVar("Job")
Result = TypeVar("Result")
DeviceLock = AbstractContextManager[Any]  # held while a thread solves on a device: one thread at a time
SolverTask = Callable[[Job, torch.device, DeviceLock, Progress], Result]


class SolverPool:
    """Threads that take jobs from one queue.

    Each device has `threads_per_device` threads. The thread that holds the device's lock solves; meanwhile another one
    reads the next weight or writes the last one. A weight is in memory only while a thread works on it, so memory is
    bounded by the number of threads and not by the number of jobs.

    Each thread computes on one CPU thread: a BLAS splits its sums by the number of threads, which changes the last
    bits. So the bytes of an output do not depend on the number of cores. Several weights at a time also use the cores
    better than several threads on one weight.

    Args:
        devices: The devices; the CPU may be listed several times, once for each weight that it solves at a time.
        threads_per_device: See above.
        progress: Passed to every task.

    Attributes:
        threads: How many jobs it works on at a time.
    """

    THREADS_PER_DEVICE = 2

    _abandoned: ClassVar[list[ThreadPoolExecutor]] = []  # of failed runs in this process, with a solve still running

    def __init__(
        self,
        devices: Sequence[torch.device],
        *,
        threads_per_device: int = THREADS_PER_DEVICE,
        progress: Progress | None = None,
    ) -> None:
        while self._abandoned:  # such a solve writes to files that may have the names of ours
            self._abandoned.pop().shutdown()
        self._progress = progress or Progress()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)  # also for torch threads that start from here on
        self._slots: queue.SimpleQueue[tuple[torch.device, DeviceLock]] = queue.SimpleQueue()
        device_locks = [threading.Lock() for _ in devices]
        for _ in range(threads_per_device):  # every device gets one thread before any gets its second: jobs may be few
            for slot in zip(devices, device_locks, strict=True):
                self._slots.put(slot)
        self._local = threading.local()
        self.threads = len(devices) * threads_per_device
        self._pool = ThreadPoolExecutor(self.threads, "milora", initializer=self._bind_thread)

    def submit(self, task: SolverTask[Job, Result], job: Job) -> Future[Result]:
        """Let the next free thread call `task(job, device, device_lock, progress)`."""
        return self._pool.submit(self._run_task, task, job)

    def __enter__(self) -> SolverPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failure, running solves are not waited for: they may take minutes, and their files are removed.
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            self._abandoned.append(self._pool)
        torch.set_num_threads(self._threads_before)

    def _bind_thread(self) -> None:
        self._local.device, self._local.device_lock = self._slots.get()
        if self._local.device.type == "cuda":
            # A stream of its own: its copies overlap with the other thread's arithmetic.
            torch.cuda.set_device(self._local.device)
            torch.cuda.set_stream(torch.cuda.Stream(self._local.device))  # type: ignore[no-untyped-call]

    def _run_task(self, task: SolverTask[Job, Result], job: Job) -> Result:
        return task(job, self._local.device, self._local.device_lock, self._progress)


class FilePool:
    """Threads that copy and hash files while weights are solved.

    Most of their work is inside the kernel or a hash function, neither of which holds Python's lock.

    Attributes:
        cancelled: Set when the pool is stopped after a failure; long calls look at it.
    """

    THREADS = 16

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.THREADS, thread_name_prefix="file")
        self.cancelled = threading.Event()

    def submit(self, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Future[Result]:
        """Let the next free thread call a function."""
        return self._pool.submit(function, *args, **kwargs)

    def sha256(self, path: Path) -> Future[str]:
        """The SHA-256 of a file."""
        return self._pool.submit(sha256, path, cancelled=self.cancelled)

    def stop(self, *, cancel: bool) -> None:
        """Wait for the threads; with `cancel`, their calls end early and queued ones are dropped."""
        if cancel:
            self.cancelled.set()
        self._pool.shutdown(cancel_futures=cancel)

    def __enter__(self) -> FilePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(cancel=kind is not None)


def weights_at_once(needs_bytes: Sequence[int]) -> int:
    """How many weights the CPU solves at a time, each on one thread: one a core, within half of the machine's memory.

    Args:
        needs_bytes: Memory for each weight of the run.
    """
    largest = sorted(needs_bytes, reverse=True)[: torch.get_num_threads()]
    fitting = sum(total <= memory_bytes() // 2 for total in accumulate(largest))
    return max(1, fitting)


def solver_devices(plan: Plan) -> tuple[tuple[torch.device, ...], int]:
    """The devices that solve, and the number of threads for each.

    The CPU is listed once for each weight that it solves at a time.

    Raises:
        UsageError: A device that this machine does not have.
    """
    devices = resolve_devices(plan.options.device)
    if [device.type for device in devices] != ["cpu"]:
        return devices, SolverPool.THREADS_PER_DEVICE
    count = weights_at_once([plan.memory_bytes(w) for w in plan.weights])
    # Where several threads solve, one that reads or writes leaves its core to the others: a second thread for each
    # would only need memory.
    return devices * count, 1 if count > 1 else SolverPool.THREADS_PER_DEVICE
