"""Merge an adapter into its residual base: one plain model, in the source's dtype, streamed like the main job.

    W' = round(residual + scale * B @ A)

The sum is rounded once, a block of rows at a time. With the adapter as milora-init wrote it that
is the source again, but for what the residual's own rounding left behind. Every other tensor is copied as bytes.

The output is a plain model; milora_merge.json says what it was made of. A run that was cut off is taken up by the same
command, a finished one left as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_init import __version__, adapter
from milora_init.audit import bit_equal
from milora_init.checkpoint import (
    SAFETENSORS_INDEX,
    Checkpoint,
    SafetensorsShard,
    TensorSource,
    open_checkpoint,
    read_bytes,
    stamp,
)
from milora_init.decompose import fetched_source
from milora_init.digest import sha256
from milora_init.errors import CheckpointError, OutputError, PlanError, SolveError, UsageError
from milora_init.factors import FactorReader, reading_factors, wanted_tensors
from milora_init.manifest import MANIFEST, Manifest, WeightRecord, require_manifest
from milora_init.options import InitOptions
from milora_init.output import OutputFolder
from milora_init.safetensors_format import DTYPE_NAMES, Header, plan_header
from milora_init.safetensors_writer import Place, SafetensorsWriter
from milora_init.split import add_once, round_once
from milora_init.trained import LoraFolder, open_lora, require_made_with, require_pair, require_trained_on

MERGED = "milora_merge.json"
_HANDS = 3  # two that sum, and one that waits for the disk
Tell = Callable[[str, int, int], None]
_BLOCK_ELEMENTS = 1 << 19  # of a block of rows, which fits a cache


@dataclass(frozen=True)
class MergePlan:
    """What is to be merged, and what comes out: an `output.Planned`.

    Attributes:
        base: The residual base, headers read.
        manifest: Of the base.
        lora: The adapter, header read.
        records: The weights it is merged into, by their name on disk.
        headers: Of each file of the output, by its name.
    """

    base: Checkpoint
    manifest: Manifest
    lora: LoraFolder
    records: Mapping[str, list[WeightRecord]]
    headers: Mapping[str, Header]
    overwrite: bool

    @property
    def source(self) -> Path:
        return self.base.folder

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        return {
            "merge": __version__,
            "source": self.manifest.fingerprint,
            "adapter": sha256(self.lora.weights),
            "scales": {module: factors.scale for module, factors in self.lora.modules.items()},
        }

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()

    @cached_property
    def side_files(self) -> Sequence[str]:
        """What of the base is neither weights nor ours: tokenizer, licence, code."""
        own = {*self.headers, SAFETENSORS_INDEX, "config.json", adapter.CONFIG, adapter.WEIGHTS}
        return [name for name in self.manifest.files if name not in own]

    @property
    def files(self) -> Sequence[str]:
        index = [] if self.base.index is None else [SAFETENSORS_INDEX]
        return [*self.headers, *index, *self.side_files, "config.json"]

    @property
    def room_bytes(self) -> int:
        return sum(header.file_bytes for header in self.headers.values())


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged: the content of milora_merge.json.

    Attributes:
        out, base, adapter: The folders.
        modules: How many modules were merged.
        fingerprint: Hash of `inputs`.
        inputs: What decides the bytes: the base's fingerprint, the adapter's hash and scales, the version.
        files: Size in bytes of every file of the output but this one.
        elapsed_s: Seconds; when it was resumed, of its last part.
        entries: Of the merged weights; `bit_equal`: how many of them the source has too, if that was asked.
    """

    out: str
    base: str
    adapter: str
    modules: int
    fingerprint: str
    inputs: Mapping[str, Any]
    files: Mapping[str, int]
    elapsed_s: float
    entries: int
    bit_equal: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_merged(folder: Path) -> Merged | None:
    """The record of a finished merge, None where there is none. Raises OutputError."""
    path = folder / MERGED
    try:
        return Merged(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"{path} is not a record that this version reads: {error}", hint="choose another --out"
        ) from error


