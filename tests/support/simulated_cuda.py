"""CUDA devices simulated on the CPU, for tests of the code that only a GPU would run.

A tensor on a simulated device is a CPU tensor of a subclass whose `device` is `cuda:N`. The CPU does its arithmetic.
The simulation adds:

- An operation on tensors of different devices raises, as on a real device; a copy between devices does not.
- It counts what the time on a GPU depends on: kernel launches (one for each torch call that computes, so a lower
  bound), waits of the host for a value, bytes read and written, floating-point operations by dtype.

    with simulated_cuda.simulated() as counts:
        result = split(W.to("cuda:0"), 64, dtype=torch.bfloat16)
    assert counts.launches.total() <= 450

`machine` fakes the parts of `torch.cuda` that a whole run needs: several devices, streams, page-locked memory, and
failures of memory or of a library where a test asks for them.

It does not simulate speed, memory limits, the order of streams, or the rounding of GPU libraries.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    import pytest

CPU = torch.device("cpu")
# Calls that only read a property, and calls that return a Python value, for which the host must wait.
_PROPERTIES = frozenset({"size", "dim", "ndimension", "numel", "stride", "data_ptr", "storage_offset", "element_size"})
_PROPERTIES |= {"is_floating_point", "is_complex", "is_contiguous", "__len__", "untyped_storage", "type", "__hash__"}
_WAITS = frozenset({"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "nonzero", "equal", "allclose"})
_MAY_MIX = frozenset({"copy_", "to", "__setitem__"})


@dataclass
class Counts:
    """Counts of the work on the simulated devices."""

    launches: Counter[str] = field(default_factory=Counter)  # by the name of the call
    waits: Counter[str] = field(default_factory=Counter)  # of the host: round trips
    bytes_touched: int = 0
    flops: Counter[str] = field(default_factory=Counter)  # by dtype

    def __str__(self) -> str:
        flops = ", ".join(f"{name} {count / 1e9:.1f} GFLOP" for name, count in sorted(self.flops.items()))
        return (
            f"{self.launches.total()} launches, {self.waits.total()} waits,"
            f" {self.bytes_touched / 1e9:.1f} GB touched; {flops}"
        )


Fault = Callable[[str, torch.device], None]
"""Called with the name of each call that computes on a device or copies to it; it may raise an error."""


@dataclass
class Machine:
    """The state of the faked `torch.cuda`.

    Attributes:
        streams: The device and the stream of each thread.
        pinned: The number of entries allocated in page-locked memory.
        caches_emptied: Calls of torch.cuda.empty_cache.
        fault: See `Fault`.
        may_pin: Whether page-locked memory can be allocated.
    """

    streams: dict[int, tuple[torch.device, object]] = field(default_factory=dict)
    pinned: int = 0
    caches_emptied: int = 0
    fault: Fault | None = None
    may_pin: bool = True


_machines: list[Machine] = []
_counts: list[Counts] = []  # one for each active `simulated()`, the innermost last


class SimulatedTensor(torch.Tensor):
    """A CPU tensor whose `device` is a CUDA device."""

    simulated_device: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.simulated_device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def simulated() -> Iterator[Counts]:
    """Inside this context tensors can be on `cuda:N`. Yields the counts."""
    _counts.append(Counts())
    try:
        with torch.no_grad(), _Mode():
            yield _counts[-1]
    finally:
        _counts.pop()


@contextmanager
def machine(devices: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Fakes `devices` CUDA devices for every thread that calls torch.cuda.set_device; yields the state."""
    made = Machine()
    _machines.append(made)

    def set_device(device: torch.device) -> None:
        assert device.index < devices
        # A mode belongs to one thread. This one ends with the thread.
        _Mode().__enter__()  # type: ignore[no-untyped-call]
        made.streams[threading.get_ident()] = (device, None)

    def set_stream(stream: torch.device) -> None:
        device, before = made.streams[threading.get_ident()]
        assert before is None
        made.streams[threading.get_ident()] = (device, stream)

    def empty_cache() -> None:
        made.caches_emptied += 1

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

    replaced = {
        "is_available": lambda: devices > 0,
        "device_count": lambda: devices,
        "set_device": set_device,
        "set_stream": set_stream,
        "Stream": Stream,
        "empty_cache": empty_cache,
    }
    try:
        with monkeypatch.context() as patched:
            for name, value in replaced.items():
                patched.setattr(torch.cuda, name, value)
            yield made
    finally:
        _machines.pop()


