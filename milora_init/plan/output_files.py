"""Plan the files of the output's base: shards, index and config.json.

Nothing is written here. A file that need not change keeps the bytes of its source: then a diff of model and base shows
only the weights that were split.
"""

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
from milora_init.methods import Factors, Mode
from milora_init.options import InitOptions
from milora_init.plan.weights import WeightPlan

_DTYPE_KEYS = {"dtype", "torch_dtype"}  # in config.json since transformers 4.56, and before


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One weight file of the model and the file of the base that is made from it.

    Attributes:
        source: Path of the model's file. A file that is still on the Hub has its future path here.
        stamp: Size and modification time of `source` when it was planned; None if it is still on the Hub.
        target: Name of the file in the output.
        header: Header of the output's file; None if no base is written.
        weights: The weights to split, by the name of the tensor that contains them.
        mode: Which singular triplets to take.
        factors: What to make of them.
    """

    source: Path
    stamp: Stamp | None
    target: str
    header: Header | None
    weights: Mapping[str, tuple[WeightPlan, ...]]
    mode: Mode
    factors: Factors

    @property
    def base_bytes(self) -> int:
        """Size of the output's file; 0 if no base is written."""
        return self.header.file_bytes if self.header else 0

    def source_part(self, source: Header) -> Header:
        """Header of a file with only the tensors that are split, for the header of the source."""
        infos = (source.tensors[name] for name in self.weights)
        return plan_header(((info.name, info.dtype, info.shape) for info in infos), metadata=source.metadata)

    @property
    def splits(self) -> list[WeightPlan]:
        """Every weight of the file that is split, from all tensors."""
        return [w for weights in self.weights.values() for w in weights]


def plan_shard(
    checkpoint: Checkpoint,
    file: str,
    number: int,
    by_tensor: Mapping[str, tuple[WeightPlan, ...]],
    options: InitOptions,
) -> ShardJob:
    """Plan the output file for one weight file.

    Args:
        checkpoint: The model.
        file: Name of the weight file.
        number: Position of the file in `checkpoint.headers`, from 0.
        by_tensor: All weights to split, by tensor name.
        options: The request.
    """
    source = checkpoint.headers[file]
    weights = {name: by_tensor[name] for name in source.tensors if name in by_tensor}
    header: Header | None = source if options.chosen.writes_base else None
    if header and any(first.dtype != first.source_dtype for first, *_ in weights.values()):
        entries = (
            (info.name, weights[info.name][0].dtype if info.name in weights else info.dtype, info.shape)
            for info in source.tensors.values()
        )
        header = plan_header(entries, metadata=source.metadata)
    return ShardJob(
        source=checkpoint.folder / file,
        stamp=checkpoint.stamps.get(file),
        target=target_name(checkpoint, file, number),
        header=header,
        weights=weights,
        mode=options.chosen.mode,
        factors=options.chosen.factors,
    )


def target_name(checkpoint: Checkpoint, file: str, number: int) -> str:
    """Name an output file: as its source, or as transformers names safetensors files if the source is a pickle."""
    if not checkpoint.is_pickle:
        return file
    if checkpoint.index is None:
        return SAFETENSORS_SINGLE
    return f"model-{number + 1:05d}-of-{len(checkpoint.headers):05d}.safetensors"


def plan_index(checkpoint: Checkpoint, jobs: tuple[ShardJob, ...]) -> bytes | None:
    """Return the content of the output's index; None if the model has a single weight file and no index.

    Raises:
        CheckpointError: The index of the model cannot be read.
    """
    if checkpoint.index is None:
        return None
    unchanged = (
        not checkpoint.is_pickle
        and not checkpoint.missing_tensors
        and all(job.header is checkpoint.headers[job.target] for job in jobs)
    )
    if unchanged:
        return read_bytes(checkpoint.folder / SAFETENSORS_INDEX)
    target_names = {job.source.name: job.target for job in jobs}
    missing = set(checkpoint.missing_tensors)
    metadata = checkpoint.index.get("metadata")
    index = {
        **checkpoint.index,
        "metadata": {
            **(metadata if isinstance(metadata, dict) else {}),
            "total_size": sum(job.header.data_bytes for job in jobs if job.header),
        },
        "weight_map": {
            name: target_names[file] for name, file in checkpoint.index["weight_map"].items() if name not in missing
        },
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def config_with_dtype(checkpoint: Checkpoint, dtype: str) -> bytes:
    """Return config.json with this dtype, or unchanged if the dtype is `auto` or already there.

    transformers casts the whole model to the dtype in config.json. Another dtype there would round the residuals again.
    """
    if dtype == "auto" or config_dtypes(checkpoint.config) == {dtype}:
        return checkpoint.config_bytes
    return (json.dumps(with_dtype(checkpoint.config, dtype), indent=2, ensure_ascii=False) + "\n").encode()


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the content of config.json with this dtype, in torch's name."""
    changed = deepcopy(dict(config))
    # Composite models have a config for each part, such as text_config, with a dtype of its own.
    sections = [changed, *(section for section in changed.values() if isinstance(section, dict))]
    for section in sections:
        section |= dict.fromkeys(_DTYPE_KEYS & section.keys(), dtype)
    if not _DTYPE_KEYS & changed.keys():
        changed["dtype"] = dtype
    return changed


def config_dtypes(config: Mapping[str, Any]) -> set[str]:
    """Return the dtypes that config.json names at its top level, in torch's names."""
    return {str(config[key]).removeprefix("torch.") for key in _DTYPE_KEYS if config.get(key)}
