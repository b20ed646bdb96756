"""Merge an adapter into its residual base: one plain model in the original's dtype, streamed shard by shard.

    W' = round(residual + scale * B @ A)

An adapter of the original model is merged into that model, with W in place of the residual. With the initial adapter
this gives the original model again, except for the rounding of the residual. All other tensors are copied as bytes.
milora_merge.json records what was merged. An interrupted merge is resumed by the same command.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from milora_init import __version__
from milora_init.checkpoint.files import file_mode, read_bytes, read_chunks, source_file, stamp
from milora_init.checkpoint.folder import PICKLE_INDEX, SAFETENSORS_INDEX, Checkpoint, open_checkpoint, open_model
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import Header, plan_header, safetensors_name
from milora_init.checkpoint.side_files import side_files, travels
from milora_init.errors import CheckpointError, OutputError, PlanError, UsageError
from milora_init.export import merge_weight
from milora_init.export.merge_weight import MergeJob
from milora_init.hub.pair import locate_adapter, locate_pair
from milora_init.hub.source import fetch_original
from milora_init.lora.compatibility import require_initial_adapter, require_same_modules, require_trained_on
from milora_init.lora.folder import LoraAdapter, adapter_files, adapter_folder, expected_tensors, read_lora
from milora_init.manifest import MANIFEST, Manifest, WeightRecord, fingerprint, require_inside
from milora_init.model.adaptable import read_structure
from milora_init.options import InitOptions
from milora_init.plan.output_files import target_name
from milora_init.records import MERGED, ORIGINAL_MODEL, MergeResult, read_merged, require_pair
from milora_init.run.makers import LocalMakers
from milora_init.run.output_folder import OutputFolder, require_no_other_output, require_outside
from milora_init.run.pool import FilePool, SolverPool, weights_at_once
from milora_init.run.shard import ShardWriter
from milora_init.verification.files import check_weight_records
from milora_init.verification.tensors import count_bit_equal

_FETCH_AGAIN = "fetch the output again, from somebody you trust"
MergeProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergePlan:
    """What is to be merged, and what is written: a `run.output_folder.OutputPlan`.

    Attributes:
        base: The residual base, or the original model where the method writes no base; its headers read.
        manifest: Of the pair.
        adapter: The adapter, its header read.
        records: The weights that are merged, by the name of the tensor that holds them.
        headers: Of each shard of the output, by its name.
        sources: The file of the base for each shard of the output.
        side_files: The files of the base that are copied, each with its size: tokenizer, licence, code.
        config_bytes: Content of config.json.
        index: Content of the index; None for a model of one file.
        overwrite: Whether an earlier merge may be replaced.
    """

    base: Checkpoint
    manifest: Manifest
    adapter: LoraAdapter
    records: Mapping[str, list[WeightRecord]]
    headers: Mapping[str, Header]
    sources: Mapping[str, str]
    side_files: Mapping[str, int]
    config_bytes: bytes
    index: bytes | None
    overwrite: bool

    @property
    def source(self) -> Path:
        return self.base.folder

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        return {
            "merge": __version__,
            "source": self.manifest.fingerprint,
            "adapter": self.adapter.digest,
            "scales": {module: factors.scale for module, factors in self.adapter.modules.items()},
            **({} if self.manifest.method.writes_base else {"base": ORIGINAL_MODEL}),
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @property
    def files(self) -> Sequence[str]:
        index = [] if self.index is None else [SAFETENSORS_INDEX]
        return [*self.headers, *index, *self.side_files, "config.json"]

    @property
    def required_disk_bytes(self) -> int:
        return self.weights_bytes + sum(self.side_files.values())

    @property
    def weights_bytes(self) -> int:
        """Size of all shards of the output."""
        return sum(header.file_bytes for header in self.headers.values())


def merge(  # noqa: PLR0913  the options of the command
    pair: str,
    out: str,
    *,
    adapter: str | None = None,
    overwrite: bool = False,
    model: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    progress: MergeProgress = lambda *_: None,
) -> MergeResult:
    """Write to `out` one plain model that computes what a residual base and an adapter compute together.

    Args:
        pair: A folder that milora-init wrote, or its Hub id: the residual base and the initial adapter, or an adapter
            of the original model.
        out: Folder to write.
        adapter: The trained adapter, a folder or a Hub id; None for the initial one in `pair`.
        overwrite: Replace an earlier merge in `out`.
        model: The original model, a folder or a Hub id: count the merged entries that have its bits. For an adapter of
            the original model, where that model is; without it, as the manifest names it.
        revision: Of the original model. Without one, the recorded commit.
        cache_dir, token: Of the Hub.
        progress: Called for each shard that is finished: its name, the bytes of all finished shards, those of all.

    Returns:
        What was merged. If the same merge was finished before, its record.

    Raises:
        UsageError: A folder that is not there.
        HubError: The Hub refused, or cannot be reached.
        CheckpointError: A base or an adapter that cannot be read.
        PlanError: An adapter that does not belong to this base, or holds more than factors.
        OutputError: The base is not finished, or is no pair; `out` holds something else, or cannot be written.
        SolveError: A merged weight that does not fit the original's dtype.
    """
    started = time.monotonic()
    for option, value in (("PAIR", pair), ("--out", out), ("--adapter", "-" if adapter is None else adapter)):
        if not value:  # such as an unset variable of a shell: it must not select a default
            raise UsageError(f"{option} is empty", hint="name a folder")
    located = locate_pair(pair, cache_dir=cache_dir, token=token)
    trained = None if adapter is None else locate_adapter(adapter, cache_dir=cache_dir, token=token)
    manifest = require_pair(located, pair)
    original = None
    if model or not manifest.method.writes_base:
        name = model or str(manifest.source["model"])
        options = InitOptions(model=name, out=out, revision=revision, cache_dir=cache_dir, token=token)
        original = _open_original(manifest, options)
    plan = plan_merge(located, trained, overwrite=overwrite, given=pair, original=original)
    if not model:
        original = None
    folder = OutputFolder(Path(out).expanduser(), MERGED, read_merged)
    for path in (plan.adapter.path, plan.source):
        require_outside(folder.path, path, "./merged")
    require_no_other_output(folder.path, MERGED)
    if (folder.path / "adapter_config.json").exists():
        raise OutputError(f"{folder.path} holds an adapter, which would be loaded", hint="choose another --out")
    if finished := folder.prepare(plan):
        return _compared(replace(finished, unchanged=True), folder.path, original, plan.manifest)
    try:
        shard_hashes = _write_shards(plan, folder, progress)
        for name in plan.side_files:
            path = source_file(plan.source, name)
            folder.write(name, read_chunks(path), mode=file_mode(path))
        if plan.index is not None:
            index = PICKLE_INDEX if plan.base.is_pickle else SAFETENSORS_INDEX
            folder.write(SAFETENSORS_INDEX, plan.index, mode=file_mode(plan.source / index))
        folder.write("config.json", plan.config_bytes, mode=file_mode(plan.source / "config.json"))
    except BaseException:
        folder.abandon()
        raise
    source = plan.manifest.source
    merged = MergeResult(
        out=out,
        pair=pair,
        adapter=str(adapter_folder(Path(pair), plan.manifest.method)) if adapter is None else adapter,
        model=source["model"],
        revision=source["revision"],
        from_hub=source["revision"] is not None,
        initial=plan.adapter.digest == plan.manifest.hashes.get(adapter_files(plan.manifest.method)[1]),
        modules=len(plan.manifest.weights),
        entries=sum(math.prod(record.shape) for record in plan.manifest.weights),
        tensors={name: records[0].dtype for name, records in plan.records.items()},
        source_files=plan.manifest.inputs["source"],
        fingerprint=plan.fingerprint,
        inputs=plan.inputs,
        files={name: (folder.path / name).stat().st_size for name in plan.files},
        hashes={name: shard_hashes.get(name) or sha256(folder.path / name) for name in plan.files},
        elapsed_s=round(time.monotonic() - started, 3),
    )
    folder.finish(merged.content())
    return _compared(merged, folder.path, original, plan.manifest)


def _open_original(manifest: Manifest, options: InitOptions) -> Checkpoint:
    """The original model of a base. Raises CheckpointError for another model."""
    original = open_model(fetch_original(manifest, options))
    if not original.has_weights(manifest.inputs["source"]):
        raise CheckpointError(
            f"{options.model} is not what this output was made from: another model, or another commit",
            hint=f"name the model it was made from: --model {manifest.source['model']}",
        )
    return original


def _compared(merged: MergeResult, folder: Path, original: Checkpoint | None, manifest: Manifest) -> MergeResult:
    """The result with the number of bit-equal entries, if the original model is given."""
    if original is None:
        return merged
    return replace(merged, bit_equal=count_bit_equal(open_checkpoint(folder), original, manifest))


def plan_merge(
    pair: Path,
    adapter: Path | None = None,
    *,
    overwrite: bool = False,
    given: str | None = None,
    original: Checkpoint | None = None,
) -> MergePlan:
    """Read the headers of a base and an adapter, and check that they belong together. Raises as `merge`.

    Args:
        pair: The folder.
        adapter: The trained adapter; None for the initial one.
        overwrite: See `MergePlan`.
        given: The pair as the user wrote it.
        original: The original model, where the method writes no base.
    """
    manifest = require_pair(pair, given or str(pair))
    config_name, weights_name = adapter_files(manifest.method)
    require_inside(pair, (*manifest.files, config_name, weights_name))
    checkpoint = open_model(pair) if original is None or manifest.method.writes_base else original
    for name, size_bytes in manifest.files.items():
        if name in (config_name, weights_name):  # the adapter is checked below
            continue
        intact = (pair / name).is_file() and (pair / name).stat().st_size == size_bytes
        if intact and name not in checkpoint.headers:  # shards are hashed when they are read
            intact = sha256(pair / name) == manifest.hashes.get(name)
        if not intact:
            raise CheckpointError(f"{pair}: {name} was changed or removed", hint=f"milora-init verify {pair}")
    structure = None
    if any(record.transposed for record in manifest.weights):  # the shape of a square weight does not show it
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        with suppress(CheckpointError):  # an unknown class, or one with code of its own: then the shapes must do
            structure = read_structure(checkpoint.folder, checkpoint.config, shapes)
    for fault in check_weight_records(checkpoint, manifest, structure):
        raise CheckpointError(f"{pair / MANIFEST}: {fault.where} {fault.what}", hint=fault.hint)
    initial = read_lora(adapter_folder(pair, manifest.method), manifest.weights)
    require_initial_adapter(initial, manifest)
    lora = read_lora(adapter, manifest.weights) if adapter else initial
    if lora.path.resolve() != initial.path.resolve():
        require_same_modules(initial, lora, manifest)
        require_trained_on(lora, manifest, initial.weights)
    _require_fit(lora, manifest)
    records: dict[str, list[WeightRecord]] = {}
    for record in manifest.weights:
        records.setdefault(record.tensor, []).append(record)
    headers, sources = {}, {}
    for number, (file, header) in enumerate(checkpoint.headers.items()):
        target = target_name(checkpoint, file, number)
        headers[target], sources[target] = _merged_header(header, records), file
    return MergePlan(
        base=checkpoint,
        manifest=manifest,
        adapter=lora,
        records=records,
        headers=headers,
        sources=sources,
        side_files=_side_files(pair, manifest, checkpoint),
        config_bytes=_config(manifest, checkpoint),
        index=_index(checkpoint, headers, sources),
        overwrite=overwrite,
    )


def _side_files(pair: Path, manifest: Manifest, base: Checkpoint) -> dict[str, int]:
    """The files of the base that are copied, and their sizes. Raises CheckpointError."""
    if not manifest.method.writes_base:
        return {name: stamp(base.folder / name)[0] for name in side_files(base.folder)}
    written = {*base.headers, SAFETENSORS_INDEX, "config.json", *adapter_files(manifest.method)}
    names = [name for name in manifest.files if name not in written]
    if foreign := [name for name in names if not travels(Path(name).parts[0])]:
        raise CheckpointError(f"{pair / MANIFEST} names {foreign[0]}, which is no file of an output", hint=_FETCH_AGAIN)
    return {name: manifest.files[name] for name in names}


def _write_shards(plan: MergePlan, folder: OutputFolder[MergeResult], progress: MergeProgress) -> dict[str, str]:
    """Write every shard that the journal does not have. Returns the SHA-256 of all shards."""
    # glibc returns the memory of each freed block of rows to the system and asks for it again, until it has seen a
    # larger block freed. Without this line, 1.3 million page faults and a quarter of the time, measured on 2.2 GB.
    torch.empty(31 << 20, dtype=torch.uint8)  # mallopt(3), M_MMAP_THRESHOLD: glibc adapts to blocks up to 32 MiB

    cpus = [torch.device("cpu")] * weights_at_once([_needed_bytes(plan, name) for name in plan.records])
    with FilePool() as files, SolverPool(cpus, threads_per_device=1) as solvers:
        finished = folder.finished_shards(files)
        finished_bytes = sum(plan.headers[name].file_bytes for name in finished)
        hashes = {name: entry.hashes[name] for name, entry in finished.items()}

        def open_shard(name: str) -> ShardWriter[None]:
            source, header = plan.sources[name], plan.headers[name]
            stamp = plan.base.stamps[source]
            return ShardWriter(plan.source / source, stamp, attempt=folder.attempt(), name=name, header=header)

        def submit(name: str, shard: ShardWriter[None]) -> list[Future[None]]:
            """Give a shard's weights to the solver pool; hash its source meanwhile."""
            merged = [
                shard.submit(solvers, merge_weight.run, _merge_job(plan, tensor, shard))
                for tensor in _merged(plan, name)
            ]
            if plan.manifest.method.writes_base:  # the original model was compared when it was opened
                _require_source(plan, name, sha256(plan.source / name, cancelled=files.cancelled))
            return merged

        makers = LocalMakers(
            solvers, files, open_shard=open_shard, submit=submit, count=lambda name: len(_merged(plan, name))
        )
        with makers:
            for name, result in makers.run([name for name in plan.headers if name not in finished]):
                hashes[name] = folder.commit(result).hashes[name]
                finished_bytes += result.files[name]
                progress(name, finished_bytes, plan.weights_bytes)
    return hashes


