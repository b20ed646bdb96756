"""Measure what grows with the size of a model: planning, the journal, the manifest, and the flow of tasks.

    python scripts/bench_scale.py                 planning, journal and manifest; the flow of local files
    python scripts/bench_scale.py --ray           also 10,000 and 100,000 tasks that do nothing, on Ray

The model has the shapes of DeepSeek-V3: 163 files of holes, which take no space on the disk. No weight is solved. Every
measurement is a process of its own; its memory is the operating system's figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILES = 163
TASKS = (10_000, 100_000)
# Places, devices and threads of each, files and weights of the bars; every solve is a sleep.
SLEEP_S = 0.5
FLOWS = ((16, 1), (8, 2))


def main() -> int:
    """Run the measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true", help="measure the tasks on Ray too")
    parser.add_argument("--layers", type=int, default=61, help="fewer layers than DeepSeek-V3 has, for a quick look")
    parser.add_argument("--work", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, *arguments = args.measure
        print(json.dumps(MEASUREMENTS[name](*arguments)))
        return 0
    work = Path(tempfile.mkdtemp(dir=args.work))
    figures: dict[str, Any] = {"machine": {"processor": platform.processor(), "cores": os.cpu_count()}}
    try:
        make_holes(work / "model", args.layers)
        figures["planning"] = measure("planning", work / "model", work / "out")
        weights = figures["planning"]["weights"]
        figures["journal"] = measure("journal", work / "journal", weights)
        figures["manifest"] = measure("manifest", work / "manifest", weights)
        for devices, threads in FLOWS:
            figures[f"{devices} devices x {threads}"] = measure("files", work / "flow", devices, threads)
        for count in TASKS if args.ray else ():
            figures[f"{count} tasks on Ray"] = measure("tasks", count)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(name: str, *arguments: object) -> dict[str, Any]:
    """Run one measurement in a process of its own; print and return its figures."""
    command = [sys.executable, __file__, "--measure", name, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{key} {round(value, 3):,}" for key, value in figures.items())
    print(f"{name} {' '.join(map(str, arguments[1:] if name != 'tasks' else arguments))}: {shown}", flush=True)
    return figures


def peak_mib() -> float:
    """The most memory that this process has had, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def make_holes(folder: Path, layers: int) -> None:
    """Write a checkpoint with the shapes of DeepSeek-V3, whose files are headers with holes behind them."""
    import transformers

    from milora_init.checkpoint.header import plan_header

    folder.mkdir(parents=True)
    config: Any = transformers.DeepseekV3Config(num_hidden_layers=layers, architectures=["DeepseekV3ForCausalLM"])
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    shapes = list(_shapes(config))
    per_file = -(-len(shapes) // FILES)
    weight_map: dict[str, str] = {}
    for number in range(FILES):
        name = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        held = shapes[number * per_file : (number + 1) * per_file]
        header = plan_header(((tensor, "BF16", shape) for tensor, shape in held), metadata={"format": "pt"})
        (folder / name).write_bytes(header.raw)
        os.truncate(folder / name, header.file_bytes)
        weight_map |= dict.fromkeys((tensor for tensor, _ in held), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shapes(config: Any) -> Any:
    """Name and shape of every tensor of a DeepSeek-V3."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_dim, v_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention = {
            "q_a_proj": (config.q_lora_rank, hidden), "q_b_proj": (heads * q_dim, config.q_lora_rank),
            "kv_a_proj_with_mqa": (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
            "kv_b_proj": (heads * (config.qk_nope_head_dim + v_dim), config.kv_lora_rank),
            "o_proj": (hidden, heads * v_dim),
        }  # fmt: skip
        yield from ((f"{prefix}.self_attn.{name}.weight", shape) for name, shape in attention.items())
        yield f"{prefix}.self_attn.q_a_layernorm.weight", (config.q_lora_rank,)
        yield f"{prefix}.self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if layer < config.first_k_dense_replace:
            yield from _mlp(f"{prefix}.mlp", hidden, config.intermediate_size)
            continue
        yield f"{prefix}.mlp.gate.weight", (config.n_routed_experts, hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
        yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, config.moe_intermediate_size)
        for expert in range(config.n_routed_experts):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Any:
    yield f"{prefix}.gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}.up_proj.weight", (intermediate, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)


def planning(model: str, out: str) -> dict[str, Any]:
    """Plan a run with all linear layers and the experts."""
    from milora_init.options import InitOptions
    from milora_init.plan.plan import make_plan

    before, started, cpu = peak_mib(), time.perf_counter(), time.process_time()
    options = InitOptions(model=model, out=out, rank=64, target=("all-linear", "experts"))
    plan = make_plan(options, Path(model))
    sizes = {"fingerprint": plan.fingerprint, "adapter": plan.adapter_bytes}
    assert sizes
    return {
        "weights": len(plan.weights),
        "files": len(plan.jobs),
        "elapsed_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": peak_mib(),
        "before_mib": before,
        "estimated_mib": plan.peak_memory_bytes(2) / 2**20,
    }


def _record(number: int) -> Any:
    """A record as a run makes it."""
    from milora_init.accuracy import Certificate, Rounding
    from milora_init.manifest import WeightRecord

    certificate = Certificate(
        path="lanczos", reason="smallest triplets of a large weight", residual=1.23456789e-15, gap=1.23456789e-05,
        orthogonality=1.23456789e-15, component_error=1.23456789e-10, complete="Sturm count",
    )  # fmt: skip
    leaks: dict[str, float | None] = {"bfloat16": 0.0123456789, "float16": 0.00123456789, "float32": 1.23456789e-07}
    rounding = Rounding(component=0.0123456789, error=0.00123456789, leak=0.0123456789, leak_if=leaks)
    return WeightRecord(
        module=f"model.layers.{number // 768}.mlp.experts.{number % 256}.gate_proj",
        tensor=f"model.layers.{number // 768}.mlp.experts.{number % 256}.gate_proj.weight",
        shape=(2048, 7168), transposed=False, row=None, expert=None,
        key=f"model.layers.{number // 768}.mlp.experts.{number % 256}.gate_proj", source_dtype="bfloat16",
        dtype="bfloat16", rank=64, scale=1.0, s_first=0.123456789, s_last=0.0123456789, s_max=12.3456789,
        energy=1.23456789e-05, untrainable=0, certificate=certificate, rounding=rounding, device="cuda:0",
        read_s=0.1234, elapsed_s=0.1234, write_s=0.1234,
    )  # fmt: skip


def journal(path: str, weights: str) -> dict[str, Any]:
    """Append the entries of all files, and read them."""
    from milora_init.run.journal import Entry, Head, Journal

    made = Journal(Path(path), out=Path(path).parent)
    made.append(Head("0" * 64, {}, ()))
    longest, started = 0.0, time.perf_counter()
    records = [_record(number) for number in range(int(weights))]
    per_file = -(-len(records) // FILES)
    built = time.perf_counter()
    for number in range(FILES):
        name = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        before = time.perf_counter()
        held = tuple(records[number * per_file : (number + 1) * per_file])
        made.append(Entry(name, {name: 1 << 33}, held, {name: "0" * 64}))
        longest = max(longest, time.perf_counter() - before)
    written = time.perf_counter()
    assert len(made.shards()) == FILES
    return {
        "size_mb": Path(path).stat().st_size / 1e6,
        "append_s": written - built,
        "longest_s": longest,
        "read_s": time.perf_counter() - written,
        "records_s": built - started,
        "peak_mib": peak_mib(),
    }


def manifest(path: str, weights: str) -> dict[str, Any]:
    """Write the records of all weights as a manifest does."""
    import dataclasses

    before = peak_mib()
    records = [_record(number) for number in range(int(weights))]
    started = time.perf_counter()
    content = [dataclasses.asdict(record) for record in records]
    Path(path).write_text(json.dumps(content, indent=1))
    return {
        "size_mb": Path(path).stat().st_size / 1e6,
        "elapsed_s": time.perf_counter() - started,
        "peak_mib": peak_mib(),
        "before_mib": before,
    }


def files(folder: str, devices: str, threads: str) -> dict[str, Any]:
    """Make 18 files with 40 weights, each a sleep: how near to the ideal time?"""
    import torch

    from milora_init.run.makers import LocalMakers
    from milora_init.run.pool import FilePool, SolverPool
    from milora_init.run.progress import ShardResult

    def sleep(job: int, _device: torch.device, device_lock: Any, _progress: Any) -> int:
        with device_lock:
            time.sleep(SLEEP_S)
        return job

    class Writer:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None: ...

        def copy_other_tensors(self, *_: object) -> None: ...

        def finish(self, *_: object) -> ShardResult[int]:
            return ShardResult(str(self.number), {}, (), {}, "")

    del folder
    counts = [3 if number < 4 else 2 for number in range(18)]
    weights, places = sum(counts), int(devices)
    ideal_s = -(-weights // places) * SLEEP_S
    started = time.perf_counter()
    with FilePool() as pool, SolverPool([torch.device("cpu")] * places, threads_per_device=int(threads)) as solvers:
        makers: Any = LocalMakers(
            solvers,
            pool,
            open_shard=lambda number: Writer(number),  # type: ignore[arg-type, return-value]
            submit=lambda number, _: [solvers.submit(sleep, job) for job in range(counts[number])],
            count=lambda number: counts[number],
        )
        with makers:
            made = list(makers.run(range(18)))
    assert len(made) == 18
    elapsed_s = time.perf_counter() - started
    return {"weights": weights, "elapsed_s": elapsed_s, "ideal_s": ideal_s, "of_ideal": elapsed_s / ideal_s}


def tasks(count: str) -> dict[str, Any]:
    """Run tasks that do nothing on a Ray of this machine."""
    import logging

    import ray

    from milora_init.run.ray_makers import flow

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.FATAL)
    task = ray.remote(_nothing)
    ray.get(task.remote(0))
    before, started = peak_mib(), time.perf_counter()
    done = sum(1 for _ in flow(ray, range(int(count)), task.remote))
    elapsed_s = time.perf_counter() - started
    assert done == int(count)
    figures = {"elapsed_s": elapsed_s, "ms_each": 1e3 * elapsed_s / done, "peak_mib": peak_mib(), "before_mib": before}
    ray.shutdown()
    return figures


def _nothing(number: int) -> int:
    return number


MEASUREMENTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "planning": planning, "journal": journal, "manifest": manifest, "files": files, "tasks": tasks,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
