"""Find the devices of this machine, their memory and their speed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from milora_init.errors import UsageError


def resolve_devices(names: Sequence[str]) -> tuple[torch.device, ...]:
    """The devices that `--device` names: `auto` and `cuda` are all visible GPUs; `auto` is the CPU where there is none.

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
    """Multiply-adds per second of a float64 matrix product on a device, measured in a few hundredths of a second."""
    X = torch.ones(1024, 1024, dtype=torch.float64, device=device)
    rate = 0.0
    for _ in range(3):
        started = time.perf_counter()
        (X @ X)[0, 0].item()  # reading a value waits until the device has finished
        rate = max(rate, 1024**3 / (time.perf_counter() - started))
    return rate


def memory_bytes() -> int:
    """The machine's memory, or the limit of the container if that is lower."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file; or it says "max", which is no limit
            memory = min(memory, int(Path(limit).read_text()))
    return memory
