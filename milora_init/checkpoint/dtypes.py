"""The dtypes of torch by their safetensors name, and the bytes of a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from milora_init.checkpoint.header import SAFETENSORS_DTYPES

# An old torch lacks some of them.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype.torch_name)
    for name, dtype in SAFETENSORS_DTYPES.items()
    if hasattr(torch, dtype.torch_name)
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous. Without NumPy, which torch does not require."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() == 0:
        return memoryview(b"")
    buffer = (ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr())
    buffer.tensor = flat  # type: ignore[attr-defined]  # keeps the memory alive as long as the view exists
    return memoryview(buffer).cast("B")
