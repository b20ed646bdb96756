"""Plan each file of the output: shards, index and config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_init.checkpoint.files import Stamp, read_bytes
from milora_init.checkpoint.folder import SAFETENSORS_INDEX, SAFETENSORS_SINGLE, Checkpoint
from milora_init.checkpoint.header import Header, plan_header
from milora_init.modes import Mode
from milora_init.options import InitOptions
from milora_init.plan.weights import WeightPlan

_DTYPE_KEYS = {"dtype", "torch_dtype"}  # of config.json, today and before transformers 4.56


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One file of the source and the file it becomes.

    `stamp` is the source's when it was planned; None where it is on the Hub, and `source` then where it belongs.
    """

    source: Path
    stamp: Stamp | None
    target: str
    header: Header
    weights: Mapping[str, tuple[WeightPlan, ...]]
    mode: Mode

    @property
    def splits(self) -> list[WeightPlan]:
        """Every weight of the file that is split, whichever tensor it lies in."""
        return [w for weights in self.weights.values() for w in weights]


def plan_shard(
    checkpoint: Checkpoint,
    file: str,
    number: int,
    by_tensor: Mapping[str, tuple[WeightPlan, ...]],
    options: InitOptions,
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
    changed = [name for name, (first, *_) in weights.items() if first.dtype != first.source_dtype]
    header = source
    if changed:
        entries = (
            (i.name, weights[i.name][0].dtype if i.name in weights else i.dtype, i.shape)
            for i in source.tensors.values()
        )
        header = plan_header(entries, metadata=source.metadata)
    return ShardJob(
        source=checkpoint.folder / file,
        stamp=checkpoint.stamps.get(file),
        target=target,
        header=header,
        weights=weights,
        mode=options.mode,
    )


def plan_index(checkpoint: Checkpoint, jobs: tuple[ShardJob, ...]) -> bytes | None:
    if checkpoint.index is None:
        return None
    same = (
        not checkpoint.is_pickle
        and not checkpoint.unfilled
        and all(job.header is checkpoint.headers[job.target] for job in jobs)
    )
    if same:
        return read_bytes(checkpoint.folder / SAFETENSORS_INDEX)
    renamed = {job.source.name: job.target for job in jobs}
    unfilled = set(checkpoint.unfilled)
    total = sum(job.header.data_bytes for job in jobs)
    metadata = checkpoint.index.get("metadata")
    index = {
        **checkpoint.index,
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": {
            name: renamed[file] for name, file in checkpoint.index["weight_map"].items() if name not in unfilled
        },
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def config_with_dtype(checkpoint: Checkpoint, dtype: str) -> bytes:
    """config.json with its dtype set where the residuals' differs: transformers casts the whole model to that one."""
    if dtype == "auto" or config_dtypes(checkpoint.config) == {dtype}:
        return checkpoint.config_bytes
    config = deepcopy(checkpoint.config)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        part |= dict.fromkeys(_DTYPE_KEYS & part.keys(), dtype)
    if not _DTYPE_KEYS & config.keys():
        config["dtype"] = dtype
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def config_dtypes(config: Mapping[str, Any]) -> set[str]:
    return {str(config[key]).removeprefix("torch.") for key in _DTYPE_KEYS if config.get(key)}
