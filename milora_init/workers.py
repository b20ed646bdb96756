"""Who does the jobs: the CPU, or one worker for each GPU.

A job is a value and its result is a value, so a worker needs nothing but the function that turns one into the other.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from milora_init.errors import UsageError

T = TypeVar("T")
Job = TypeVar("Job")
Result = TypeVar("Result")
Turn = AbstractContextManager[Any]  # the right to solve on a device, for one thread at a time
Work = Callable[[Job, torch.device, Turn], Result]


def resolve_devices(names: Sequence[str]) -> tuple[torch.device, ...]:
    """The devices that `--device` names: `auto` and `cuda` are every visible GPU, `auto` without one is the CPU.

    Raises:
        UsageError: A device that this machine does not have.
    """
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found: dict[torch.device, None] = {}
    for name in names:
        if name == "auto":
            found |= dict.fromkeys(gpus or [torch.device("cpu")])
        elif name == "cuda" and gpus:
            found |= dict.fromkeys(gpus)
        elif name == "cpu" or name in map(str, gpus):
            found[torch.device(name)] = None
        else:
            raise UsageError(f"no device {name!r}", hint=f"this machine has: {', '.join(['cpu', *map(str, gpus)])}")
    return tuple(found)


def multiply_rate(device: torch.device) -> float:
    """Multiply-adds per second of a device's float64 matrix product, measured in a few hundredths of a second."""
    X = torch.ones(1024, 1024, dtype=torch.float64, device=device)
    rate = 0.0
    for _ in range(3):
        started = time.perf_counter()
        (X @ X)[0, 0].item()  # reading a value waits for the device
        rate = max(rate, 1024**3 / (time.perf_counter() - started))
    return rate


def side_by_side(needs_bytes: Sequence[int]) -> int:
    """How many weights the CPU is to solve at a time, each on one thread.

    As many as there are cores, within half of the machine's memory.

    Args:
        needs_bytes: What each weight takes.
    """
    needs = sorted(needs_bytes, reverse=True)[: torch.get_num_threads()]
    fitting = sum(total <= memory_bytes() // 2 for total in accumulate(needs))
    return max(1, fitting)


def memory_bytes() -> int:
    """The machine's memory, or what a container is allowed of it."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file; "max"
            found = min(found, int(Path(limit).read_text()))
    return found


def one_ahead(begun: Iterable[T]) -> Iterator[T]:
    """Each of these once the next one was begun, so that a crew which works on them does not run dry meanwhile."""
    before: list[T] = []
    for item in begun:
        yield from before
        before = [item]
    yield from before


class Crew:
    """Threads that take jobs from one queue, `hands` of them to a device; the CPU may be given several times.

    One solves, and only one, for it holds the device's turn; another reads the next weight or writes the last. A job
    is in memory only while a thread has it, so memory is bounded by the number of threads, not of jobs.

    Each computes on one CPU thread: a BLAS splits its sums by the number of threads, and the last bits with them, so
    this is what makes the bytes of an output the same on any number of cores. Several weights at a time also use the
    cores better than several threads on one.
    """

    HANDS = 2

    _left: ClassVar[list[ThreadPoolExecutor]] = []  # pools of crews that failed, with a solve still running

    def __init__(self, devices: Sequence[torch.device], *, hands: int = HANDS) -> None:
        while self._left:  # such a solve writes to files that may be ours now
            self._left.pop().shutdown()
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of torch threads that begin from here on, too
        self._seats: queue.SimpleQueue[tuple[torch.device, Turn]] = queue.SimpleQueue()
        turns = [threading.Lock() for _ in devices]
        for _ in range(hands):  # every device gets a hand before any gets its second: jobs may be few
            for seat in zip(devices, turns, strict=True):
                self._seats.put(seat)
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(len(devices) * hands, "milora", initializer=self._sit_down)

    def submit(self, work: Work[Job, Result], job: Job) -> Future[Result]:
        """Have `work(job, device, turn)` done by the next free thread."""
        return self._pool.submit(self._do, work, job)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failure nobody waits for what is still running: its files are about to go.
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            self._left.append(self._pool)
        torch.set_num_threads(self._threads)

    def _sit_down(self) -> None:
        self._own.device, self._own.turn = self._seats.get()
        if self._own.device.type == "cuda":
            # A stream of its own: its copies run beside the other hand's arithmetic.
            torch.cuda.set_device(self._own.device)
            torch.cuda.set_stream(torch.cuda.Stream(self._own.device))  # type: ignore[no-untyped-call]

    def _do(self, work: Work[Job, Result], job: Job) -> Result:
        return work(job, self._own.device, self._own.turn)
