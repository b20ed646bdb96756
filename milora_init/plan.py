"""From options, headers and names to a Plan: everything that will be done, before anything is.

Pure: nothing is written and no weight is read. `--dry-run` prints a plan; `decompose` runs one. Each shard is one
ShardJob, a value made of names and numbers, which can travel to a thread, a device or another machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from milora_init import __version__, adapter
from milora_init.checkpoint import (
    SAFETENSORS_INDEX,
    SAFETENSORS_SINGLE,
    Checkpoint,
    Stamp,
    open_checkpoint,
    read_bytes,
    side_files,
)
from milora_init.errors import PlanError
from milora_init.manifest import MANIFEST
from milora_init.naming import Adaptable, Naming, resolve, select
from milora_init.options import InitOptions, Mode
from milora_init.safetensors_format import DTYPES, Header, plan_header, torch_name

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPE_KEYS = {"dtype", "torch_dtype"}  # of config.json, today and before transformers 4.56
_SOLVABLE = ("F64", "F32", "BF16", "F16")
_PROCESS_BYTES = 450 << 20  # Python with torch and transformers loaded


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """One weight to split; `seed` is its own, so that no weight's draw depends on the order of the work."""

    weight: Adaptable
    source_dtype: str
    dtype: str
    seed: int


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One file of the source and the file it becomes; `stamp` is the source's when it was planned."""

    source: Path
    stamp: Stamp
    target: str
    header: Header
    weights: Mapping[str, WeightPlan]
    rank: int
    scale: float
    mode: Mode


