"""Thread pool that runs solver tasks on the CPU or on GPUs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

import torch

T = TypeVar("T")
Job = TypeVar("Job")
Result = TypeVar("Result")
DeviceLock = AbstractContextManager[Any]  # the right to solve on a device, for one thread at a time
SolverTask = Callable[[Job, torch.device, DeviceLock], Result]


def one_ahead(begun: Iterable[T]) -> Iterator[T]:
    """Each of these once the next one was begun, so that a crew which works on them does not run dry meanwhile."""
    before: list[T] = []
    for item in begun:
        yield from before
        before = [item]
    yield from before


class SolverPool:
    """Threads that take jobs from one queue, `hands` of them to a device; the CPU may be given several times.

    One solves, and only one, for it holds the device's turn; another reads the next weight or writes the last. A job
    is in memory only while a thread has it, so memory is bounded by the number of threads, not of jobs.

    Each computes on one CPU thread: a BLAS splits its sums by the number of threads, and the last bits with them, so
    this is what makes the bytes of an output the same on any number of cores. Several weights at a time also use the
    cores better than several threads on one.
    """

    THREADS_PER_DEVICE = 2

    _left: ClassVar[list[ThreadPoolExecutor]] = []  # pools of crews that failed, with a solve still running

    def __init__(self, devices: Sequence[torch.device], *, threads_per_device: int = THREADS_PER_DEVICE) -> None:
        while self._left:  # such a solve writes to files that may be ours now
            self._left.pop().shutdown()
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of torch threads that begin from here on, too
        self._slots: queue.SimpleQueue[tuple[torch.device, DeviceLock]] = queue.SimpleQueue()
        device_locks = [threading.Lock() for _ in devices]
        for _ in range(threads_per_device):  # every device gets a hand before any gets its second: jobs may be few
            for slot in zip(devices, device_locks, strict=True):
                self._slots.put(slot)
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(len(devices) * threads_per_device, "milora", initializer=self._bind_thread)

    def submit(self, work: SolverTask[Job, Result], job: Job) -> Future[Result]:
        """Have `work(job, device, turn)` done by the next free thread."""
        return self._pool.submit(self._do, work, job)

    def __enter__(self) -> SolverPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failure nobody waits for what is still running: its files are about to go.
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            self._left.append(self._pool)
        torch.set_num_threads(self._threads)

    def _bind_thread(self) -> None:
        self._own.device, self._own.device_lock = self._slots.get()
        if self._own.device.type == "cuda":
            # A stream of its own: its copies run beside the other hand's arithmetic.
            torch.cuda.set_device(self._own.device)
            torch.cuda.set_stream(torch.cuda.Stream(self._own.device))  # type: ignore[no-untyped-call]

    def _do(self, work: SolverTask[Job, Result], job: Job) -> Result:
        return work(job, self._own.device, self._own.device_lock)