def merge(
    base: str,
    out: str,
    *,
    trained: str | None = None,
    overwrite: bool = False,
    against: str | None = None,
    progress: Tell = lambda *_: None,
) -> Merged:
    """Write to `out` the model that the residual base `base` and an adapter compute together.

    Args:
        base: An output of milora-init.
        out: Folder to write.
        trained: The adapter; the one in `base` where it is None.
        overwrite: Replace an earlier merge in `out`.
        against: The source, a folder or a Hub id: count the entries that have its bits.
        progress: Told of each file that is made: its name, the bytes of all that are done, and of all.

    Returns:
        What was merged; of a finished merge of the same request, when it was made.

    Raises:
        CheckpointError: A base or an adapter that cannot be read.
        PlanError: An adapter that is not of this base, or holds more than factors.
        OutputError: The base is not finished; `out` holds something else, or cannot be written.
        SolveError: A merged weight that does not fit the source's dtype.
    """
    started = time.monotonic()
    if not out:
        raise UsageError("--out is empty", hint="name the folder to write")
    plan = plan_merge(Path(base).expanduser(), Path(trained).expanduser() if trained else None, overwrite=overwrite)
    source = _open_source(plan.manifest, against, out) if against else None
    folder = OutputFolder(Path(out).expanduser(), MERGED, read_merged)
    if plan.lora.path.resolve() in (folder.path.resolve(), *folder.path.resolve().parents):
        raise OutputError(f"--out {out} lies inside {plan.lora.path}", hint="write beside it: --out ./merged")
    if (folder.path / "adapter_config.json").exists():
        raise OutputError(f"{folder.path} holds an adapter, which would be loaded", hint="choose another --out")
    if (folder.path / MANIFEST).exists():
        raise OutputError(f"{folder.path} holds an output of milora-init", hint="choose another --out")
    if merged := folder.enter(plan):
        return _compared(merged, folder.path, source, plan.manifest)
    try:
        _merge_files(plan, folder, progress)
        for name in plan.side_files:
            folder.write(name, read_bytes(plan.source / name))
        if index := _index(plan):
            folder.write(SAFETENSORS_INDEX, index)
        folder.write("config.json", _config(plan))
    except BaseException:
        folder.abandon()
        raise
    merged = Merged(
        out=out,
        base=base,
        adapter=str(plan.lora.path),
        modules=len(plan.manifest.weights),
        fingerprint=plan.fingerprint,
        inputs=plan.inputs,
        files={name: (folder.path / name).stat().st_size for name in plan.files},
        elapsed_s=round(time.monotonic() - started, 3),
        entries=sum(math.prod(record.shape) for record in plan.manifest.weights),
    )
    folder.finish(merged)
    return _compared(merged, folder.path, source, plan.manifest)


def _open_source(manifest: Manifest, model: str, out: str) -> Checkpoint:
    source = open_checkpoint(fetched_source(manifest, InitOptions(model=model, out=out)))
    if not source.has_weights(manifest.inputs["source"]):
        raise CheckpointError(
            f"{model} is not what this base was made from: another model, or another commit",
            hint=f"name the model it was made from: --against {manifest.source['model']}",
        )
    return source


def _compared(merged: Merged, folder: Path, source: Checkpoint | None, manifest: Manifest) -> Merged:
    if source is None:
        return merged
    return replace(merged, bit_equal=bit_equal(open_checkpoint(folder), source, manifest))


def plan_merge(base: Path, trained: Path | None = None, *, overwrite: bool = False) -> MergePlan:
    """Read the headers of a base and an adapter, and see that they belong together. Raises as `merge`."""
    manifest = require_manifest(base)
    checkpoint = open_checkpoint(base)
    for name, size_bytes in manifest.files.items():
        whole = (base / name).is_file() and (base / name).stat().st_size == size_bytes
        if not whole and name not in (adapter.CONFIG, adapter.WEIGHTS):  # the adapter is read for itself, below
            raise CheckpointError(f"{base}: {name} was changed or removed", hint=f"milora-init verify {base}")
    initial = open_lora(base / adapter.FOLDER, manifest.weights)
    require_made_with(initial, manifest)
    lora = open_lora(trained, manifest.weights) if trained else initial
    if lora.path.resolve() != initial.path.resolve():
        require_pair(initial, lora)
        require_trained_on(lora, manifest, initial.weights)
    _require_fit(lora, manifest)
    records: dict[str, list[WeightRecord]] = {}
    for record in manifest.weights:
        records.setdefault(record.tensor, []).append(record)
    headers = {name: _header(header, records) for name, header in checkpoint.headers.items()}
    return MergePlan(checkpoint, manifest, lora, records, headers, overwrite)


