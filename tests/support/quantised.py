"""Tiny quantised checkpoints in every format that is read, and the values that they stand for.

The libraries write what they can write on a CPU: compressed-tensors and bitsandbytes. The others are written here, from
the published layouts, entry by entry where it matters, so that no code is shared with `checkpoint.dequantise`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Parts = dict[str, Tensor]


def fp8_blocks(name: str, W: Tensor, block: tuple[int, int] = (128, 128)) -> Parts:
    """X.weight and X.weight_scale_inv of DeepSeek: one scale for each block, the last block cut short."""
    m, n = W.shape
    scale = torch.empty(math.ceil(m / block[0]), math.ceil(n / block[1]))
    q = torch.empty(m, n, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = W[part].abs().max().clamp_min(1e-12) / 448
            q[part] = (W[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return {name: q, f"{name}_scale_inv": scale}


def fp8_static(name: str, W: Tensor) -> Parts:
    """X.weight, X.weight_scale_inv and X.activation_scale of Mistral: one number each, the scale in bfloat16."""
    scale = (W.abs().max() / 448).to(torch.bfloat16)
    q = (W / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    module = name.removesuffix(".weight")
    return {name: q, f"{name}_scale_inv": scale, f"{module}.activation_scale": torch.tensor(0.5, dtype=torch.bfloat16)}


def mxfp8(name: str, W: Tensor, scale_name: str = "weight_scale_inv", exponents: torch.dtype = torch.uint8) -> Parts:
    """Groups of 32 with an exponent each, as bytes or as E8M0."""
    groups = W.unflatten(1, (-1, 32))
    exponent = (groups.abs().amax(-1).clamp_min(1e-12) / 448).log2().ceil()
    q = (groups / exponent.exp2()[..., None]).flatten(1).to(torch.float8_e4m3fn)
    scale = (exponent + 127).to(torch.uint8).view(exponents)
    return {name: q, f"{name.removesuffix('.weight')}.{scale_name}": scale}


def fp4_codes(groups: Tensor) -> Tensor:
    """The 4-bit codes (..., group) nearest to values that are scaled already."""
    code = (groups.abs()[..., None] - E2M1).abs().argmin(-1)
    return (code + 8 * (groups < 0)).to(torch.uint8)


def low_first(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first one in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def fp4_experts(name: str, W: Tensor) -> Parts:
    """X.weight in I8 and X.scale in E8M0, as DeepSeek V4 stores its experts."""
    groups = W.unflatten(1, (-1, 32))
    exponent = (groups.abs().amax(-1).clamp_min(1e-12) / 6).log2().ceil()
    codes = low_first(fp4_codes(groups / exponent.exp2()[..., None]).flatten(1))
    scale = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return {name: codes.view(torch.int8), f"{name.removesuffix('.weight')}.scale": scale}


def mxfp4(name: str, P: Tensor) -> Parts:
    """P_blocks and P_scales of gpt-oss for P (experts, in, out): the codes are those of the transposed matrices."""
    groups = P.mT.contiguous().unflatten(2, (-1, 32))
    exponent = (groups.abs().amax(-1).clamp_min(1e-12) / 6).log2().ceil()
    blocks = low_first(fp4_codes(groups / exponent.exp2()[..., None]))
    return {f"{name}_blocks": blocks, f"{name}_scales": (exponent + 127).to(torch.uint8)}


def rewrite(
    folder: Path,
    quantise: Callable[[str, Tensor], Parts | None],
    config: Mapping[str, Any],
    *,
    files: Callable[[str], str] | None = None,
) -> Path:
    """Replace the tensors of a checkpoint by the parts that `quantise` makes of them.

    Args:
        folder: A checkpoint; its tensors are given in float32.
        quantise: The parts of a tensor; None to keep it.
        config: Keys to set in config.json.
        files: The file for each stored tensor; None for that of the tensor that it was made of.
    """
    from safetensors.torch import load_file

    old = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    new: dict[str, Parts] = {name: {} for name in old}
    for file, tensors in old.items():
        for name, tensor in tensors.items():
            parts = quantise(name, tensor.float())
            for part, value in ({name: tensor} if parts is None else parts).items():
                new.setdefault(files(part) if files else file, {})[part] = value
    for path in folder.glob("*.safetensors"):
        path.unlink()
    weight_map = {}
    for file, tensors in new.items():
        if tensors:
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    return folder
