"""Build safetensors files with an arbitrary header, valid or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def raw_file(header: Any, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file. A header given as bytes is used unchanged; anything else is written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}
