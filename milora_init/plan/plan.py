"""Make the plan of a run from the options, the headers and the module names: every file and every weight to split.

Planning writes nothing and reads no weights, so a request that cannot work fails before the expensive part.
`--dry-run` prints a plan; `run.initialize` carries it out. Each shard is one ShardJob. A ShardJob contains only names
and numbers, so it can be pickled and sent to another process.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from milora_init import __version__
from milora_init.checkpoint.files import stamp
from milora_init.checkpoint.folder import SAFETENSORS_INDEX, Checkpoint, RemoteFiles, open_model
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import SAFETENSORS_DTYPES, Header
from milora_init.checkpoint.quantised_tensors import RULES_VERSION
from milora_init.envelope import envelope
from milora_init.errors import CheckpointError, PlanError
from milora_init.linalg.cost import solve_flops, solve_memory_bytes
from milora_init.lora.folder import LORA_CONFIG, LORA_FOLDER, adapter_files
from milora_init.lora.tensor_layout import adapter_header
from milora_init.manifest import MANIFEST, MOST_MANIFEST_BYTES, WORK_FOLDER, fingerprint
from milora_init.methods import METHODS
from milora_init.model.adaptable import ModelStructure, read_structure
from milora_init.options import InitOptions, local_path
from milora_init.plan.finished import copied_side_files, option_inputs
from milora_init.plan.notices import plan_notices
from milora_init.plan.output_files import ShardJob, config_with_dtype, plain_config, plan_index, plan_shard
from milora_init.plan.quantised_base import base_sizes, mixed_config, plan_layout
from milora_init.plan.weights import WeightPlan, plan_weights, quantised_tensors
from milora_init.untrusted import printable, read_text

FLOPS_PER_BYTE = 200  # so many multiply-adds take about the time of copying one byte
LOW_DISK_FILES = 2  # with low_disk, the most shards that are made at a time
_LOW_DISK_SHARDS = LOW_DISK_FILES + 2  # and that are on the disk, of the model or of the output
PROCESS_BYTES = 450 << 20  # memory of Python with torch and transformers loaded
_WEIGHT_BYTES = 9 << 10  # and for each weight its plan and its record: scripts/bench_scale.py


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do.

    Attributes:
        options: The request.
        checkpoint: The model, with its headers read.
        structure: The model's modules, and which of them can be adapted.
        jobs: One job for each shard; if no base is written, only for shards with a weight to split.
        weights: Every weight to split, in the model's order.
        adapter_config: Content of adapter_config.json.
        index: Content of the output's index; None if the base is a single file.
        config_bytes: Content of the output's config.json, if a base is written.
        merged_config_bytes: Content of config.json of a model that is merged from the output.
        side_files: Files that are copied unchanged, by the path relative to the model's folder.
        notices: What the user should know before the run.
        base_sizes: Of a quantised model, the size of the shards for each `--base` that is possible; else empty.
    """

    options: InitOptions
    checkpoint: Checkpoint
    structure: ModelStructure
    jobs: tuple[ShardJob, ...]
    weights: tuple[WeightPlan, ...]
    adapter_config: Mapping[str, Any]
    index: bytes | None
    config_bytes: bytes
    merged_config_bytes: bytes
    side_files: tuple[str, ...]
    notices: tuple[str, ...]
    base_sizes: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def own_jobs(self) -> tuple[ShardJob, ...]:
        """The jobs of this run: all of them, or those of the part that the options name.

        The costliest job goes to the part with the least work so far, then the next one. So parts of equal machines end
        at about the same time, and every process finds the same parts.
        """
        if self.options.part_numbers is None:
            return self.jobs
        number, count = self.options.part_numbers
        parts: list[tuple[int, int]] = [(0, index) for index in range(count)]  # work so far, part
        own = []
        for _, position in sorted((-self.cost(job), position) for position, job in enumerate(self.jobs)):
            work, index = heappop(parts)
            heappush(parts, (work + self.cost(self.jobs[position]), index))
            if index == number - 1:
                own.append(self.jobs[position])
        return tuple(own)

    def cost(self, job: ShardJob) -> int:
        """Estimate of the time for a job, in multiply-adds."""
        return FLOPS_PER_BYTE * self.read_bytes(job) + sum(map(self.flops, job.splits))

    @cached_property
    def adapter_header(self) -> Header:
        """Header of the adapter's weight file."""
        return adapter_header((w.key, w.rank, w.weight) for w in self.weights)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Every file of the output except the manifest, by the path relative to the output."""
        if not self.writes_base:
            return self.adapter_files
        index = () if self.index is None else (SAFETENSORS_INDEX,)
        shards = (job.target for job in self.jobs)
        return (*shards, *index, "config.json", *self.side_files, *self.adapter_files)

    @property
    def writes_base(self) -> bool:
        """Whether a residual base is written, and not an adapter of the original model alone."""
        return self.options.effective_method.writes_base

    @property
    def nodes_may_upload(self) -> bool:
        """Whether the nodes of a Ray cluster can fetch, make and upload the shards: model and output are on the Hub.

        A node then need not see the output folder.
        """
        on_hub = self.checkpoint.remote is not None and self.options.push_to_hub is not None
        return self.options.ray is not None and on_hub and self.writes_base

    @property
    def adapter_files(self) -> tuple[str, str]:
        """The adapter's config and weights, by the path relative to the output."""
        return adapter_files(self.options.effective_method)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that decides the bytes of the base and the adapter, as a JSON object.

        Two runs with equal inputs write the same bytes.
        """
        options = self.options
        return {
            "version": __version__,
            "source": dict(self.checkpoint.digest),
            "side_files": {name: sha256(self.source / name) for name in self.side_files},
            **option_inputs(options),
            "rank_pattern": self.adapter_config["rank_pattern"],
            "alpha_pattern": self.adapter_config["alpha_pattern"],
            "dropout": self.adapter_config["lora_dropout"],
            "task_type": self.adapter_config["task_type"],
            "modules": [w.weight.module for w in self.weights],
            **({"dequantisation": RULES_VERSION} if self.checkpoint.quantised.tensors else {}),
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `inputs`."""
        return fingerprint(self.inputs)

    @property
    def changes_config(self) -> bool:
        """Whether the output's config.json is not that of a merged model, because the options change the dtype."""
        return self.config_bytes != self.merged_config_bytes

    @property
    def source(self) -> Path:
        """The folder of the model."""
        return self.checkpoint.folder

    @property
    def out(self) -> Path:
        """The folder of the output."""
        return local_path(self.options.out)

    @property
    def overwrite(self) -> bool:
        """Whether an earlier output in the folder may be replaced."""
        return self.options.overwrite

    @property
    def required_disk_bytes(self) -> int:
        """The disk space that the run needs at its peak."""
        download = sorted(self.downloads.values())
        shards = sorted(job.base_bytes for job in self.own_jobs)
        low_disk, on_nodes = self.options.low_disk, self.options.ray is not None
        # Without low_disk, downloads go into the Hub's cache: `hub.download.require_cache_space` checks its disk. With
        # low_disk, a download is removed when its shard is finished, and a shard when it is uploaded.
        # Without a base, single tensors are downloaded into the work folder, and removed in the same way.
        # The nodes of a Ray cluster download to their own disks, and may upload the shards from there: `RayMakers`
        # checks these disks, and this one if it is to have the shards.
        download_bytes = sum(download[-_LOW_DISK_SHARDS:]) if not on_nodes and (low_disk or not self.writes_base) else 0
        base_bytes = sum(shards[-_LOW_DISK_SHARDS:] if low_disk and self.options.push_to_hub else shards)
        if self.nodes_may_upload:
            base_bytes = 0
        side_bytes = sum(stamp(self.source / name)[0] for name in self.side_files)
        if self.options.part is not None:
            return download_bytes + base_bytes + sum(map(self.factor_bytes, self.own_jobs))
        # The adapter counts twice: as one part for each shard, and as the final file that is assembled from the parts.
        return download_bytes + base_bytes + 2 * self.adapter_bytes + side_bytes

    @property
    def absent(self) -> Mapping[str, Header]:
        """Headers of the weight files that are on the Hub, not on the disk, and needed; by file name."""
        needed = {job.source.name for job in self.own_jobs}
        absent = self.checkpoint.remote.absent if self.checkpoint.remote else {}
        return {name: header for name, header in absent.items() if name in needed}

    @cached_property
    def downloads(self) -> Mapping[str, int]:
        """How many bytes are downloaded of each file of `absent`: all, or without a base its weights to adapt alone."""
        headers = self.checkpoint.headers
        return {
            job.source.name: (
                headers[job.source.name] if self.writes_base else job.source_part(headers[job.source.name])
            ).file_bytes
            for job in self.jobs
            if job.source.name in self.absent
        }

    @property
    def source_bytes(self) -> int:
        """Size of all tensors of the model."""
        return sum(header.data_bytes for header in self.checkpoint.headers.values())

    def read_bytes(self, job: ShardJob) -> int:
        """How many bytes of tensors a job reads: all of the file, or without a base those of its weights alone."""
        source = self.checkpoint.headers[job.source.name]
        if self.writes_base:
            return source.data_bytes
        return sum((job.quantised.get(name) or source.tensors[name]).size_bytes for name in job.weights)

    def factor_bytes(self, job: ShardJob) -> int:
        """Size of the factors of a job's weights, in float32."""
        return sum(4 * w.rank * sum(w.weight.shape) for w in job.splits)

    @property
    def base_bytes(self) -> int:
        """Size of all shards of the output."""
        return sum(job.base_bytes for job in self.jobs)

    @property
    def adapter_bytes(self) -> int:
        """Size of the adapter's weight file."""
        return self.adapter_header.file_bytes

    def peak_memory_bytes(self, weights_at_once: int, waiting: int = 0) -> int:
        """Estimate the peak memory of a run; how many files are made at a time does not matter.

        Args:
            weights_at_once: How many weights the CPU solves at a time.
            waiting: How many more are read or written meanwhile, or are solved on a GPU.
        """
        largest_factor = max(info.size_bytes for info in self.adapter_header.tensors.values())
        solved = sorted(map(self.memory_bytes, self.weights), reverse=True)[:weights_at_once]
        mode = self.options.effective_method.mode
        stored = ((1 if weights_at_once else w.most_at_once(mode)) * self.stored_bytes(w) for w in self.weights)
        read = sorted(stored, reverse=True)[:waiting]
        own = PROCESS_BYTES + _WEIGHT_BYTES * len(self.weights)
        return own + max(2 * largest_factor, sum(solved) + sum(read))

    @property
    def solve_flops(self) -> int:
        """Estimate of the multiply-adds for all weights."""
        return sum(map(self.flops, self.weights))

    def flops(self, w: WeightPlan) -> int:
        """Estimate the multiply-adds for one weight."""
        solves = 1 + self.options.nf4  # each round of the correction is another one
        return solves * solve_flops(
            max(w.weight.shape), min(w.weight.shape), w.rank, self.options.effective_method.mode
        )

    def memory_bytes(self, w: WeightPlan) -> int:
        """Estimate the memory for one weight on the CPU: as it is read and written, and for the solver."""
        m, n = w.weight.shape
        return solve_memory_bytes(
            max(m, n), min(m, n), w.rank, self.options.effective_method.mode, self.stored_bytes(w)
        )

    def stored_bytes(self, w: WeightPlan) -> int:
        """What one weight and its residual take as they are read and written."""
        quantised = w.weight.tensor in self.checkpoint.quantised.tensors
        read_as = "F32" if quantised else w.source_dtype
        entry_bytes = SAFETENSORS_DTYPES[read_as].itemsize + SAFETENSORS_DTYPES[w.dtype].itemsize
        if self.options.nf4:
            entry_bytes += 5 * 4  # the rest of W, the product, and NF4's steps, in float32
        return math.prod(w.weight.shape) * entry_bytes

    @property
    def formats(self) -> dict[str, int]:
        """Count the quantised tensors of the model by format."""
        return dict(Counter(tensor.rule.format for tensor in self.checkpoint.quantised.tensors.values()))

    def weight_counts(self) -> dict[tuple[str, tuple[int, int], str, int], int]:
        """Count the weights by (suffix, shape, source dtype, rank), in the model's order."""
        return dict(Counter((w.weight.suffix, w.weight.shape, w.source_dtype, w.rank) for w in self.weights))


