"""Thread pools of a run: one solves weights on the CPU or on GPUs, as many at a time as fit; one copies and hashes."""

from __future__ import annotations

import threading
from collections import deque
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
# A function of a job, the device to work on, the lock to hold while it solves there, and the progress to report to.
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
        wanted_jobs: With so many jobs submitted and not finished, no device waits for one.
        on_gpus: Whether every device is a GPU.
    """

    THREADS_PER_DEVICE = 2

    # Pools of earlier runs in this process that failed. Their last solves may still be running.
    _unfinished: ClassVar[list[ThreadPoolExecutor]] = []

    def __init__(
        self,
        devices: Sequence[torch.device],
        *,
        threads_per_device: int = THREADS_PER_DEVICE,
        progress: Progress | None = None,
    ) -> None:
        while self._unfinished:  # wait for them: they may write to files that this run will use
            self._unfinished.pop().shutdown()
        self._progress = progress or Progress()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)  # also for torch threads that start from here on
        self.on_gpus = all(device.type == "cuda" for device in devices)
        self.threads = len(devices) * threads_per_device
        self.wanted_jobs = self.threads + len(devices)
        self._changed = threading.Condition()
        self._jobs: deque[tuple[Future[Any], SolverTask[Any, Any], Any]] = deque()
        self._closed = False
        slots = [_Slot(device, self._changed) for device in devices]
        self._slots = len(slots)
        self._pool = ThreadPoolExecutor(self.threads, "milora")
        for slot in slots * threads_per_device:
            self._pool.submit(self._work, slot)

    def submit(self, task: SolverTask[Job, Result], job: Job) -> Future[Result]:
        """Let the next free thread call `task(job, device, device_lock, progress)`."""
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._jobs.append((future, task, job))
            self._changed.notify_all()
        return future

    def __enter__(self) -> SolverPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._closed = True
            if kind is not None:
                for future, _task, _job in self._jobs:
                    future.cancel()
                self._jobs.clear()
            self._changed.notify_all()
        # After a failure, running solves are not waited for: they may take minutes, and their files are removed.
        self._pool.shutdown(wait=kind is None)
        if kind is not None:
            self._unfinished.append(self._pool)
        torch.set_num_threads(self._threads_before)

    def _work(self, slot: _Slot) -> None:
        """Do jobs on a device until the pool is closed: what each thread does."""
        bound = False
        while found := self._next(slot):
            future, task, job = found
            turn = _Turn(slot)
            if future.set_running_or_notify_cancel():
                try:
                    if not bound:
                        _bind_thread_to_device(slot.device)
                        bound = True
                    result = task(job, slot.device, turn, self._progress)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            turn.end()
            del found, future, task, job  # what a job holds must not stay until the next one comes

    def _next(self, slot: _Slot) -> tuple[Future[Any], SolverTask[Any, Any], Any] | None:
        """The next job for a thread of a device; None if the pool is closed and no job is left.

        A thread takes a job in advance, while its device solves another one, only where the other devices find enough
        jobs without it: in the end no weight waits for one device while another is idle.
        """
        with self._changed:
            while not (self._jobs and (not slot.unsolved or len(self._jobs) >= self._slots)):
                if self._closed and not self._jobs:
                    return None
                self._changed.wait()
            slot.unsolved += 1
            return self._jobs.popleft()


def _bind_thread_to_device(device: torch.device) -> None:
    """Let a thread compute on a device."""
    if device.type == "cuda":
        # A stream of its own: its copies overlap with the other thread's arithmetic.
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class _Slot:
    """A device, its lock, and the number of jobs that its threads have taken and not solved."""

    def __init__(self, device: torch.device, changed: threading.Condition) -> None:
        self.device, self.changed = device, changed
        self.lock = threading.Lock()
        self.unsolved = 0


class _Turn:
    """The lock of a device for one job, which is solved when it is released, or when the job ends."""

    def __init__(self, slot: _Slot) -> None:
        self._slot, self._ended = slot, False

    def __enter__(self) -> None:
        self._slot.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._slot.lock.release()
        self.end()

    def end(self) -> None:
        """The job is solved."""
        if not self._ended:
            self._ended = True
            with self._slot.changed:
                self._slot.unsolved -= 1
                self._slot.changed.notify_all()


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
    """How many weights the CPU solves at a time, each on one thread: at most one per core,
    and together at most half of the machine's memory.

    Args:
        needs_bytes: Memory for each weight of the run.
    """
    largest = sorted(needs_bytes, reverse=True)[: torch.get_num_threads()]
    fitting = sum(total <= memory_bytes() // 2 for total in accumulate(largest))
    return max(1, fitting)


def weights_in_memory(plan: Plan) -> tuple[int, int]:
    """How many weights the CPU solves at a time, and how many more are in memory: see `Plan.peak_memory_bytes`."""
    if plan.options.ray is not None:
        return 0, 0
    devices, threads_per_device = solver_devices(plan)
    on_cpu = sum(device.type == "cpu" for device in devices)
    return on_cpu, len(devices) * threads_per_device - on_cpu


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
