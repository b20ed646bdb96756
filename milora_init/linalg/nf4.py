"""NF4, the 4-bit data type of QLoRA: what a weight becomes when bitsandbytes quantises it.

A block of 64 entries shares one scale, its largest absolute value; each entry becomes the nearest of 16 numbers between
-1 and 1 times that scale.

Source: Dettmers et al. (2023), https://arxiv.org/abs/2305.14314, appendix E; the block size is bitsandbytes' default.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4(W: Tensor, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """W (..., m, n), in float32, after a round trip through NF4 without double quantisation.

    Args:
        W: The weight, or a batch of weights.
        scale_dtype: The scales are rounded to it. With the dtype that the result is stored in, the stored result keeps
            its scales, and another round trip changes nothing.
    """
    entries = W.flatten(-2)
    count = entries.shape[-1]
    blocks = torch.nn.functional.pad(entries, (0, -count % BLOCK)).view(*entries.shape[:-1], -1, BLOCK)
    scale = blocks.abs().amax(dim=-1, keepdim=True).to(scale_dtype).to(W.dtype)
    values = torch.tensor(VALUES, dtype=W.dtype, device=W.device)
    unit = blocks / torch.where(scale == 0, 1, scale)
    nearest = torch.bucketize(unit, (values[1:] + values[:-1]) / 2)
    rounded: Tensor = (values[nearest] * scale).flatten(-2)[..., :count].reshape(W.shape)
    return rounded
