"""Time the solver against other methods, in one run, on the layer shapes of known models.

For the minor components the other methods are a full `torch.linalg.svd` in float32, as in the reference implementation,
a float64 `eigh` of the Gram matrix, and our own solver in float64 alone; for the principal components also
`torch.svd_lowrank` with niter=16. The eigh result, after a Rayleigh-Ritz step in float64, is the truth for the errors
of the components. On CUDA the full SVD is timed with each of cuSOLVER's drivers gesvd and gesvdj too.

With --simulate no time is measured: the solver runs on a simulated GPU, which counts kernel launches, waits, bytes and
operations. Small weights of one shape are counted as a GPU solves them, in batches. The milliseconds printed with the
counts are estimates from data sheets, not measurements.

The weights are synthetic, in bfloat16, with a Gaussian bulk and a power-law head, like the spectra of trained weights.

    python scripts/bench_svd.py                        # TinyLlama's layers, r = 64, under a minute
    python scripts/bench_svd.py --model llama-2-7b     # some minutes
    python scripts/bench_svd.py --full --json bench.json
    python scripts/bench_svd.py --simulate --model llama-2-7b
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import arithmetic_of
from milora_init.linalg.cost import uses_krylov, weights_at_once
from milora_init.linalg.split import Split, split, split_batch
from milora_init.linalg.svd import Triplets, singular_triplets
from milora_init.methods import Mode

# For each model: how many target weights of one layer have this shape (out, in).
MODELS: dict[str, dict[tuple[int, int], int]] = {
    "tinyllama": {(2048, 2048): 1, (256, 2048): 1, (5632, 2048): 1},
    "llama-2-7b": {(4096, 4096): 3, (11008, 4096): 1, (4096, 11008): 1},
    "llama-3-8b": {(4096, 4096): 1, (1024, 4096): 2, (14336, 4096): 1, (4096, 14336): 1},
    "qwen2.5-72b": {(8192, 29568): 1},
    "qwen3-30b-a3b": {(768, 2048): 256, (2048, 768): 128},
}
PRINCIPAL_ONLY = ("svd_lowrank niter=16", "milora-init tol=1e-3")
CUDA_ONLY = ("gesvd float32", "gesvdj float32")
RANKS = (16, 64, 128)
# Peak operations per second in float64 and float32 (no TF32), and bytes per second of memory, from data sheets.
GPUS = {
    "H100 SXM": (67e12, 67e12, 3.35e12),
    "A100": (19.5e12, 19.5e12, 2.0e12),
    "RTX 4090": (1.29e12, 82e12, 1.0e12),
    "L4": (0.47e12, 30e12, 0.3e12),
}
REACHED = 0.7  # assumed share of the peaks
LAUNCH_S = 8e-6  # assumed time of a kernel launch from Python
Factors = tuple[Tensor, Tensor, Tensor]  # U (m, r), s (r,), V (n, r)


@dataclass(frozen=True, slots=True)
class Row:
    """One solver on one weight; `ratio` is its time over ours, `error` the relative error of the component."""

    model: str
    shape: tuple[int, int]
    count: int
    r: int
    mode: Mode
    solver: str
    time_s: float
    ratio: float
    error: float
    peak_extra_bytes: int | None
    note: str
    path: str  # of our solver: the algorithm, else empty
    fell_back: bool  # whether our solver's first algorithm was given up


def weight(m: int, n: int, *, device: torch.device, seed: int = 0) -> Tensor:
    """A seeded (m, n) bfloat16 weight: bulk of standard deviation 0.02, head of q/8 power-law directions."""
    generator = torch.Generator().manual_seed(m * 100_003 + n + seed * 10**10)
    k = min(m, n) // 8

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    left, right = torch.linalg.qr(normal(m, k)).Q, torch.linalg.qr(normal(n, k)).Q
    head = 30 / torch.arange(1, k + 1) ** 0.8 * 0.02 * (m**0.5 + n**0.5)
    return (normal(m, n).mul_(0.02).addmm_(left * head, right.mT)).to(torch.bfloat16).to(device)


def ours(W: Tensor, r: int, mode: Mode) -> Triplets:
    return singular_triplets(W, r, mode=mode)


def ours_rough(W: Tensor, r: int, mode: Mode) -> Triplets:
    return singular_triplets(W, r, mode=mode, tolerance=1e-3)


def ours_in_float64(W: Tensor, r: int, mode: Mode) -> Triplets:
    """The solver without the search in float32."""
    return singular_triplets(W, r, mode=mode, arithmetic=replace(arithmetic_of(W.device), mixed_precision="none"))


def svd_float32(W: Tensor, r: int, mode: Mode) -> Factors:
    U, s, Vh = torch.linalg.svd(W.to(torch.float32), full_matrices=False)
    end = slice(-r, None) if mode == "min" else slice(r)
    return U[:, end], s[end], Vh[end].mT


def with_driver(driver: str) -> Callable[[Tensor, int, Mode], Factors]:
    def solve(W: Tensor, r: int, mode: Mode) -> Factors:
        U, s, Vh = torch.linalg.svd(W.to(torch.float32), full_matrices=False, driver=driver)
        end = slice(-r, None) if mode == "min" else slice(r)
        return U[:, end], s[end], Vh[end].mT

    return solve


def eigh_float64(W: Tensor, r: int, mode: Mode) -> Factors:
    X = (W if W.shape[0] >= W.shape[1] else W.mT).to(torch.float64)
    vectors = torch.linalg.eigh(X.mT @ X).eigenvectors
    V = vectors[:, :r] if mode == "min" else vectors[:, -r:]
    Q, R = torch.linalg.qr(X @ V)
    u, s, vh = torch.linalg.svd(R)
    left, right = Q @ u, V @ vh.mT
    return (left, s, right) if W.shape[0] >= W.shape[1] else (right, s, left)


def lowrank_niter_16(W: Tensor, r: int, _mode: Mode) -> Factors:
    U, s, V = torch.svd_lowrank(W.to(torch.float32), q=r, niter=16)
    return U, s, V


SOLVERS: dict[str, Callable[[Tensor, int, Mode], Factors | Triplets]] = {
    "milora-init": ours,
    "milora-init float64": ours_in_float64,
    "svd float32": svd_float32,
    "gesvd float32": with_driver("gesvd"),
    "gesvdj float32": with_driver("gesvdj"),
    "eigh float64": eigh_float64,
    "milora-init tol=1e-3": ours_rough,
    "svd_lowrank niter=16": lowrank_niter_16,
}


def component_error(a: Factors, truth: Factors) -> float:
    """||A - T||_F / ||T||_F of the two components, without forming either."""
    (Ua, sa, Va), (Ut, st, Vt) = ([x.to(torch.float64) for x in factors] for factors in (a, truth))
    left = torch.linalg.qr(torch.cat([Ua * sa, -Ut * st], dim=1)).R
    right = torch.linalg.qr(torch.cat([Va, Vt], dim=1)).R
    return float((left @ right.mT).norm() / st.norm())


Result = Factors | Triplets


def factors(result: Result) -> Factors:
    return (result.U, result.s, result.V) if isinstance(result, Triplets) else result


def fell_back(shape: tuple[int, int], r: int, mode: Mode, path: str, device: torch.device) -> bool:
    """Whether `path` is not the first algorithm that the solver tries for a weight on a device."""
    arithmetic = arithmetic_of(device)
    if not uses_krylov(max(shape), min(shape), r, mode, gpu=arithmetic.crossing == "gpu"):
        return path != "eigh"
    return path != ("mixed" if arithmetic.float32_first(math.prod(shape), mode) else "lanczos")


def timed(solve: Callable[[Tensor, int, Mode], Result], W: Tensor, r: int, mode: Mode) -> tuple[float, Result]:
    if W.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = solve(W, r, mode)
    if W.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak_extra(solver: str, m: int, n: int, r: int, mode: Mode, device: str, threads: int) -> int:  # noqa: PLR0913  the columns of the table
    """Peak bytes of a solve beyond the weight, -1 if not measurable; on the CPU, call it in a separate process."""
    torch.set_num_threads(threads)
    W = weight(m, n, device=torch.device(device))
    if W.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        SOLVERS[solver](W, r, mode)
        return int(torch.cuda.max_memory_allocated()) - int(before)
    # Generating the weight needed more memory than the weight itself, so the peak is reset.
    clear = Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")
    except OSError:
        return -1
    before = _status("VmRSS")
    SOLVERS[solver](W, r, mode)
    return (_status("VmHWM") - before) * 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)


def bench(args: argparse.Namespace) -> list[Row]:
    device = torch.device(args.device)
    rows: list[Row] = []
    spawn = multiprocessing.get_context("spawn")
    for model in args.model:
        for shape, count in MODELS[model].items():
            W = weight(*shape, device=device)
            ours(W[:600, :600], 8, "min")  # warm-up: the first call of a process loads libraries
            for mode in args.mode:
                for r in args.rank:
                    names = [n for n in SOLVERS if mode == "max" or n not in PRINCIPAL_ONLY]
                    names = [n for n in names if n not in args.skip and (W.is_cuda or n not in CUDA_ONLY)]
                    results = {}
                    for name in names:
                        runs = [timed(SOLVERS[name], W, r, mode) for _ in range(args.repeat)]
                        results[name] = min(runs, key=lambda run: run[0])
                    base = results["milora-init"][0]
                    truth = factors(results["eigh float64"][1]) if "eigh float64" in results else None
                    for name, (seconds, result) in results.items():
                        peak = None
                        if args.memory and name == "milora-init":
                            with spawn.Pool(1) as pool:
                                job = (name, *shape, r, mode, args.device, torch.get_num_threads())
                                peak = pool.apply(peak_extra, job)
                        error = float("nan")
                        note = ""
                        if name == "eigh float64":
                            note = "the truth"
                        elif truth is not None:
                            error = component_error(factors(result), truth)
                        path = result.certificate.path if isinstance(result, Triplets) else ""
                        other = name == "milora-init" and fell_back(shape, r, mode, path, device)
                        ratio = seconds / base
                        row = Row(model, shape, count, r, mode, name, seconds, ratio, error, peak, note, path, other)
                        rows.append(row)
                        print(line(row), flush=True)
    return rows


def line(row: Row) -> str:
    memory = "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 2**20:7.0f} MiB"
    error = row.note if row.note else f"{row.error:.1e}"
    size = f"{row.shape[0]} x {row.shape[1]}"
    return (
        f"{row.model:12} {row.count} x {size:13} r={row.r:<4}{row.mode:4} {row.solver:21}"
        f"{row.time_s:9.2f} s {row.ratio:7.1f}x  {error:>9} {memory} {row.path}"
    )


def totals(rows: list[Row]) -> list[dict[str, object]]:
    """For each model, rank and mode: the seconds that one layer's targeted weights take, and the ratio."""
    out: list[dict[str, object]] = []
    keys = dict.fromkeys((row.model, row.r, row.mode) for row in rows)
    for model, r, mode in keys:
        chosen = [row for row in rows if (row.model, row.r, row.mode) == (model, r, mode)]
        seconds: dict[str, float] = {}
        for row in chosen:
            seconds[row.solver] = seconds.get(row.solver, 0.0) + row.count * row.time_s
        base = seconds["milora-init"]
        for solver, total in seconds.items():
            out.append(
                {
                    "model": model,
                    "r": r,
                    "mode": mode,
                    "solver": solver,
                    "time_s": total,
                    "ratio": total / base,
                }
            )
    return out


