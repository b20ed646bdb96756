"""Merge an adapter into its residual base: one plain model in the original's dtype, streamed shard by shard.

    W' = round(residual + scale * B @ A)

With the initial adapter this gives the original model again, except for the rounding of the residual. All other
tensors are copied as bytes. milora_merge.json records what was merged. An interrupted merge is resumed by the same
command.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from milora_init import __version__
from milora_init.checkpoint.files import file_mode, read_bytes, read_chunks, source_file
from milora_init.checkpoint.folder import SAFETENSORS_INDEX, Checkpoint, open_checkpoint, open_model
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import DTYPE_NAMES, Header, plan_header
from milora_init.checkpoint.side_files import travels
from milora_init.errors import CheckpointError, OutputError, PlanError, UsageError
from milora_init.export.merge_shard import MergeShard
from milora_init.hub.source import fetch_original
from milora_init.lora.compatibility import require_initial_adapter, require_same_modules, require_trained_on
from milora_init.lora.folder import LORA_CONFIG, LORA_FOLDER, LORA_WEIGHTS, LoraAdapter, expected_tensors, read_lora
from milora_init.manifest import (
    MANIFEST,
    Manifest,
    WeightRecord,
    count,
    each,
    file_name,
    fingerprint,
    number,
    or_none,
    read_object,
    require_fields,
    require_inside,
    require_manifest,
    sha256_text,
    text,
)
from milora_init.model.adaptable import read_structure
from milora_init.options import InitOptions
from milora_init.run.devices import weights_at_once
from milora_init.run.output_folder import OutputFolder, require_outside
from milora_init.run.pool import SolverPool, one_ahead
from milora_init.verify.files import check_weight_records
from milora_init.verify.tensors import count_bit_equal

MERGED = "milora_merge.json"
_FETCH = "fetch the output again, from somebody you trust"
_HASHES = 2  # at a time
MergeProgress = Callable[[str, int, int], None]


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
    lora: LoraAdapter
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
            "adapter": self.lora.digest,
            "scales": {module: factors.scale for module, factors in self.lora.modules.items()},
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @cached_property
    def side_files(self) -> Sequence[str]:
        """What of the base is neither weights nor ours: tokenizer, licence, code."""
        own = {*self.headers, SAFETENSORS_INDEX, "config.json", LORA_CONFIG, LORA_WEIGHTS}
        return [name for name in self.manifest.files if name not in own]

    @property
    def files(self) -> Sequence[str]:
        index = [] if self.base.index is None else [SAFETENSORS_INDEX]
        return [*self.headers, *index, *self.side_files, "config.json"]

    @property
    def room_bytes(self) -> int:
        return self.weights_bytes + sum(self.manifest.files[name] for name in self.side_files)

    @property
    def weights_bytes(self) -> int:
        return sum(header.file_bytes for header in self.headers.values())


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was merged: the content of milora_merge.json.

    Attributes:
        out, base, adapter: The folders.
        modules: How many modules were merged.
        fingerprint: Hash of `inputs`.
        inputs: What decides the bytes: the base's fingerprint, the adapter's hash and scales, the version.
        files: Size in bytes of every file of the output but this one.
        elapsed_s: Seconds; when it was resumed, of its last part.
        entries: Of the merged weights; `bit_equal`: how many of them the source has too, if that was asked.
        unchanged: It was found finished.
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
    unchanged: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_RECORD = {
    "out": text, "base": text, "adapter": text, "modules": count, "fingerprint": sha256_text,
    "inputs": each(text, lambda _: True), "files": each(file_name, count), "elapsed_s": number, "entries": count,
    "bit_equal": or_none(count), "unchanged": lambda value: value is False,
}  # fmt: skip


def read_merged(folder: Path) -> MergeResult | None:
    """The record of a finished merge, None where there is none. Raises OutputError."""
    path = folder / MERGED
    try:
        content = read_object(path)
        if content is None:
            return None
        require_fields(content, _RECORD, "")
        return MergeResult(**content)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path} is not a record that this version reads: {str(error)[:300]}", hint="choose another --out"
        ) from error


def merge(
    base: str,
    out: str,
    *,
    trained: str | None = None,
    overwrite: bool = False,
    against: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    progress: MergeProgress = lambda *_: None,
) -> MergeResult:
    """Write to `out` the model that the residual base `base` and an adapter compute together.

    Args:
        base: An output of milora-init.
        out: Folder to write.
        trained: The adapter; the one in `base` where it is None.
        overwrite: Replace an earlier merge in `out`.
        against: The source, a folder or a Hub id: count the entries that have its bits.
        revision, cache_dir, token: Of a source on the Hub; the recorded commit if there is no revision.
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
    for what, given in (("OUT", base), ("--out", out), ("--adapter", "-" if trained is None else trained)):
        if not given:  # an unset variable of a shell, which must not stand for something else
            raise UsageError(f"{what} is empty", hint="name a folder")
    plan = plan_merge(Path(base).expanduser(), Path(trained).expanduser() if trained else None, overwrite=overwrite)
    source = None
    if against:
        asked = InitOptions(model=against, out=out, revision=revision, cache_dir=cache_dir, token=token)
        source = _open_source(plan.manifest, asked)
    folder = OutputFolder(Path(out).expanduser(), MERGED, read_merged)
    require_outside(folder.path, plan.lora.path, "./merged")
    if (folder.path / "adapter_config.json").exists():
        raise OutputError(f"{folder.path} holds an adapter, which would be loaded", hint="choose another --out")
    if (folder.path / MANIFEST).exists():
        raise OutputError(f"{folder.path} holds an output of milora-init", hint="choose another --out")
    if merged := folder.enter(plan):
        return _compared(replace(merged, unchanged=True), folder.path, source, plan.manifest)
    try:
        _merge_files(plan, folder, progress)
        for name in plan.side_files:
            path = source_file(plan.source, name)
            folder.write(name, read_chunks(path), mode=file_mode(path))
        if index := _index(plan):
            folder.write(SAFETENSORS_INDEX, index, mode=file_mode(plan.source / SAFETENSORS_INDEX))
        folder.write("config.json", _config(plan), mode=file_mode(plan.source / "config.json"))
    except BaseException:
        folder.abandon()
        raise
    merged = MergeResult(
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


def _open_source(manifest: Manifest, asked: InitOptions) -> Checkpoint:
    source = open_model(fetch_original(manifest, asked))
    if not source.has_weights(manifest.inputs["source"]):
        raise CheckpointError(
            f"{asked.model} is not what this base was made from: another model, or another commit",
            hint=f"name the model it was made from: --against {manifest.source['model']}",
        )
    return source


def _compared(merged: MergeResult, folder: Path, source: Checkpoint | None, manifest: Manifest) -> MergeResult:
    if source is None:
        return merged
    return replace(merged, bit_equal=count_bit_equal(open_checkpoint(folder), source, manifest))


def plan_merge(base: Path, trained: Path | None = None, *, overwrite: bool = False) -> MergePlan:
    """Read the headers of a base and an adapter, and see that they belong together. Raises as `merge`."""
    manifest = require_manifest(base)
    require_inside(base, (*manifest.files, LORA_CONFIG, LORA_WEIGHTS))
    checkpoint = open_checkpoint(base)
    for name, size_bytes in manifest.files.items():
        if name in (LORA_CONFIG, LORA_WEIGHTS):  # the adapter is read for itself, below
            continue
        whole = (base / name).is_file() and (base / name).stat().st_size == size_bytes
        if whole and name not in checkpoint.headers:  # files of weights are hashed when they are read
            whole = sha256(base / name) == manifest.hashes.get(name)
        if not whole:
            raise CheckpointError(f"{base}: {name} was changed or removed", hint=f"milora-init verify {base}")
    structure = None
    if any(record.transposed for record in manifest.weights):  # a square weight's shape does not tell it
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        with suppress(CheckpointError):  # a class that is not here, or is somebody's code: then the shapes alone tell
            structure = read_structure(base, checkpoint.config, shapes)
    for fault in check_weight_records(checkpoint, manifest, structure):
        raise CheckpointError(f"{base / MANIFEST}: {fault.where} {fault.what}", hint=fault.hint)
    initial = read_lora(base / LORA_FOLDER, manifest.weights)
    require_initial_adapter(initial, manifest)
    lora = read_lora(trained, manifest.weights) if trained else initial
    if lora.path.resolve() != initial.path.resolve():
        require_same_modules(initial, lora, manifest)
        require_trained_on(lora, manifest, initial.weights)
    _require_fit(lora, manifest)
    records: dict[str, list[WeightRecord]] = {}
    for record in manifest.weights:
        records.setdefault(record.tensor, []).append(record)
    headers = {name: _header(header, records) for name, header in checkpoint.headers.items()}
    plan = MergePlan(checkpoint, manifest, lora, records, headers, overwrite)
    if strange := [name for name in plan.side_files if not travels(Path(name).parts[0])]:
        raise CheckpointError(f"{base / MANIFEST} names {strange[0]}, which is no file of an output", hint=_FETCH)
    return plan


def _merge_files(plan: MergePlan, folder: OutputFolder[MergeResult], progress: MergeProgress) -> None:
    """Make what the journal lacks of the weights."""
    # Blocks of rows come and go. What is freed, glibc gives back to the system and takes again page by page, until it
    # has seen a block freed that is larger: measured on 2.2 GB, 1.3 million page faults and a quarter of the time.
    torch.empty(31 << 20, dtype=torch.uint8)  # mallopt(3), M_MMAP_THRESHOLD: up to 32 MiB are learnt
    done = folder.done()
    made_bytes = sum(plan.headers[name].file_bytes for name in done)

    cpu = [torch.device("cpu")] * weights_at_once([_need_bytes(plan, name) for name in plan.records])
    hashing = ThreadPoolExecutor(_HASHES, thread_name_prefix="hash")
    recording = ThreadPoolExecutor(1, thread_name_prefix="record")
    try:
        with SolverPool(cpu, threads_per_device=1) as pool, ExitStack() as stack:

            def begun() -> Iterator[MergeShard]:
                for name in (name for name in plan.headers if name not in done):
                    digest = plan.manifest.hashes.get(name)
                    shard = MergeShard(plan.source / name, folder.path / name, plan.headers[name],
                                       digest=digest, records=plan.records, lora=plan.lora)  # fmt: skip
                    stack.enter_context(shard)
                    shard.start(pool, hashing)
                    shard.copy_the_rest()
                    yield shard

            def made() -> Iterator[tuple[Future[Any], str, int]]:
                for shard in one_ahead(begun()):
                    size_bytes = shard.finish()
                    line = {"shard": shard.name, "files": {shard.name: size_bytes}, "records": []}
                    yield recording.submit(folder.record_shard, line), shard.name, size_bytes

            for recorded, name, size_bytes in one_ahead(made()):
                recorded.result()
                made_bytes += size_bytes
                progress(name, made_bytes, plan.weights_bytes)
    finally:
        hashing.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for the source's hash
        recording.shutdown()  # waits for what is made already: with its hash it need not be made again


def _need_bytes(plan: MergePlan, tensor: str) -> int:
    """What the work on a tensor holds: the factors of its weights, and some blocks of rows."""
    factors = plan.lora.modules[plan.records[tensor][0].key]
    keys = plan.lora.header.tensors
    return keys[factors.A].size_bytes + keys[factors.B].size_bytes + (16 << 20)


def _require_fit(lora: LoraAdapter, manifest: Manifest) -> None:
    wanted = expected_tensors(manifest.weights)
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