def merged_weight(residual: Tensor, B: Tensor, A: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """residual (m, n) + scale * B (m, r) @ A (r, n), rounded once to dtype.

    For a 16-bit dtype the product is taken in float32, whose rounding is some 2^-16 of what is kept of it.

    Raises:
        ValueError: An entry that dtype does not hold, or none.
    """
    if dtype.itemsize > 2 or residual.dtype.itemsize > 4:
        merged = round_once(residual.double().addmm_(B.double(), scale * A.double()), dtype)
    else:
        merged = add_once(residual, B @ (scale * A), dtype)
    if not bool(torch.stack(merged.aminmax()).isfinite().all()):
        raise ValueError(f"it overflows {str(dtype).removeprefix('torch.')}, or the adapter is not finite")
    return merged


def _merge_files(plan: MergePlan, folder: OutputFolder[Merged], progress: Tell) -> None:
    """Make what the journal lacks of the weights, a few files at a time."""
    # Blocks of rows come and go. What is freed, glibc gives back to the system and takes again page by page, until it
    # has seen a block freed that is larger: measured on 2.2 GB, 1.3 million page faults and a quarter of the time.
    torch.empty(31 << 20, dtype=torch.uint8)  # mallopt(3), M_MMAP_THRESHOLD: up to 32 MiB are learnt
    done, stop = folder.done(), threading.Event()
    todo = [name for name in plan.headers if name not in done]
    made_bytes = sum(plan.headers[name].file_bytes for name in done)
    threads = max(1, torch.get_num_threads() // 2)  # of each hand's arithmetic
    with ThreadPoolExecutor(_HANDS, "merge", torch.set_num_threads, (threads,)) as pool:
        made = pool.map(lambda name: _merge_file(plan, name, folder.path / name, stop), todo)
        try:
            for name, size_bytes in zip(todo, made, strict=True):
                folder.record({"shard": name, "files": {name: size_bytes}, "records": []})
                made_bytes += size_bytes
                progress(name, made_bytes, plan.room_bytes)
        except BaseException:
            stop.set()  # whoever cleans up behind us must be alone
            pool.shutdown(cancel_futures=True)
            raise


def _merge_file(plan: MergePlan, name: str, target: Path, stop: threading.Event) -> int:
    source = plan.source / name
    shard = SafetensorsShard(source)
    try:
        before = stamp(source)
        if sha256(source) != plan.manifest.hashes.get(name):
            hint = f"milora-init verify {plan.source}"
            raise CheckpointError(f"{source} is not the file that milora-init wrote", hint=hint)
        with SafetensorsWriter(target, plan.headers[name]) as writer, reading_factors(plan.lora.weights) as factors:
            for tensor in shard.header.tensors:
                if stop.is_set():
                    raise OutputError(f"{target} was not finished: the run was stopped")
                if tensor not in plan.records:
                    writer.copy(tensor, shard.fileno, shard.offset(tensor), source)
                    continue
                place, residual = writer.place(tensor), shard.locate(tensor)
                for record in plan.records[tensor]:
                    row = record.row
                    if row is None:
                        _merge_weight(plan, residual, place, factors, record)
                    else:
                        _merge_weight(plan, residual.at(row), place.at(row), factors, record)
                writer.written(tensor)
            if stamp(source) != before:
                raise CheckpointError(f"{source} changed during the run", hint="run again when nobody writes to it")
            return writer.finish()
    finally:
        shard.close()


def _merge_weight(
    plan: MergePlan, source: TensorSource, place: Place, factors: FactorReader, record: WeightRecord
) -> None:
    """Merge one weight, a block of the rows that it is stored in at a time."""
    B, A = factors.read(record)
    left, right = (A.mT, B.mT) if record.transposed else (B, A)
    scale = plan.lora.modules[record.key].scale
    dtype: torch.dtype = getattr(torch, record.source_dtype)
    count = max(1, _BLOCK_ELEMENTS // source.shape[1])
    for top in range(0, source.shape[0], count):
        rows = top, min(top + count, source.shape[0])
        try:
            merged = merged_weight(source.rows(*rows).read(), left[slice(*rows)], right, scale, dtype)
        except ValueError as error:
            hint = "look at the training: an adapter with NaN or Inf cannot be merged"
            raise SolveError(f"{record.module} cannot be merged: {error}", hint=hint) from error
        with place.rows(*rows).opened() as write:
            write(merged)


def _require_fit(lora: LoraFolder, manifest: Manifest) -> None:
    wanted = wanted_tensors(manifest.weights)
    hint = "name the base that this adapter was trained on"
    if odd := wanted.keys() ^ lora.header.tensors.keys():
        raise PlanError(f"{lora.path} and {manifest.out} differ in {len(odd)} tensors, {min(odd)} first", hint=hint)
    for name, shape in wanted.items():
        if lora.header.tensors[name].shape != shape:
            what = f"{list(lora.header.tensors[name].shape)} in {lora.path}, {list(shape)} at this base"
            raise PlanError(f"{name} is {what}", hint=hint)
    if bool(lora.config.get("fan_in_fan_out")) != bool(manifest.adapter["fan_in_fan_out"]):
        raise PlanError(f"{lora.path}: fan_in_fan_out is not what the base was made with", hint=hint)


def _header(header: Header, records: Mapping[str, list[WeightRecord]]) -> Header:
    """The file's header with the source's dtypes; to the letter as it stands where they are the same."""
    dtypes = {
        name: DTYPE_NAMES[getattr(torch, records[name][0].source_dtype)] if name in records else info.dtype
        for name, info in header.tensors.items()
    }
    if all(dtypes[name] == info.dtype for name, info in header.tensors.items()):
        return header
    entries = ((name, dtypes[name], info.shape) for name, info in header.tensors.items())
    return plan_header(entries, metadata=header.metadata)


def _index(plan: MergePlan) -> bytes:
    if plan.base.index is None:
        return b""
    if all(plan.headers[name] is header for name, header in plan.base.headers.items()):
        return read_bytes(plan.source / SAFETENSORS_INDEX)
    total = sum(header.data_bytes for header in plan.headers.values())
    index = {**plan.base.index, "metadata": {**plan.base.index.get("metadata", {}), "total_size": total}}
    return (json.dumps(index, indent=2) + "\n").encode()


def _config(plan: MergePlan) -> bytes:
    """The source's config.json."""
    text = plan.manifest.source.get("config.json")
    return plan.base.config_bytes if text is None else str(text).encode()
