"""Time a whole run of milora-init against the reference method and against a file copy, on one checkpoint.

    python scripts/bench_run.py                     a generated 160M checkpoint
    python scripts/bench_run.py --size 1b           a generated checkpoint of 2 GB
    python scripts/bench_run.py --model FOLDER --no-reference

Each command is a separate process. Its time is wall time; its peak memory is the operating system's figure.

    reference   what the MiLoRA authors' svd_init.py does: load the whole model, torch.linalg.svd in float32 of every
                target, subtract, save_pretrained
    ours        milora-init, the same targets and rank
    copy        cp -r and sync: the least time in which the checkpoint can be written
    one module  milora-init with one small target: the cost without the solver, to compare with a copy
    merge       milora-init merge of the output of `ours`
    scan        milora-init scan of the same targets; and of all linear layers

Copy, one module and merge run twice: with the checkpoint out of the page cache (cold) and in it (warm).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

REFERENCE = """
import sys, torch
from transformers import AutoModelForCausalLM
source, out, rank, *targets = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
with torch.no_grad():
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            W = module.weight.data.float()
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            r = int(rank)
            root = S[-r:].sqrt()
            module.weight.data -= ((U[:, -r:] * root) @ (root[:, None] * Vh[-r:])).to(module.weight.dtype)
model.save_pretrained(out)
"""
PARTS = {"read": "read_s", "solve": "elapsed_s", "write": "write_s"}  # keys of a weight's record in the manifest
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def main() -> None:
    """Run the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Llama-like checkpoint; generated if not given")
    parser.add_argument("--size", default="160m", help="size of the generated checkpoint: tiny, 160m, 1b, 7b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--no-reference", action="store_true", help="do not run the reference method")
    parser.add_argument("--work", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        model = args.model
        if model is None:
            model = work / "model"
            # In a separate process: the peak memory of a child includes the memory of its parent at the fork.
            maker = Path(__file__).parent / "make_checkpoint.py"
            subprocess.run([sys.executable, str(maker), str(model), "--size", args.size], check=True)
        tool = [sys.executable, "-c", "from milora_init.cli.main import main; main()"]
        ours = [*tool, "--model", str(model), "--rank", str(args.rank), "--quiet"]
        targets = [part for target in TARGETS for part in ("--target", target)]
        small = ["--target", "model.layers.0.self_attn.k_proj"]
        script = [sys.executable, "-c", REFERENCE, str(model), str(work / "reference"), str(args.rank), *TARGETS]
        copy = ["sh", "-c", 'cp -r "$0" "$1" && sync', str(model), str(work / "copy")]
        merge = [*tool, "merge", str(work / "ours"), "--quiet", "--out", str(work / "merged")]
        commands = {
            "copy, cold": copy,
            "one module, cold": [*ours, *small, "--out", str(work / "one")],
            "copy": copy,
            "one module": [*ours, *small, "--out", str(work / "one")],
            "ours": [*ours, *targets, "--out", str(work / "ours")],
            "scan": [*tool, "scan", str(model), "--quiet", *targets],
            "scan, all-linear": [*tool, "scan", str(model), "--quiet", "--target", "all-linear"],
            "merge, cold": merge,
            "merge": merge,
            **({} if args.no_reference else {"reference": script}),
        }
        figures = {}
        for name, command in commands.items():
            cache(work / "ours" if name.startswith("merge") else model, keep=not name.endswith("cold"))
            figures[name] = measure(command)
            print(f"{name}: {figures[name]['elapsed_s']:.1f} s", file=sys.stderr)
            if name == "ours":
                manifest = json.loads((work / "ours" / "milora_init.json").read_text())
                for part, key in PARTS.items():
                    figures[name][f"{part}_s"] = sum(weight[key] for weight in manifest["weights"])
            if name != "ours" and not name.startswith("scan"):  # the merge commands need it
                shutil.rmtree(Path(command[-1]) if name != "reference" else work / "reference", ignore_errors=True)
        report(figures, sum(path.stat().st_size for path in model.glob("*.safetensors")))
        if args.json:
            machine = {"processor": platform.processor(), "cores": os.cpu_count(), "torch": version("torch")}
            args.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(command: list[str]) -> dict[str, float]:
    """Seconds, seconds of the processor, and peak resident bytes of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed with {process.returncode}: {' '.join(command[:6])} ...")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "elapsed_s": time.perf_counter() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * unit,
    }


def cache(model: Path, *, keep: bool) -> None:
    """Read the checkpoint into the page cache, or drop it from there."""
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            if not keep:
                os.fsync(file.fileno())  # dirty pages cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while keep and file.read(1 << 24):
                pass


def report(figures: dict[str, dict[str, float]], size_bytes: int) -> None:
    """Print the table."""
    table = Table(title=f"{size_bytes / 1e9:.2f} GB, {os.cpu_count()} cores, torch {version('torch')}", box=None)
    for column in ("", "seconds", "of processor", "against copy", "against reference", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    for name, figure in figures.items():
        seconds = figure["elapsed_s"]
        reference = figures.get("reference", {}).get("elapsed_s")
        table.add_row(
            name,
            f"{seconds:.1f}",
            f"{figure['cpu_s']:.1f}",
            f"{seconds / figures['copy, cold' if name.endswith('cold') else 'copy']['elapsed_s']:.2f} x",
            f"{reference / seconds:.1f} times faster" if reference else "",
            f"{figure['peak_bytes'] / 2**20:.0f} MiB",
        )
    Console().print(table)
    sums = ", ".join(f"{part} {figures['ours'][f'{part}_s']:.1f} s" for part in PARTS)
    print(f"ours, summed over the weights (several run at a time): {sums}")


if __name__ == "__main__":
    main()