@dataclass(frozen=True)
class Plan:
    """The whole run.

    Attributes:
        options: As asked.
        checkpoint: The source, headers read.
        revision: The commit it is of, None for a local folder.
        naming: Its modules.
        jobs: One per shard.
        weights: Every weight to split, in the model's order.
        index: Content of the output's index file, None for a single file.
        config_bytes: The output's config.json.
        side_files: What is copied as it is, relative to the source.
        notices: What a person should know before the run.
    """

    options: InitOptions
    checkpoint: Checkpoint
    revision: str | None
    naming: Naming
    jobs: tuple[ShardJob, ...]
    weights: tuple[WeightPlan, ...]
    index: bytes | None
    config_bytes: bytes
    side_files: tuple[str, ...]
    notices: tuple[str, ...]

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        options = self.options
        return adapter.adapter_config(
            base=options.out,
            rank=options.rank,
            alpha=options.lora_alpha,
            rslora=options.rslora,
            dropout=options.dropout,
            task_type=options.task_type or self.naming.task_type,
            targets=adapter.target_modules([w.weight.module for w in self.weights], self.naming.modules),
            fan_in_fan_out=all(w.weight.fan_in_fan_out for w in self.weights),
        )

    @cached_property
    def adapter_header(self) -> Header:
        return adapter.plan_adapter([(w.weight.module, w.weight.shape) for w in self.weights], self.options.rank)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Every file of the output, the manifest excepted."""
        index = () if self.index is None else (SAFETENSORS_INDEX,)
        shards = (job.target for job in self.jobs)
        return (*shards, *index, "config.json", *self.side_files, adapter.CONFIG, adapter.WEIGHTS)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All that decides the bytes of the base and the adapter, in a form that two runs can compare."""
        options = self.options
        return {
            "version": __version__,
            "source": dict(self.checkpoint.digest),
            "rank": options.rank,
            "mode": options.mode,
            "alpha": options.lora_alpha,
            "rslora": options.rslora,
            "dropout": options.dropout,
            "task_type": self.adapter_config["task_type"],
            "dtype": options.dtype,
            "seed": options.seed,
            "modules": [w.weight.module for w in self.weights],
        }

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()

    @property
    def source(self) -> Path:
        return self.checkpoint.folder

    @property
    def overwrite(self) -> bool:
        return self.options.overwrite

    @property
    def room_bytes(self) -> int:
        # The adapter counts twice: once in pieces beside the journal, once assembled.
        return self.base_bytes + 2 * self.adapter_bytes

    @property
    def source_bytes(self) -> int:
        return sum(header.data_bytes for header in self.checkpoint.headers.values())

    @property
    def base_bytes(self) -> int:
        return sum(job.header.file_bytes for job in self.jobs)

    @property
    def adapter_bytes(self) -> int:
        return self.adapter_header.file_bytes

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate for one worker on the CPU: the largest weight, its Gram matrix and two factors, its residual."""
        return _PROCESS_BYTES + max(self._memory_bytes(w) for w in self.weights)

    @property
    def solve_flops(self) -> int:
        """Estimate of the multiply-adds: a Gram matrix of half p q^2 products, and a few times q^3 after it."""
        return sum(round(1.1 * max(shape) * min(shape) ** 2 + 1.4 * min(shape) ** 3) for shape in self._shapes)

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        return [w.weight.shape for w in self.weights]

    def _memory_bytes(self, w: WeightPlan) -> int:
        (m, n), q = w.weight.shape, min(w.weight.shape)
        stored = m * n * (DTYPES[w.source_dtype].itemsize + DTYPES[w.dtype].itemsize)
        return stored + 3 * q * q * 8 + 4 * (m + n) * self.options.rank * 8 + (64 << 20)

    def kinds(self) -> dict[tuple[str, tuple[int, int], str], int]:
        """How many weights there are of each (suffix, shape, dtype)."""
        return dict(Counter((w.weight.module.rpartition(".")[2], w.weight.shape, w.source_dtype) for w in self.weights))


def make_plan(options: InitOptions, folder: Path, revision: str | None = None) -> Plan:
    """Plan a run over the checkpoint in `folder`, which on the Hub is the commit `revision`.

    Raises:
        CheckpointError: The source cannot be trusted.
        PlanError: The request does not fit it.
    """
    checkpoint = open_checkpoint(folder)
    naming = resolve(folder, checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    chosen = select(naming, options.target, options.exclude)
    _require_rank(chosen, options.rank)
    stored = None if options.dtype == "auto" else _STORED[options.dtype]
    weights = tuple(_plan_weight(weight, checkpoint, stored, options.seed) for weight in chosen)
    by_tensor = {w.weight.tensor: w for w in weights}
    jobs = tuple(
        _plan_shard(checkpoint, file, number, by_tensor, options) for number, file in enumerate(checkpoint.headers)
    )
    return Plan(
        options=options,
        checkpoint=checkpoint,
        revision=revision,
        naming=naming,
        jobs=jobs,
        weights=weights,
        index=_plan_index(checkpoint, jobs),
        config_bytes=config_with_dtype(checkpoint, options.dtype),
        side_files=tuple(side_files(folder)),
        notices=tuple(_notices(checkpoint, weights, options)),
    )


def _plan_weight(weight: Adaptable, checkpoint: Checkpoint, stored: str | None, seed: int) -> WeightPlan:
    dtype = checkpoint.tensors[weight.tensor].dtype
    if dtype not in _SOLVABLE:
        raise PlanError(
            f"{weight.tensor} is stored as {dtype}: a packed or quantised weight has no singular components of its own",
            hint="start from the unquantised checkpoint, or dequantise it and save it again",
        )
    return WeightPlan(weight, dtype, stored or dtype, own_seed(seed, weight.tensor))


def own_seed(seed: int, tensor: str) -> int:
    """The seed of one weight."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{tensor}".encode()).digest()[:7], "big")


def _plan_shard(
    checkpoint: Checkpoint, file: str, number: int, by_tensor: Mapping[str, WeightPlan], options: InitOptions
) -> ShardJob:
    source = checkpoint.headers[file]
    weights = {name: by_tensor[name] for name in source.tensors if name in by_tensor}
    target = file
    if checkpoint.is_pickle:
        count = len(checkpoint.headers)
        target = (
            SAFETENSORS_SINGLE if checkpoint.index is None else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        )
    # A header that need not change is kept to the letter: the file then differs from its source in values only.
    changed = [w for w in weights.values() if w.dtype != w.source_dtype]
    header = source
    if changed:
        entries = (
            (i.name, weights[i.name].dtype if i.name in weights else i.dtype, i.shape) for i in source.tensors.values()
        )
        header = plan_header(entries, metadata=source.metadata)
    return ShardJob(
        source=checkpoint.folder / file,
        stamp=checkpoint.stamps[file],
        target=target,
        header=header,
        weights=weights,
        rank=options.rank,
        scale=options.scale,
        mode=options.mode,
    )


