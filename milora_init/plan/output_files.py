"""Plan the files of the output's base: shards, index and config.json.

Nothing is written here. A file that need not change keeps the bytes of its source: then a diff of model and base shows
only the weights that were split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_init.checkpoint.dequantise import locate_stored
from milora_init.checkpoint.files import Stamp, read_bytes
from milora_init.checkpoint.folder import SAFETENSORS_INDEX, SAFETENSORS_SINGLE, Checkpoint
from milora_init.checkpoint.header import Header, plan_header, torch_name
from milora_init.checkpoint.quantisation import CONFIG_KEYS, configured_dtype, without_quantisation
from milora_init.checkpoint.quantised_tensors import QuantisedTensor
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.methods import Factors, Mode
from milora_init.options import InitOptions
from milora_init.plan.quantised_base import BaseLayout
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
        quantised: The quantised tensors whose values are read, by name. Their codes are in this file.
        nf4_rounds: See `linalg.split.split`.
        elsewhere: Where their parts are that other files hold, by the part's name.
        companions: Those files that are on the disk, each with its stamp when it was planned.
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
    quantised: Mapping[str, QuantisedTensor] = field(default_factory=dict)
    elsewhere: Mapping[str, TensorSource] = field(default_factory=dict)
    companions: Mapping[Path, Stamp] = field(default_factory=dict)
    nf4_rounds: int = 0

    @property
    def base_bytes(self) -> int:
        """Size of the output's file; 0 if no base is written."""
        return self.header.file_bytes if self.header else 0

    @property
    def stamps(self) -> dict[Path, Stamp | None]:
        """Every file of the model that is read, with its stamp."""
        return {self.source: self.stamp, **self.companions}

    def source_part(self, source: Header) -> Header:
        """Header of a file with only the tensors that are split, or their parts, for the header of the source."""
        parts = {name: tensor.parts.values() for name, tensor in self.quantised.items()}
        read = [info.name for name in self.weights for info in parts.get(name, (source.tensors.get(name),)) if info]
        infos = (source.tensors[name] for name in dict.fromkeys(read) if name in source.tensors)
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
    layout: BaseLayout,
) -> ShardJob | None:
    """Plan the output file for one weight file; None if nothing of it is needed.

    Args:
        checkpoint: The model.
        file: Name of the weight file.
        number: Position of the file in `checkpoint.headers`, from 0.
        by_tensor: All weights to split, by tensor name.
        options: The request.
        layout: Which quantised tensors become dense.
    """
    source = checkpoint.headers[file]
    by_codes = {name: layout.by_codes[name] for name in source.tensors if name in layout.by_codes}
    names = [by_codes[name].name if name in by_codes else name for name in source.tensors]
    weights = {name: by_tensor[name] for name in names if name in by_tensor}
    read = {tensor.name: tensor for tensor in by_codes.values() if tensor.name in layout.dense | weights.keys()}
    header: Header | None = source if options.effective_method.writes_base else None
    changed = bool(read) or not layout.removed.isdisjoint(source.tensors)
    if header and (changed or any(first.dtype != first.source_dtype for first, *_ in weights.values())):
        header = plan_header(layout.entries(source, weights, options.dtype), metadata=source.metadata)
    if not weights and (header is None or (source.tensors and not header.tensors)):
        return None
    parts = {info.name for tensor in read.values() for info in tensor.parts.values()}
    elsewhere = {name: checkpoint.file_of[name] for name in sorted(parts) if checkpoint.file_of[name] != file}
    return ShardJob(
        source=checkpoint.folder / file,
        stamp=checkpoint.stamps.get(file),
        target=target_name(checkpoint, file, number),
        header=header,
        weights=weights,
        mode=options.effective_method.mode,
        factors=options.effective_method.factors,
        quantised=read,
        nf4_rounds=options.nf4,
        elsewhere={name: locate_stored(checkpoint, name) for name in elsewhere},
        companions={
            checkpoint.folder / name: checkpoint.stamps[name]
            for name in sorted(set(elsewhere.values()))
            if name in checkpoint.stamps
        },
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
        and not checkpoint.quantised.tensors
        and all(job.header is checkpoint.headers[job.target] for job in jobs)
    )
    if unchanged:
        return read_bytes(checkpoint.folder / SAFETENSORS_INDEX)
    target_of = {name: job.target for job in jobs if job.header for name in job.header.tensors}
    metadata = checkpoint.index.get("metadata")
    index = {
        **checkpoint.index,
        "metadata": {
            **(metadata if isinstance(metadata, dict) else {}),
            "total_size": sum(job.header.data_bytes for job in jobs if job.header),
        },
        "weight_map": {
            **{name: target_of[name] for name in checkpoint.index["weight_map"] if name in target_of},
            **(target_of if checkpoint.quantised.tensors else {}),
        },
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def config_with_dtype(checkpoint: Checkpoint, config: dict[str, Any], dtype: str) -> bytes:
    """Return a config with this dtype, or unchanged if the dtype is `auto` or already there.

    If it is that of the checkpoint, the bytes of its file are kept.

    transformers casts the whole model to the dtype in config.json. Another dtype there would round the residuals again.
    """
    if dtype == "auto" or config_dtypes(config) == {dtype}:
        return checkpoint.config_bytes if config == checkpoint.config else config_text(config)
    return config_text(with_dtype(config, dtype))


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the content of config.json with this dtype, in torch's name."""
    changed = deepcopy(dict(config))
    # Composite models have a config for each part, such as text_config, with a dtype of its own.
    # What says how weights are quantised has a dtype too, which is not that of the model.
    parts = (section for name, section in changed.items() if name not in CONFIG_KEYS)
    sections = [changed, *(section for section in parts if isinstance(section, dict))]
    for section in sections:
        section |= dict.fromkeys(_DTYPE_KEYS & section.keys(), dtype)
    if not _DTYPE_KEYS & changed.keys():
        changed["dtype"] = dtype
    return changed


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return config.json of the model with dense weights: without what it says of quantisation.

    The dtype of a quantised checkpoint is named in it, because the dtypes of its tensors do not show it.
    """
    if checkpoint.quantisation is None:
        return checkpoint.config
    config = without_quantisation(checkpoint.config)
    if configured_dtype(config) is None and checkpoint.quantised.tensors:
        config["dtype"] = torch_name(next(iter(checkpoint.quantised.tensors.values())).dtype)
    return config


def config_text(config: Mapping[str, Any]) -> bytes:
    """Return the content of a config.json."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def config_dtypes(config: Mapping[str, Any]) -> set[str]:
    """Return the dtypes that config.json names at its top level, in torch's names."""
    return {str(config[key]).removeprefix("torch.") for key in _DTYPE_KEYS if config.get(key)}
