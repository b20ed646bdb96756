"""Check milora-init on a GPU with one command, within eight minutes: `make gpu-check`.

    1. the tests marked `gpu`
    2. the solver against other methods (scripts/bench_svd.py) on the shapes of TinyLlama and LLaMA-2-7B
    3. a whole run on a generated checkpoint against a plain copy of it, with the peak GPU memory

It prints a Markdown table and writes all figures as JSON. The exit status is 0 if every step succeeded. Each step has a
time limit; one that exceeds it is reported as such, and the next one starts.

    python scripts/gpu_check.py --json gpu_check.json
    python scripts/gpu_check.py --device cpu --quick     # a rehearsal on a machine without a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_svd import fell_back, machine
from make_checkpoint import make

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 470
TESTS_S, SOLVER_S = 120, 90  # limits of the first two steps; SOLVER_S is for each model
RUN = """
import json, sys, torch
from milora_init import InitOptions, initialize

model, out, rank, device = sys.argv[1:]
options = InitOptions(model=model, out=out, rank=int(rank), device=(device,))
manifest = initialize(options)
manifest = getattr(manifest, "manifest", manifest)
cuda = range(torch.cuda.device_count()) if device != "cpu" else ()
print(json.dumps({
    "elapsed_s": manifest.elapsed_s,
    "solve_s": sum(record.elapsed_s for record in manifest.weights),
    "weights": len(manifest.weights),
    "paths": [(record.shape, record.certificate.path) for record in manifest.weights],
    "worst_component_error": max(record.certificate.component_error or 0 for record in manifest.weights),
    "peak_allocated_bytes": max((torch.cuda.max_memory_allocated(i) for i in cuda), default=None),
    "peak_reserved_bytes": max((torch.cuda.max_memory_reserved(i) for i in cuda), default=None),
}))
"""


class Steps:
    """Runs commands within the time that is left, and collects their results."""

    def __init__(self, total_s: float) -> None:
        self.end = time.monotonic() + total_s
        self.results: dict[str, Any] = {}
        self.ok = True

    def run(self, name: str, command: list[str], *, limit_s: float) -> str | None:
        """The standard output of a command, None if it fails or exceeds its limit."""
        started = time.monotonic()
        limit_s = max(1.0, min(limit_s, self.end - started))
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit_s, stdout=subprocess.PIPE, text=True, check=False)
            output, status = done.stdout, "ok" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            partial = error.stdout or b""
            output = partial.decode() if isinstance(partial, bytes) else partial
            status = f"exceeded {limit_s:.0f} s"
        self.results[name] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
        if status == "ok":
            return output
        self.ok = False
        self.results[name]["output"] = output[-4000:]
        return None


def main() -> int:
    """Run the steps; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; --device cpu rehearses the check without one", file=sys.stderr)
        return 2
    steps = Steps(TOTAL_S)
    steps.results["machine"] = machine(args.device)
    if args.device == "cuda":
        output = steps.run("tests", [sys.executable, "-m", "pytest", "-m", "gpu"], limit_s=TESTS_S)
        if output is not None:
            steps.results["tests"]["summary"] = output.strip().splitlines()[-1]
    work = Path(tempfile.mkdtemp())
    try:
        for model in ("tinyllama",) if args.quick else ("tinyllama", "llama-2-7b"):
            bench(steps, args, model, work / f"{model}.json")
        whole_run(steps, args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(steps.results)
    if args.json:
        args.json.write_text(json.dumps(steps.results, indent=2) + "\n")
    return 0 if steps.ok else 1


def bench(steps: Steps, args: argparse.Namespace, model: str, out: Path) -> None:
    """Time the solver on the shapes of a model."""
    command = [sys.executable, "scripts/bench_svd.py", "--model", model, "--device", args.device]
    command += ["--rank", str(args.rank), "--json", str(out), "--repeat", "1" if args.quick else "2"]
    if args.quick:
        command += ["--no-memory", "--mode", "min"]
    if steps.run(f"solver {model}", command, limit_s=SOLVER_S) is not None:
        steps.results[f"solver {model}"] |= json.loads(out.read_text())


def whole_run(steps: Steps, args: argparse.Namespace, work: Path) -> None:
    """Time a whole run on a generated checkpoint, and a copy of the checkpoint to the same disk."""
    size = "160m" if args.quick else "1b"
    model = work / "model"
    make(model, size=size)
    started = time.monotonic()
    shutil.copytree(model, work / "copy")
    os.sync()
    copy_s = time.monotonic() - started
    shutil.rmtree(work / "copy")
    command = [sys.executable, "-c", RUN, str(model), str(work / "out"), str(args.rank), args.device]
    output = steps.run("whole run", command, limit_s=TOTAL_S)
    if output is not None:
        figures = json.loads(output.strip().splitlines()[-1])
        paths, device = figures.pop("paths"), torch.device(args.device)
        figures["fallbacks"] = sum(fell_back(shape, args.rank, "min", path, device) for shape, path in paths)
        size_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        steps.results["whole run"] |= {"size": size, "size_bytes": size_bytes, "copy_s": copy_s, **figures}


def report(results: dict[str, Any]) -> None:
    """Print the figures as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items() if value is not None)
    print(f"\n{about}\n\n| step | result | seconds |\n|---|---|---|")
    for name, step in results.items():
        if name != "machine":
            print(f"| {name} | {step.get('summary', step['status'])} | {step['seconds']} |")
    print("\n| one layer of | mode | method | seconds | against milora-init |\n|---|---|---|---|---|")
    for step in results.values():
        for row in step.get("totals", ()):
            print(f"| {row['model']} | {row['mode']} | {row['solver']} | {row['time_s']:.3f} | {row['ratio']:.1f} |")
    run = results.get("whole run", {})
    if run.get("status") == "ok":
        gpu = f", peak GPU memory {run['peak_allocated_bytes'] / 2**30:.2f} GiB" if run["peak_allocated_bytes"] else ""
        print(
            f"\nWhole run, {run['size_bytes'] / 1e9:.2f} GB, {run['weights']} weights: {run['elapsed_s']:.1f} s, a copy"
            f" {run['copy_s']:.1f} s; {run['fallbacks']} fallbacks, largest certified component error"
            f" {run['worst_component_error']:.1e}{gpu}"
        )


if __name__ == "__main__":
    sys.exit(main())
