"""Carry a plan out: split every planned weight, copy the rest, assemble the adapter, account for all of it.

Per shard: the output file is laid out and opened under a partial name; targeted weights are read, split and written
at their offsets; everything else is copied as bytes; factors go into a piece of the adapter beside the journal; the
file takes its name; the journal gets a line. A run that is cut off anywhere is resumed by the same command.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from milora_init import __version__, adapter
from milora_init.checkpoint import PickleShard, SafetensorsShard, open_shard
from milora_init.errors import CheckpointError, OutputError, SolveError
from milora_init.manifest import Manifest, WeightRecord
from milora_init.options import InitOptions
from milora_init.output import WORK, OutputFolder
from milora_init.plan import Plan, ShardJob, WeightPlan, make_plan
from milora_init.safetensors_format import DTYPES, SafetensorsWriter, read_header
from milora_init.split import Rounding, split
from milora_init.svd import Certificate
from milora_init.workers import resolve_devices, run


class Progress(Protocol):
    """Who wants to know how far the run is. Called from the workers' threads."""

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """The run starts; `done_bytes` of `plan.source_bytes` were finished by an earlier one."""

    def tensor(self, name: str, size_bytes: int) -> None:
        """A tensor of the source has been dealt with."""

    def shard(self, result: ShardResult, finished: int, of: int, elapsed_s: float) -> None:
        """A file of the output has its name."""