class _Mode(TorchFunctionMode):
    """Intercepts calls without a simulated argument too: they may create a simulated tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _device_of(tensor: torch.Tensor) -> torch.device:
    return tensor.simulated_device if isinstance(tensor, SimulatedTensor) else CPU


def _plain(x: Any) -> Any:
    return x.as_subclass(torch.Tensor) if isinstance(x, SimulatedTensor) else x


def _placed(x: Any, device: torch.device) -> Any:
    """A result on the device where it was computed."""
    if not isinstance(x, torch.Tensor) or device == CPU:
        return _plain(x)
    out = x.as_subclass(SimulatedTensor)
    out.simulated_device = device
    return out


def _named_device(value: Any) -> torch.device | None:
    if isinstance(value, torch.device):
        device = value
    elif isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"):
        device = torch.device(value)
    else:
        return None
    return CPU if device.type == "cpu" else torch.device("cuda", device.index or 0)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return _perform(func, args, kwargs)


def _perform(func: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", str(func))
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    # A CPU scalar may be combined with a tensor on any device.
    places = {_device_of(x) for x in tensors if x.ndim > 0 or isinstance(x, SimulatedTensor)}
    device_found = next((place for place in places if place != CPU), CPU)
    source, target = device_found, None
    if name == "__get__" and device_found != CPU:  # an attribute: a view such as .mT, or a property
        return tree_map(lambda x: _placed(x, device_found), func(*tree_map(_plain, args), **kwargs))
    if kwargs.get("device") is not None:
        target = _named_device(kwargs["device"])
        kwargs = {**kwargs, "device": CPU}
    if name == "to":
        source = _device_of(args[0])
        args = list(args)
        for at, value in enumerate(args[1:], 1):
            if (device := _named_device(value)) is not None:
                target, args[at] = device, CPU
            elif isinstance(value, torch.Tensor):
                target = _device_of(value)
    elif name in ("cpu", "cuda"):
        source = _device_of(args[0])
        target, func, args = _named_device(name), torch.Tensor.to, (args[0], CPU)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
        _pin(args[0])
    if len(places) > 1 and name not in _MAY_MIX:
        shapes = [(tuple(x.shape), str(_device_of(x))) for x in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} has {shapes}")
    result_device = device_found if target is None else target
    if name in ("copy_", "__setitem__"):
        result_device = _device_of(args[0])
    if _machines and _machines[-1].fault and result_device != CPU and name not in _PROPERTIES:
        _machines[-1].fault(name, result_device)
    out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    moved = name in ("to", "cpu", "cuda") and result_device != source
    if device_found != CPU or result_device != CPU:
        _count(name, tensors, out, result_device == CPU and (moved or name == "copy_"))
    if moved:
        out = _plain(out).clone()
    return tree_map(lambda x: _placed(x, result_device), out)


def _pin(shape: Any) -> None:
    if not _machines or not _machines[-1].may_pin:
        raise RuntimeError("CUDA error: page-locked memory is exhausted")
    _machines[-1].pinned += torch.Size(shape).numel()


def _count(name: str, tensors: list[torch.Tensor], out: Any, to_host: bool) -> None:
    if not _counts or name in _PROPERTIES:
        return
    counts = _counts[-1]
    ours = [_plain(x) for x in tensors if isinstance(x, SimulatedTensor)]
    if ours and (name in _WAITS or to_host):
        counts.waits[name] += 1
    made = [_plain(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    storage = ours[0].untyped_storage().data_ptr() if ours else None
    in_place = name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))
    if made and made[0].untyped_storage().data_ptr() == storage and not in_place:
        return  # a view
    counts.launches[name] += 1
    counts.bytes_touched += sum(x.numel() * x.element_size() for x in (*tensors, *made))
    if ours and (flops := int(_flops(name, [_plain(x) for x in tensors]))):
        counts.flops[str(ours[0].dtype).removeprefix("torch.")] += flops


def _flops(name: str, t: list[torch.Tensor]) -> float:
    if name in ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot"):
        return 2.0 * t[0].numel() * (t[1].shape[-1] if t[1].ndim > 1 else 1)
    if name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        return 2.0 * t[1].numel() * t[2].shape[-1]
    if name in ("linalg_cholesky_ex", "linalg_cholesky"):
        return t[0].numel() * t[0].shape[-1] / 3
    if name in ("cholesky_inverse", "linalg_inv_ex", "linalg_inv"):
        return 2 * t[0].numel() * t[0].shape[-1] / 3
    if name in ("linalg_solve_triangular", "cholesky_solve"):
        return float(t[0].shape[-1] * t[1].numel())
    if name in ("linalg_qr", "linalg_svd", "svd", "qr"):
        return 4.0 * t[0].numel() * min(t[0].shape[-2:])
    if name in ("linalg_eigh", "linalg_eigvalsh"):
        return 9.0 * t[0].numel() * t[0].shape[-1]
    return 0.0
