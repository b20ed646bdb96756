"""Which part of a spectrum is wanted. Imports no torch: the command line reads these names at its start."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["min", "max", "mid", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)