def make_plan(
    options: InitOptions,
    folder: Path,
    remote: RemoteFiles | None = None,
    *,
    measured: Mapping[str, Collection[str]] = {},
) -> Plan:
    """Plan a run.

    Args:
        options: The request.
        folder: The folder of the model, or its snapshot in the cache of the Hub.
        remote: For a snapshot, the files that are on the Hub.
        measured: What `run.scan.measured_targets` chose for the targets of the options.

    Raises:
        CheckpointError: The model cannot be read, or its files contradict each other.
        PlanError: The options do not fit the model.
    """
    _refuse_our_own_output(folder, options.model)
    checkpoint = open_model(folder, remote)
    # Before read_structure: this checks the paths that transformers then opens.
    copied = copied_side_files(checkpoint)
    writes_base = options.effective_method.writes_base
    structure = read_structure(
        folder,
        checkpoint.config,
        {name: info.shape for name, info in checkpoint.tensors.items()},
        packed=quantised_tensors(checkpoint),
        missing_tensors=checkpoint.missing_tensors,
        trust_remote_code=options.trust_remote_code,
        text_only=options.text_only,
    )
    weights, adapter_config = plan_weights(options, checkpoint, structure, measured)
    by_tensor: dict[str, tuple[WeightPlan, ...]] = {}
    for w in weights:
        by_tensor[w.weight.tensor] = (*by_tensor.get(w.weight.tensor, ()), w)
    layout = plan_layout(checkpoint, options, weights)
    merged = mixed_config(checkpoint, layout, weights) if layout.mixed else plain_config(checkpoint)
    planned = (
        plan_shard(checkpoint, file, number, by_tensor, options, layout)
        for number, file in enumerate(checkpoint.headers)
    )
    jobs = tuple(job for job in planned if job is not None)
    plan = Plan(
        options=options,
        checkpoint=checkpoint,
        structure=structure,
        jobs=jobs,
        weights=weights,
        adapter_config=adapter_config,
        index=plan_index(checkpoint, jobs) if writes_base else None,
        config_bytes=config_with_dtype(checkpoint, merged, options.dtype),
        merged_config_bytes=config_with_dtype(checkpoint, merged, "auto"),
        side_files=tuple(copied) if writes_base else (),
        notices=tuple(plan_notices(options, checkpoint, structure, weights, adapter_config)),
        base_sizes=base_sizes(checkpoint, options, by_tensor) if writes_base else {},
    )
    name, count = Counter(plan.files).most_common(1)[0]
    if count > 1:
        raise PlanError(
            f"{folder}: two files of the output would be {name}",
            hint=f"rename or remove the file {name} in the model's folder",
        )
    return plan


