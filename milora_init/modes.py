"""Name the parts of a spectrum that an adapter can be made of.

This file imports no torch, because the command line needs these names before it can load torch.
"""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["min", "max", "mid", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)