def _plan_index(checkpoint: Checkpoint, jobs: tuple[ShardJob, ...]) -> bytes | None:
    if checkpoint.index is None:
        return None
    same = not checkpoint.is_pickle and all(job.header is checkpoint.headers[job.target] for job in jobs)
    if same:
        return read_bytes(checkpoint.folder / SAFETENSORS_INDEX)
    renamed = {job.source.name: job.target for job in jobs}
    total = sum(job.header.data_bytes for job in jobs)
    metadata = checkpoint.index.get("metadata")
    index = {
        **checkpoint.index,
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": {name: renamed[file] for name, file in checkpoint.index["weight_map"].items()},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def config_with_dtype(checkpoint: Checkpoint, dtype: str) -> bytes:
    """config.json with its dtype set where the residuals' differs: transformers casts the whole model to that one."""
    if dtype == "auto" or _config_dtypes(checkpoint.config) == {dtype}:
        return checkpoint.config_bytes
    config = deepcopy(checkpoint.config)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        part |= dict.fromkeys(_DTYPE_KEYS & part.keys(), dtype)
    if not _DTYPE_KEYS & config.keys():
        config["dtype"] = dtype
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _config_dtypes(config: Mapping[str, Any]) -> set[str]:
    return {str(config[key]).removeprefix("torch.") for key in _DTYPE_KEYS if config.get(key)}


def _notices(checkpoint: Checkpoint, weights: tuple[WeightPlan, ...], options: InitOptions) -> list[str]:
    notices = []
    if (checkpoint.folder / SAFETENSORS_INDEX).is_file() and checkpoint.index is None:
        notices.append(
            f"the source has both {SAFETENSORS_SINGLE} and an index; as transformers does, the index is ignored"
        )
    stored = {torch_name(w.dtype) for w in weights}
    for dtype in _config_dtypes(checkpoint.config) if options.dtype == "auto" else ():
        if stored != {dtype}:
            notices.append(
                f"residuals are stored as {' and '.join(sorted(stored))}, but config.json says {dtype} and transformers"
                f" will cast them on load; `--dtype {sorted(stored)[0]}` makes config.json agree"
            )
    return notices


def _require_rank(weights: list[Adaptable], rank: int) -> None:
    smallest = min(weights, key=lambda weight: min(weight.shape))
    limit = min(smallest.shape)
    if rank > limit:
        raise PlanError(
            f"rank {rank} is above the {limit} that {smallest.module} allows: its shape is {list(smallest.shape)}",
            hint=f"--rank {limit}, or --exclude {smallest.module.rpartition('.')[2]}",
        )


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: what `--dry-run --json` prints."""
    return {
        "status": "planned",
        "model": plan.options.model,
        "out": plan.options.out,
        "architecture": plan.naming.architecture,
        "fingerprint": plan.fingerprint,
        "mode": plan.options.mode,
        "rank": plan.options.rank,
        "source_bytes": plan.source_bytes,
        "base_bytes": plan.base_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "solve_flops": plan.solve_flops,
        "adapter_config": plan.adapter_config,
        "notices": list(plan.notices),
        "files": [*plan.files, MANIFEST],
        "shards": [
            {
                "source": job.source.name,
                "target": job.target,
                "bytes": job.header.file_bytes,
                "weights": len(job.weights),
            }
            for job in plan.jobs
        ],
        "weights": [{**asdict(w.weight), "source_dtype": w.source_dtype, "dtype": w.dtype} for w in plan.weights],
    }
