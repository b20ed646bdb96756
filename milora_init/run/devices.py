"""Find the devices of this machine, their memory and their speed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import torch

from milora_init.errors import UsageError
from milora_init.plan.plan import Plan
from milora_init.run.pool import SolverPool


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


def weights_at_once(needs_bytes: Sequence[int]) -> int:
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


def solver_devices(plan: Plan) -> tuple[tuple[torch.device, ...], int]:
    """The devices that solve, the CPU as often as it has weights in work at a time, and each one's number of hands.

    Raises:
        UsageError: A device that this machine does not have.
    """
    devices = resolve_devices(plan.options.device)
    if [device.type for device in devices] != ["cpu"]:
        return devices, SolverPool.THREADS_PER_DEVICE
    count = weights_at_once([plan.memory_bytes(w) for w in plan.weights])
    # Where several solve, one that reads or writes leaves the others the cores; a second hand would only hold memory.
    return devices * count, 1 if count > 1 else SolverPool.THREADS_PER_DEVICE
