"""Measure how fast quantised tensors become numbers, and the peak memory of a run on a quantised checkpoint.

    python scripts/bench_dequantise.py                 entries a second on one thread, ours and a plain implementation
    python scripts/bench_dequantise.py --memory        also the peak memory of `milora-init` on 1 GB of FP8 and on the
                                                       same model in bfloat16

A plain implementation is the formula in torch, on whole tensors: the codes to float32, times the scales. Both read from
memory, give float32, and are compared entry by entry.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_run import measure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from milora_init.checkpoint.dequantise import QuantisedSource, locate
from milora_init.checkpoint.folder import open_model

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
ROWS, COLUMNS = 8192, 4096
Case = tuple[dict[str, Any], dict[str, Tensor], Callable[[], Tensor]]


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory; writes 5 GB")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many rounds counts")
    parser.add_argument("--work", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quantise", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quantise:
        return quantise(*args.quantise)
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        figures: dict[str, Any] = {"rates": {}, "torch": version("torch"), "cores": os.cpu_count()}
        if args.memory:  # first: the peak memory of a child includes the memory of its parent at the fork
            figures["memory"] = memory(work)
        for name, make in CASES.items():
            figures["rates"][name] = rate(make(), work / "case", args.rounds)
        report(figures)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def rate(case: Case, folder: Path, rounds: int) -> dict[str, float]:
    """Entries a second of ours and of the plain implementation; exits if they differ in one entry."""
    config, tensors, plain = case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    checkpoint = open_model(folder)
    (name,) = checkpoint.quantised.tensors
    source = locate(checkpoint, name)
    assert isinstance(source, QuantisedSource)
    source = source.at(0) if len(source.shape) > 2 else source  # one expert
    found = source.read()
    if not torch.equal(found, plain().reshape(found.shape)):
        sys.exit(f"{checkpoint.quantised.tensors[name].rule.format}: ours and the plain implementation differ")
    entries = math.prod(found.shape)
    del found
    return {"ours": entries / best(source.read, rounds), "plain": entries / best(plain, rounds)}


def best(call: Callable[[], object], rounds: int) -> float:
    """The least seconds of this thread in some rounds: other work on the machine does not count."""
    seconds = []
    for _ in range(rounds):
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return min(seconds)


def fp8() -> Case:
    q = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    scale = torch.rand(ROWS // 128, COLUMNS // 128)

    def plain() -> Tensor:
        return q.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)

    return {"quant_method": "fp8"}, {"a.weight": q, "a.weight_scale_inv": scale}, plain


def fp8_static() -> Case:
    q, scale = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn), torch.tensor(0.25)
    config = {"quant_method": "fp8", "weight_block_size": None}
    return config, {"a.weight": q, "a.weight_scale_inv": scale}, lambda: q.float() * scale


def nibbles(packed: Tensor) -> Tensor:
    """The codes of bytes, the low half first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def mxfp4() -> Case:
    codes = torch.randint(0, 256, (1, ROWS, COLUMNS // 32, 16), dtype=torch.uint8)
    scale = torch.randint(120, 130, (1, ROWS, COLUMNS // 32), dtype=torch.uint8)

    def plain() -> Tensor:
        values = E2M1[nibbles(codes).long()] * torch.exp2(scale.float() - 127)[..., None]
        return values.flatten(-2).mT

    return {"quant_method": "mxfp4"}, {"a_blocks": codes, "a_scales": scale}, plain


def packed(bits: int) -> Callable[[], Case]:
    def make() -> Case:
        words = torch.randint(-(2**31), 2**31, (ROWS, COLUMNS * bits // 32), dtype=torch.int64).to(torch.int32)
        scale = torch.rand(ROWS, COLUMNS // 32).to(torch.bfloat16)
        weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}

        def plain() -> Tensor:
            stream = words.view(torch.uint8)
            if bits == 4:
                codes = nibbles(stream).to(torch.int32)
            else:
                single = ((stream[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).view(ROWS, COLUMNS, bits)
                codes = (single.to(torch.int32) << torch.arange(bits, dtype=torch.int32)).sum(-1)
            return (codes - (1 << (bits - 1))).float() * scale.float().repeat_interleave(32, 1)

        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
        shape = torch.tensor([ROWS, COLUMNS])
        return config, {"a.weight_packed": words, "a.weight_scale": scale, "a.weight_shape": shape}, plain

    return make


def nvfp4() -> Case:
    codes = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8)
    scale, whole = torch.rand(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn), torch.tensor([3.0])

    def plain() -> Tensor:
        return E2M1[nibbles(codes).long()] * (scale.float() / whole).repeat_interleave(16, 1)

    tensors = {"a.weight_packed": codes, "a.weight_scale": scale, "a.weight_global_scale": whole}
    return {"quant_method": "compressed-tensors"}, tensors, plain


CASES: dict[str, Callable[[], Case]] = {
    "FP8, blocks of 128 x 128": fp8,
    "FP8, one scale": fp8_static,
    "MXFP4 of gpt-oss": mxfp4,
    "NVFP4": nvfp4,
    "int4, groups of 32": packed(4),
    "int3, groups of 32": packed(3),
}


def memory(work: Path) -> dict[str, float]:
    """Peak memory in bytes of `milora-init` on a model in bfloat16, and on the same in FP8 with 128 x 128 blocks."""
    dense, small = work / "bfloat16", work / "fp8"
    maker = Path(__file__).parent / "make_checkpoint.py"
    subprocess.run([sys.executable, str(maker), str(dense), "--size", "1b"], check=True)
    subprocess.run([sys.executable, __file__, "--quantise", str(dense), str(small)], check=True)
    tool = [sys.executable, "-c", "from milora_init.cli.main import main; main()"]
    figures = {}
    for folder in (dense, small):
        # A few weights are enough for the peak: a run keeps as many as it has threads.
        command = [*tool, str(folder), "--target", "re:model.layers.[01]..*(up|down)_proj", "--quiet"]
        figures[folder.name] = measure([*command, "--out", str(work / "out")])["peak_bytes"]
        shutil.rmtree(work / "out")
    return figures


def quantise(dense: Path, small: Path) -> None:
    """Write a checkpoint in FP8 with blocks of 128 x 128."""
    shutil.copytree(dense, small, ignore=shutil.ignore_patterns("*.safetensors"))
    weight_map: dict[str, str] = {}
    for path in sorted(dense.glob("*.safetensors")):
        tensors = {}
        for name, W in load_file(path).items():
            if name.endswith("_proj.weight"):
                m, n = math.ceil(W.shape[0] / 128), math.ceil(W.shape[1] / 128)
                scale = torch.full((m, n), float(W.abs().max()) / 448)
                tensors[name] = (W.float() / scale[0, 0]).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = scale
            else:
                tensors[name] = W
        save_file(tensors, small / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (small / "config.json").write_text(json.dumps(config))


def report(figures: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table(title=f"million entries a second, one thread, torch {figures['torch']}", box=None)
    for column in ("format", "ours", "plain", "ratio"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, found in figures["rates"].items():
        ours, plain = found["ours"], found["plain"]
        table.add_row(name, f"{ours / 1e6:.0f}", f"{plain / 1e6:.0f}", f"{ours / plain:.1f} x")
    Console().print(table)
    if "memory" in figures:
        sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in figures["memory"].items())
        print(f"peak memory: {sizes}")


if __name__ == "__main__":
    main()
