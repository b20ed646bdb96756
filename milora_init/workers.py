"""Who does the jobs: the CPU, or one worker for each GPU.

A job is a value and its result is a value, so a worker needs nothing but the function that turns one into the other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from milora_init.errors import UsageError

Job = TypeVar("Job")
Result = TypeVar("Result")


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


def multiply_rate() -> float:
    """Multiply-adds per second of this machine's float64 matrix product, measured in a few hundredths of a second."""
    device = resolve_devices(["auto"])[0]
    X = torch.ones(1024, 1024, dtype=torch.float64, device=device)
    rate = 0.0
    for _ in range(3):
        started = time.perf_counter()
        (X @ X)[0, 0].item()  # reading a value waits for the device
        rate = max(rate, 1024**3 / (time.perf_counter() - started))
    return rate


def run(
    jobs: Iterable[Job], devices: Sequence[torch.device], work: Callable[[Job, torch.device], Result]
) -> Iterator[Result]:
    """Do every job on some device and yield the results as they come.

    One device works in the caller's thread. With several, each has a thread that takes the next job when it is free;
    the first error stops the dealing of jobs and is raised here once the running ones have ended.
    """
    if len(devices) == 1:
        for job in jobs:
            yield work(job, devices[0])
        return
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    results: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def serve(device: torch.device) -> None:
        try:
            while not stop.is_set():
                results.put(work(todo.get_nowait(), device))
        except queue.Empty:
            pass
        except BaseException as error:
            stop.set()
            results.put(error)
        finally:
            results.put(None)

    threads = [threading.Thread(target=serve, args=(device,), name=f"milora-{device}") for device in devices]
    for thread in threads:
        thread.start()
    failure: BaseException | None = None
    running = len(threads)
    try:
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                failure = failure or result
            else:
                yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failure:
        raise failure