def _merged(plan: MergePlan, name: str) -> list[str]:
    """The tensors of a shard that hold weights to merge."""
    return [tensor for tensor in plan.base.headers[plan.sources[name]].tensors if tensor in plan.records]


def _merge_job(plan: MergePlan, tensor: str, shard: ShardWriter[None]) -> MergeJob:
    weights = tuple((record, plan.adapter.modules[record.key].scale) for record in plan.records[tensor])
    return MergeJob(shard.locate(tensor), shard.target(tensor), weights, plan.adapter.weights)


def _require_source(plan: MergePlan, name: str, found: str) -> None:
    """Raise CheckpointError for a shard of the base whose SHA-256 is not the recorded one."""
    if found != plan.manifest.hashes.get(name):
        hint = f"milora-init verify {plan.source}"
        raise CheckpointError(f"{plan.source / name} is not the file that milora-init wrote", hint=hint)


def _needed_bytes(plan: MergePlan, tensor: str) -> int:
    """Memory for merging one tensor: the factors of its weights, and some blocks of rows."""
    factors = plan.adapter.modules[plan.records[tensor][0].key]
    tensors = plan.adapter.header.tensors
    return tensors[factors.A].size_bytes + tensors[factors.B].size_bytes + (16 << 20)


def _require_fit(adapter: LoraAdapter, manifest: Manifest) -> None:
    """Raise PlanError for an adapter whose tensors are not those of the base's weights."""
    expected = expected_tensors(manifest.weights)
    hint = "name the base that this adapter was trained on"
    if differing := expected.keys() ^ adapter.header.tensors.keys():
        raise PlanError(
            f"{adapter.path} and {manifest.out} differ in {len(differing)} tensors, {min(differing)} first", hint=hint
        )
    for name, shape in expected.items():
        if adapter.header.tensors[name].shape != shape:
            shapes = f"{list(adapter.header.tensors[name].shape)} in {adapter.path}, {list(shape)} at this base"
            raise PlanError(f"{name} is {shapes}", hint=hint)
    if bool(adapter.config.get("fan_in_fan_out")) != bool(manifest.adapter["fan_in_fan_out"]):
        raise PlanError(f"{adapter.path}: fan_in_fan_out is not what the base was made with", hint=hint)