def _refuse_our_own_output(folder: Path, given: str) -> None:
    """Raise CheckpointError if the folder is an output of this program, whose components are taken out already.

    It may be unfinished, or hold the files of some parts only. The hint names the original model if the manifest does.
    `given` is the folder or the Hub id as the user wrote it.
    """
    found = next((name for name in (MANIFEST, LORA_CONFIG) if os.path.lexists(folder / name)), None)
    if found is None:
        if (folder / WORK_FOLDER).is_dir():
            raise CheckpointError(
                f"{given} is an unfinished output of milora-init, not a model",
                hint="name the original model; to finish this output, run its command again, without --part",
            )
        return
    try:
        manifest = json.loads(read_text(folder / MANIFEST, most_bytes=MOST_MANIFEST_BYTES))
        original = manifest["source"]["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        manifest, original = {}, None
    hint = "name the original model that it was made from"
    if isinstance(original, str):
        hint += f": --model {printable(original[:200])}"
    elif found == LORA_CONFIG:
        hint += f"; if {LORA_FOLDER}/ is another adapter, move it away"
    inputs = manifest.get("inputs")
    method = METHODS.get(str(inputs.get("method"))) if isinstance(inputs, dict) else None
    if method and not method.writes_base:
        raise CheckpointError(f"{given} holds {found}: it is an adapter of milora-init, not a model", hint=hint)
    raise CheckpointError(
        f"{given} holds {found}: it is a residual base of milora-init, whose components are in its adapter", hint=hint
    )


def describe(plan: Plan, weights_at_once: int, estimate_s: float, waiting: int = 0) -> dict[str, Any]:
    """Return the plan as the JSON object that `--dry-run --json` prints.

    Args:
        plan: The plan.
        weights_at_once, waiting: For the estimate of the memory; see `Plan.peak_memory_bytes`.
        estimate_s: Estimate of the time for solving, in seconds.
    """
    options, remote = plan.options, plan.checkpoint.remote
    return envelope(
        "init",
        "planned",
        out=options.out,
        fingerprint=plan.fingerprint,
        source={"model": options.model, "revision": remote.commit if remote else None},
        warnings=plan.notices,
        architecture=plan.structure.architecture,
        method=options.effective_method.name,
        mode=options.effective_method.mode,
        rank=options.rank,
        alpha=options.lora_alpha,
        estimate_s=round(estimate_s, 1),
        source_bytes=plan.source_bytes,
        download_bytes=sum(plan.downloads.values()),
        base_bytes=plan.base_bytes,
        base_sizes=dict(plan.base_sizes),
        formats=plan.formats,
        adapter_bytes=plan.adapter_bytes,
        peak_memory_bytes=plan.peak_memory_bytes(weights_at_once, waiting),
        solve_flops=plan.solve_flops,
        adapter_config=dict(plan.adapter_config),
        weight_count=len(plan.weights),
        files=[*plan.files, MANIFEST],
        shards=[
            {
                "source": job.source.name,
                "target": job.target,
                "bytes": job.base_bytes,
                "weights": len(job.splits),
            }
            for job in plan.jobs
        ],
        weights=[
            {**asdict(w.weight), "rank": w.rank, "source_dtype": w.source_dtype, "dtype": w.dtype} for w in plan.weights
        ],
    )
