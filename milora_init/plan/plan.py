"""Make a Plan from options, headers and names: everything that a run will do.

Planning writes nothing and reads no weights. `--dry-run` prints a plan; `run.initialize` carries it out. Each shard is
one ShardJob, a value of names and numbers that can be sent to a thread, a device or another machine.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from milora_init import __version__
from milora_init.checkpoint.files import stamp
from milora_init.checkpoint.folder import (
    SAFETENSORS_INDEX,
    Checkpoint,
    RemoteFiles,
    open_model,
)
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import DTYPES, Header
from milora_init.checkpoint.side_files import side_files
from milora_init.errors import CheckpointError, PlanError
from milora_init.linalg.cost import solve_flops, solve_memory_bytes
from milora_init.lora.folder import LORA_CONFIG, LORA_FOLDER, LORA_WEIGHTS
from milora_init.lora.tensor_layout import adapter_header
from milora_init.manifest import MANIFEST, MOST_MANIFEST_BYTES, fingerprint
from milora_init.model.adaptable import ModelStructure, read_structure
from milora_init.options import InitOptions
from milora_init.plan.notices import plan_notices
from milora_init.plan.output_files import ShardJob, config_with_dtype, plan_index, plan_shard
from milora_init.plan.weights import WeightPlan, plan_weights, quantised
from milora_init.untrusted import printable, read_text

SHARDS_AT_ONCE = 4
_PROCESS_BYTES = 450 << 20  # Python with torch and transformers loaded


@dataclass(frozen=True)
class Plan:
    """The whole run.

    Attributes:
        options: What was asked for.
        checkpoint: The model, with its headers read.
        structure: Its modules, and which of them can be adapted.
        jobs: One for each shard.
        weights: Every weight to split, in the model's order.
        adapter_config: Content of the adapter's config.
        index: Content of the output's index file, None for a single file.
        config_bytes: The output's config.json.
        side_files: Files that are copied unchanged, as paths relative to the model.
        notices: What the user should know before the run.
    """

    options: InitOptions
    checkpoint: Checkpoint
    structure: ModelStructure
    jobs: tuple[ShardJob, ...]
    weights: tuple[WeightPlan, ...]
    adapter_config: Mapping[str, Any]
    index: bytes | None
    config_bytes: bytes
    side_files: tuple[str, ...]
    notices: tuple[str, ...]

    @cached_property
    def adapter_header(self) -> Header:
        return adapter_header((w.key, w.rank, w.weight) for w in self.weights)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Every file of the output except the manifest."""
        index = () if self.index is None else (SAFETENSORS_INDEX,)
        shards = (job.target for job in self.jobs)
        return (*shards, *index, "config.json", *self.side_files, LORA_CONFIG, LORA_WEIGHTS)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that decides the bytes of the base and the adapter, in a form that two runs can compare."""
        options = self.options
        return {
            "version": __version__,
            "source": dict(self.checkpoint.digest),
            "side_files": {name: sha256(self.source / name) for name in self.side_files},
            "rank": options.rank,
            "mode": options.mode,
            "alpha": options.lora_alpha,
            "rslora": options.rslora,
            "rank_pattern": self.adapter_config["rank_pattern"],
            "alpha_pattern": self.adapter_config["alpha_pattern"],
            "dropout": self.adapter_config["lora_dropout"],
            "task_type": self.adapter_config["task_type"],
            "text_only": options.text_only,
            "dtype": options.dtype,
            "seed": options.seed,
            "modules": [w.weight.module for w in self.weights],
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @property
    def changes_config(self) -> bool:
        """Whether the output's config.json differs from the model's, because another dtype was asked for."""
        return self.config_bytes != self.checkpoint.config_bytes

    @property
    def source(self) -> Path:
        return self.checkpoint.folder

    @property
    def out(self) -> Path:
        return Path(self.options.out).expanduser()

    @property
    def overwrite(self) -> bool:
        return self.options.overwrite

    @property
    def room_bytes(self) -> int:
        # The adapter counts twice: in parts beside the journal, and as the final file. With low_disk only the shards
        # that are open or being downloaded count.
        fetched = sorted(header.file_bytes for header in self.absent.values())
        made = sorted(job.header.file_bytes for job in self.jobs)
        low_disk = self.options.low_disk
        source = sum(fetched[-SHARDS_AT_ONCE:]) if low_disk else 0
        base = sum(made[-SHARDS_AT_ONCE:] if low_disk and self.options.push_to_hub else made)
        side = sum(stamp(self.source / name)[0] for name in self.side_files)
        return source + base + 2 * self.adapter_bytes + side

    @property
    def absent(self) -> Mapping[str, Header]:
        """Headers of the files of the source that are still on the Hub."""
        return self.checkpoint.remote.absent if self.checkpoint.remote else {}

    @property
    def source_bytes(self) -> int:
        return sum(header.data_bytes for header in self.checkpoint.headers.values())

    @property
    def base_bytes(self) -> int:
        return sum(job.header.file_bytes for job in self.jobs)

    @property
    def adapter_bytes(self) -> int:
        return self.adapter_header.file_bytes

    def peak_memory_bytes(self, at_once: int) -> int:
        """Estimate with so many weights in work at a time, the largest ones."""
        stacked = max(info.size_bytes for info in self.adapter_header.tensors.values())
        largest = sorted((self.memory_bytes(w) for w in self.weights), reverse=True)[:at_once]
        return _PROCESS_BYTES + max(2 * stacked, sum(largest))

    @property
    def solve_flops(self) -> int:
        """Estimate of the multiply-adds of all weights."""
        return sum(map(self.flops, self.weights))

    def flops(self, w: WeightPlan) -> int:
        """The same of one weight."""
        return solve_flops(max(w.weight.shape), min(w.weight.shape), w.rank, self.options.mode)

    def memory_bytes(self, w: WeightPlan) -> int:
        """Estimate of what one weight takes while it is in work on the CPU: as read and written, and to be solved."""
        m, n = w.weight.shape
        stored_bytes = m * n * (DTYPES[w.source_dtype].itemsize + DTYPES[w.dtype].itemsize)
        return solve_memory_bytes(max(m, n), min(m, n), w.rank, self.options.mode, stored_bytes)

    def kinds(self) -> dict[tuple[str, tuple[int, int], str, int], int]:
        """How many weights there are of each (suffix, shape, dtype, rank)."""
        return dict(Counter((w.weight.suffix, w.weight.shape, w.source_dtype, w.rank) for w in self.weights))


def make_plan(options: InitOptions, folder: Path, remote: RemoteFiles | None = None) -> Plan:
    """Plan a run over the checkpoint in `folder`, a snapshot of what is `remote` on the Hub.

    Raises:
        CheckpointError: The source cannot be trusted.
        PlanError: The request does not fit it.
    """
    _refuse_residual(folder)
    checkpoint = open_model(folder, remote)
    beside = side_files(folder)  # before transformers reads any of them
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    structure = read_structure(
        folder,
        checkpoint.config,
        shapes,
        packed=quantised(checkpoint),
        missing_tensors=checkpoint.unfilled,
        trust_remote_code=options.trust_remote_code,
        text_only=options.text_only,
    )
    weights, adapter_config = plan_weights(options, checkpoint, structure)
    by_tensor: dict[str, tuple[WeightPlan, ...]] = {}
    for w in weights:
        by_tensor[w.weight.tensor] = (*by_tensor.get(w.weight.tensor, ()), w)
    jobs = tuple(
        plan_shard(checkpoint, file, number, by_tensor, options) for number, file in enumerate(checkpoint.headers)
    )
    plan = Plan(
        options=options,
        checkpoint=checkpoint,
        structure=structure,
        jobs=jobs,
        weights=weights,
        adapter_config=adapter_config,
        index=plan_index(checkpoint, jobs),
        config_bytes=config_with_dtype(checkpoint, options.dtype),
        side_files=tuple(beside),
        notices=tuple(plan_notices(options, checkpoint, structure, weights, adapter_config)),
    )
    name, count = Counter(plan.files).most_common(1)[0]
    if count > 1:
        raise PlanError(f"{folder}: two files of the output would be {name}", hint="rename the source's, or remove it")
    return plan


def _refuse_residual(folder: Path) -> None:
    """Raise CheckpointError for an output of this program: its components are already taken out."""
    found = next((name for name in (MANIFEST, LORA_CONFIG) if os.path.lexists(folder / name)), None)
    if found is None:
        return
    try:
        manifest = json.loads(read_text(folder / MANIFEST, most_bytes=MOST_MANIFEST_BYTES))
        original = manifest["source"]["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        original = None
    hint = "name the original model that it was made from"
    if isinstance(original, str):
        hint += f": --model {printable(original[:200])}"
    elif found == LORA_CONFIG:
        hint += f"; if {LORA_FOLDER}/ is another adapter, move it away"
    raise CheckpointError(
        f"{folder} holds {found}: it is a residual base of milora-init, whose components are in its adapter", hint=hint
    )


def describe(plan: Plan, at_once: int) -> dict[str, Any]:
    """The plan as JSON: what `--dry-run --json` prints. `at_once` weights are in work at a time."""
    return {
        "status": "planned",
        "model": plan.options.model,
        "out": plan.options.out,
        "architecture": plan.structure.architecture,
        "fingerprint": plan.fingerprint,
        "mode": plan.options.mode,
        "rank": plan.options.rank,
        "revision": plan.checkpoint.remote.commit if plan.checkpoint.remote else None,
        "source_bytes": plan.source_bytes,
        "download_bytes": sum(header.file_bytes for header in plan.absent.values()),
        "base_bytes": plan.base_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes(at_once),
        "solve_flops": plan.solve_flops,
        "adapter_config": plan.adapter_config,
        "notices": list(plan.notices),
        "files": [*plan.files, MANIFEST],
        "shards": [
            {
                "source": job.source.name,
                "target": job.target,
                "bytes": job.header.file_bytes,
                "weights": len(job.splits),
            }
            for job in plan.jobs
        ],
        "weights": [
            {**asdict(w.weight), "rank": w.rank, "source_dtype": w.source_dtype, "dtype": w.dtype} for w in plan.weights
        ],
    }
