"""Safetensors files with any header at all, for tests of what is believed of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def raw_file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all: bytes as they are, everything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}