class Silent:
    """Progress that nobody watches."""

    def begin(self, plan: Plan, done_bytes: int) -> None: ...
    def tensor(self, name: str, size_bytes: int) -> None: ...
    def shard(self, result: ShardResult, finished: int, of: int, elapsed_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What came of a ShardJob: sizes of the files it made, relative to the output folder, and its weights' records."""

    shard: str
    files: dict[str, int]
    records: tuple[WeightRecord, ...]


def initialize(options: InitOptions, *, progress: Progress | None = None) -> Manifest:
    """Do the main job: a residual base and its adapter in `options.out`, from `options.model`.

    Returns:
        The manifest, which also stands in the folder as milora_init.json. A finished output of the same request is
        left as it is and its manifest returned.

    Raises:
        MiloraError: See `errors`; what is left of the output is then unfinished, and resumable if any shard was done.
    """
    return decompose(make_plan(options, *locate(options)), progress=progress)


def locate(options: InitOptions) -> tuple[Path, str | None]:
    """Folder and commit of the model: the folder named, or the Hub's snapshot in the cache, fetched if need be."""
    folder = Path(options.model).expanduser()
    if folder.exists() or not _is_hub_id(options.model):
        return folder, None
    from milora_init.hub import fetch

    snapshot = fetch(options.model, revision=options.revision, cache_dir=options.cache_dir, token=options.token)
    return snapshot, snapshot.name


def decompose(plan: Plan, *, progress: Progress | None = None) -> Manifest:
    """Carry out a plan; see `initialize`."""
    progress = progress or Silent()
    started = time.monotonic()
    devices = resolve_devices(plan.options.device)
    out = OutputFolder(Path(plan.options.out).expanduser())
    if out.enter(plan) == "finished":
        return _finished(out)
    try:
        lines = out.done()
        todo = [job for job in plan.jobs if job.target not in lines]
        sizes = {job.target: sum(i.size_bytes for i in job.header.tensors.values()) for job in plan.jobs}
        progress.begin(plan, sum(sizes[name] for name in lines))
        for result in run(todo, devices, lambda job, device: run_shard(job, device, out.path, progress)):
            line = dataclasses.asdict(result)
            out.record(line)
            lines[result.shard] = json.loads(json.dumps(line))
            progress.shard(result, len(lines), len(plan.jobs), time.monotonic() - started)
        manifest = _assemble(plan, out, lines, started)
    except BaseException:
        out.abandon()
        raise
    out.finish(manifest)
    return manifest


def run_shard(job: ShardJob, device: torch.device, out: Path, progress: Progress) -> ShardResult:
    """Turn one file of the source into one file of the output and one piece of the adapter.

    Raises:
        CheckpointError: The source changed since it was planned, or cannot be read.
        OutputError: The output cannot be written.
        SolveError: A weight that cannot be decomposed.
    """
    piece = f"{WORK}/{job.target}.adapter"
    factors = adapter.plan_adapter([(w.weight.module, w.weight.shape) for w in job.weights.values()], job.rank)
    source = open_shard(job.source)
    records = []
    try:
        with SafetensorsWriter(out / job.target, job.header) as base, SafetensorsWriter(out / piece, factors) as lora:
            for name, info in source.header.tensors.items():
                if name not in job.header.tensors:
                    raise CheckpointError(f"{job.source} changed during the run: {name} is new")
                if name in job.weights:
                    records.append(_split_one(job, job.weights[name], source, device, base, lora))
                elif isinstance(source, SafetensorsShard):
                    base.copy(name, source.fileno, source.offset(name))
                else:
                    base.write(name, source.read(name))
                progress.tensor(name, info.size_bytes)
            files = {piece: lora.finish(), job.target: base.finish()}
    finally:
        source.close()
    return ShardResult(job.target, files, tuple(records))


def _split_one(
    job: ShardJob,
    plan: WeightPlan,
    source: SafetensorsShard | PickleShard,
    device: torch.device,
    base: SafetensorsWriter,
    lora: SafetensorsWriter,
) -> WeightRecord:
    weight, started = plan.weight, time.monotonic()
    W = source.read(weight.tensor).to(device)
    if weight.fan_in_fan_out:
        W = W.T
    try:
        result = split(W, job.rank, scale=job.scale, mode=job.mode, dtype=DTYPES[plan.dtype], seed=plan.seed)
    except ValueError as error:
        raise SolveError(
            f"{weight.tensor} in {job.source}: {error}",
            hint="--dtype float32" if "overflows" in str(error) else "repair the checkpoint, or --exclude the module",
        ) from error
    base.write(weight.tensor, (result.residual.T if weight.fan_in_fan_out else result.residual).cpu())
    lora.write(adapter.lora_key(weight.module, "A"), result.A.cpu())
    lora.write(adapter.lora_key(weight.module, "B"), result.B.cpu())
    triplets = result.triplets
    s = triplets.s.tolist()
    return WeightRecord(
        module=weight.module,
        tensor=weight.tensor,
        shape=weight.shape,
        source_dtype=_torch_name(plan.source_dtype),
        dtype=_torch_name(plan.dtype),
        rank=job.rank,
        s_first=s[0],
        s_last=s[-1],
        s_max=triplets.s_max,
        energy=result.rounding.component**2,
        untrainable=sum(value < 1e-6 * triplets.s_max or value == 0 for value in s),
        certificate=_plain(triplets.certificate),
        rounding=_plain(result.rounding),
        device=str(device),
        elapsed_s=round(time.monotonic() - started, 4),
    )


def _assemble(plan: Plan, out: OutputFolder, lines: dict[str, dict[str, Any]], started: float) -> Manifest:
    """All shards stand: put the adapter together, copy the side files, then make the folder loadable."""
    (out.path / adapter.FOLDER).mkdir(exist_ok=True)
    with SafetensorsWriter(out.path / adapter.WEIGHTS, plan.adapter_header) as lora:
        for job in plan.jobs:
            piece = SafetensorsShard(out.path / WORK / f"{job.target}.adapter")
            try:
                for key in piece.header.tensors:
                    lora.copy(key, piece.fileno, piece.offset(key))
            finally:
                piece.close()
        lora.finish()
    out.write(adapter.CONFIG, (json.dumps(plan.adapter_config, indent=2) + "\n").encode())
    for name in plan.side_files:
        out.write(name, (plan.checkpoint.folder / name).read_bytes())
    records = {record["module"]: record for line in lines.values() for record in line["records"]}
    _account(plan, out, set(records))
    if plan.index is not None:
        out.write("model.safetensors.index.json", plan.index)
    out.write("config.json", plan.config_bytes)
    options = plan.options
    return Manifest(
        source={
            "model": options.model,
            "revision": plan.revision,
            "architecture": plan.naming.architecture,
        },
        out=options.out,
        fingerprint=plan.fingerprint,
        inputs=plan.inputs,
        versions=_versions(),
        adapter=plan.adapter_config,
        files={name: (out.path / name).stat().st_size for name in plan.files},
        notices=plan.notices,
        weights=tuple(WeightRecord.from_json(records[w.weight.module]) for w in plan.weights),
        elapsed_s=round(time.monotonic() - started, 3),
    )


def _account(plan: Plan, out: OutputFolder, done: set[str]) -> None:
    """Compare what stands on disk with what was planned, down to each tensor's dtype, shape and place."""
    planned = {w.weight.module for w in plan.weights}
    if done != planned:
        raise OutputError(f"{len(planned ^ done)} weights are unaccounted for, {min(planned ^ done)} first")
    for path, header in ((out.path / job.target, job.header) for job in plan.jobs):
        if read_header(path).tensors != header.tensors:
            raise OutputError(f"{path} is not the file that was planned", hint="start again with --overwrite")
    keys = {adapter.lora_key(module, factor) for module in planned for factor in "AB"}
    if set(read_header(out.path / adapter.WEIGHTS).tensors) != keys:
        raise OutputError(f"{adapter.WEIGHTS} is not the adapter that was planned", hint="start again with --overwrite")


def _finished(out: OutputFolder) -> Manifest:
    from milora_init.manifest import read_manifest

    manifest = read_manifest(out.path)
    assert manifest is not None
    return manifest


def _versions() -> dict[str, str]:
    import safetensors
    import transformers

    return {
        "milora_init": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def _plain(figures: Certificate | Rounding) -> dict[str, Any]:
    """A dataclass as JSON has it, which knows no infinity."""
    values = dataclasses.asdict(figures)
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _torch_name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")


def _is_hub_id(model: str) -> bool:
    return not model.startswith((".", "/", "~")) and model.count("/") <= 1 and "\\" not in model