def _merged_header(header: Header, records: Mapping[str, list[WeightRecord]]) -> Header:
    """The header with the original model's dtypes; the same bytes where the dtypes are the same."""
    dtypes = {
        name: safetensors_name(records[name][0].source_dtype) if name in records else info.dtype
        for name, info in header.tensors.items()
    }
    if all(dtypes[name] == info.dtype for name, info in header.tensors.items()):
        return header
    entries = ((name, dtypes[name], info.shape) for name, info in header.tensors.items())
    return plan_header(entries, metadata=header.metadata)


def _index(base: Checkpoint, headers: Mapping[str, Header], sources: Mapping[str, str]) -> bytes | None:
    """Content of the output's index; None for a model of one file."""
    if base.index is None:
        return None
    if not base.is_pickle and all(headers[name] is header for name, header in base.headers.items()):
        return read_bytes(base.folder / SAFETENSORS_INDEX)
    target_of = {file: target for target, file in sources.items()}
    total = sum(header.data_bytes for header in headers.values())
    weight_map = {
        name: target_of[file] for name, file in base.index["weight_map"].items() if name not in base.missing_tensors
    }
    metadata = {**base.index.get("metadata", {}), "total_size": total}
    index = {**base.index, "metadata": metadata, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


def _config(manifest: Manifest, base: Checkpoint) -> bytes:
    """The original model's config.json."""
    text = manifest.source.get("config.json")
    return base.config_bytes if text is None else str(text).encode()