def fallbacks(rows: list[Row]) -> str:
    """The share of weights for which our solver's first algorithm was given up."""
    mine = [row for row in rows if row.solver == "milora-init"]
    count = sum(row.fell_back for row in mine)
    return f"fallbacks: {count} of {len(mine)} solves"


def simulate(args: argparse.Namespace) -> list[dict[str, object]]:
    """Count what a split of each weight asks of a simulated GPU, and print estimates of its time."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support import simulated_cuda

    rows: list[dict[str, object]] = []
    cases = itertools.product(args.model, args.mode, args.rank)
    for (model, mode, r), shape in ((case, shape) for case in cases for shape in MODELS[case[0]]):
        together = min(MODELS[model][shape], weights_at_once(max(shape), min(shape), r, mode))
        weights = [weight(*shape, device=torch.device("cpu"), seed=seed) for seed in range(together)]
        with simulated_cuda.simulated() as counts:
            if together == 1:
                made: list[Split | None] = [split(weights[0].to("cuda:0"), r, mode=mode, dtype=torch.bfloat16)]
            else:
                W = torch.stack([W.to("cuda:0") for W in weights])
                made = split_batch(W, r, scale=1.0, mode=mode, factors="balanced", dtype=torch.bfloat16)
        paths = [part.triplets.certificate.path if part else "alone" for part in made]
        what = f"{together} of {shape[0]} x {shape[1]}" if together > 1 else f"{shape[0]} x {shape[1]}"
        print(f"{model} {what} r={r} {mode} {', '.join(sorted(set(paths)))}: {counts}")
        estimates = {}
        for gpu, (float64, float32, bandwidth) in GPUS.items():
            arithmetic = counts.flops["float64"] / float64 + counts.flops["float32"] / float32
            traffic = counts.bytes_touched / bandwidth
            parts = arithmetic / REACHED, traffic / REACHED, counts.launches.total() * LAUNCH_S
            estimates[gpu] = dict(zip(("arithmetic_s", "traffic_s", "launches_s"), parts, strict=True))
            text = " / ".join(f"{1e3 * part:.1f}" for part in parts)
            print(f"    {gpu:9} estimate in ms, arithmetic / traffic / launches: {text}", flush=True)
        rows.append(
            {
                "model": model,
                "shape": shape,
                "weights": together,
                "r": r,
                "mode": mode,
                "paths": paths,
                "launches": counts.launches.total(),
                "waits": counts.waits.total(),
                "bytes_touched": counts.bytes_touched,
                "flops": dict(counts.flops),
                "estimates": estimates,
            }
        )
    return rows


def machine(device: str) -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["tinyllama"])
    parser.add_argument("--rank", nargs="+", type=int, default=[64])
    parser.add_argument("--mode", nargs="+", choices=["min", "max"], default=["min", "max"])
    parser.add_argument("--skip", nargs="+", choices=list(SOLVERS)[1:], default=[], help="do not run these methods")
    parser.add_argument("--repeat", type=int, default=1, help="number of runs; the fastest counts")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help=f"every model, r = {RANKS}: hours on a CPU")
    parser.add_argument("--simulate", action="store_true", help="count on a simulated GPU; measure no time")
    parser.add_argument("--json", type=Path, help="write the rows, totals and machine here")
    args = parser.parse_args(argv)
    if args.full:
        args.model, args.rank = list(MODELS), list(RANKS)
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    about = machine(args.device)
    print("  ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    if args.simulate:
        counted = simulate(args)
        if args.json:
            args.json.write_text(json.dumps({"simulated": counted}, indent=2) + "\n")
        return 0
    rows = bench(args)
    print(fallbacks(rows))
    print("\nOne layer's targeted weights:")
    summary = totals(rows)
    for entry in summary:
        print(
            f"{entry['model']!s:12} r={entry['r']!s:<4}{entry['mode']!s:4} {entry['solver']!s:21}"
            f"{entry['time_s']:9.2f} s {entry['ratio']:7.1f}x"
        )
    if args.json:
        body = {"machine": about, "rows": [asdict(row) for row in rows], "totals": summary}
        args.json.write_text(json.dumps(body, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
