"""Merge an adapter into its residual base: one plain model in the original's dtype, streamed shard by shard.

    W' = round(residual + scale * B @ A)

An adapter of the original model is merged into that model, with W in place of the residual. With the initial adapter
this gives the original model again, except for the rounding of the residual. All other tensors are copied as bytes.
milora_merge.json records what was merged. An interrupted merge is resumed by the same command.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch

from milora_init.checkpoint.dequantise import QuantisedSource, locate
from milora_init.checkpoint.files import file_mode, read_chunks, source_file
from milora_init.checkpoint.folder import PICKLE_INDEX, SAFETENSORS_INDEX, Checkpoint, open_checkpoint, open_model
from milora_init.checkpoint.hashing import sha256
from milora_init.errors import CheckpointError, OutputError, UsageError
from milora_init.export import merge_weight
from milora_init.export.merge_plan import MergeOptions, MergePlan, plan_merge
from milora_init.export.merge_weight import MergedWeight, MergeJob
from milora_init.hub.pair import locate_adapter, locate_pair
from milora_init.hub.source import fetch_original, require_model_of_revision
from milora_init.lora.compatibility import UNTRAINED
from milora_init.lora.folder import adapter_files, adapter_folder
from milora_init.manifest import Manifest
from milora_init.options import OUTPUT_DTYPES, InitOptions, dtype_name, local_path
from milora_init.records import MERGED, MergeResult, read_merged, require_pair
from milora_init.run import dense
from milora_init.run.makers import LocalMakers
from milora_init.run.output_folder import OutputFolder, require_no_other_output, require_outside
from milora_init.run.pool import FilePool, SolverPool, weights_at_once
from milora_init.run.shard import ShardWriter
from milora_init.verification.tensors import count_bit_equal, require_original

_SHARD_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)B", re.IGNORECASE)
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
MergeProgress = Callable[[str, int, int], None]


def merge(  # noqa: PLR0913  the options of the command
    pair: str,
    out: str,
    *,
    adapter: str | None = None,
    dtype: str = "auto",
    shard_size: str | None = None,
    tokenizer: str | None = None,
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
        dtype: Of the merged model: `auto` for that of the original, `float32`, `bfloat16` or `float16`.
        shard_size: The most bytes of a file, such as `5GB`; None for the files of the base.
        tokenizer: The folder of the tokenizer to write. None is that of the base; if the vocabulary was resized, the
            one in the adapter's folder, if there is one.
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
        PlanError: An adapter that does not belong to this base, or holds something that this version does not know; a
            tokenizer that does not fit a resized vocabulary.
        OutputError: The base is not finished, or is no pair; `out` holds something else, or cannot be written.
        SolveError: A merged weight that does not fit the original's dtype.
    """
    started = time.monotonic()
    for option, value in (("PAIR", pair), ("--out", out), ("--adapter", adapter), ("--model", model)):
        if value == "":  # such as an unset variable of a shell: it must not select a default
            raise UsageError(f"{option} is empty", hint="name a folder")
    options = MergeOptions(_checked_dtype(dtype), _shard_bytes(shard_size), tokenizer, overwrite)
    located = locate_pair(pair, cache_dir=cache_dir, token=token)
    trained = None if adapter is None else locate_adapter(adapter, cache_dir=cache_dir, token=token)
    manifest = require_pair(located, pair)
    original = None
    if manifest.method.writes_base:
        require_model_of_revision(model, revision)
    if model is not None or not manifest.method.writes_base:
        name = model or str(manifest.source["model"])
        asked = InitOptions(model=name, out=out, revision=revision, cache_dir=cache_dir, token=token)
        original = _open_original(manifest, asked)
    plan = plan_merge(located, trained, options=options, given=pair, original=original)
    folder = OutputFolder(local_path(out), MERGED, read_merged)
    _require_own_folder(folder.path, plan)
    if finished := folder.prepare(plan):
        merged = replace(finished, out=out, unchanged=True)  # the folder may have been moved
    else:
        try:
            hashes = _write_files(plan, folder, progress)
        except BaseException:
            folder.abandon()
            raise
        if adapter is None:
            adapter = str(adapter_folder(Path(pair), manifest.method))
        seconds = round(time.monotonic() - started, 3)
        merged = _result(plan, folder.path, hashes, out=out, pair=pair, adapter=adapter, elapsed_s=seconds)
        folder.finish(merged.content())
    return _compared(merged, folder.path, original, manifest) if model and original else merged


def plan_of(
    pair: str, adapter: str, *, model: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> tuple[MergePlan, Path]:
    """The merge of a trained adapter, planned and not done, and the folder of the pair. Raises as `merge`."""
    located = locate_pair(pair, cache_dir=cache_dir, token=token)
    trained = locate_adapter(adapter, cache_dir=cache_dir, token=token)
    manifest = require_pair(located, pair)
    original = None
    if not manifest.method.writes_base:
        name = model or str(manifest.source["model"])
        asked = InitOptions(model=name, out=pair, cache_dir=cache_dir, token=token)
        original = _open_original(manifest, asked)
    return plan_merge(located, trained, given=pair, original=original), located


def _checked_dtype(dtype: str) -> str:
    """The dtype by torch's name. Raises UsageError for one that is not known."""
    dtype = dtype_name(dtype)
    if dtype not in OUTPUT_DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known", hint=f"choose one of {', '.join(OUTPUT_DTYPES)}")
    return dtype


def _shard_bytes(size: str | None) -> int | None:
    """A number of bytes from text such as `5GB`. Raises UsageError."""
    if size is None:
        return None
    match = _SHARD_SIZE.fullmatch(size.strip())
    found = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if found < 1:
        raise UsageError(f"--shard-size {size!r} is no size", hint="for example --shard-size 5GB")
    return found


def _open_original(manifest: Manifest, options: InitOptions) -> Checkpoint:
    """The original model of a base. Raises CheckpointError for another model."""
    original = open_model(fetch_original(manifest.source["model"], manifest.source["revision"], options))
    require_original(original, manifest, options.model)
    return original


def _require_own_folder(folder: Path, plan: MergePlan) -> None:
    """Raise OutputError for a folder to write that holds, or lies in, something else than an earlier merge."""
    for path in (plan.adapter.path, plan.source):
        require_outside(folder, path, "./merged")
    require_no_other_output(folder, MERGED)
    if (folder / "adapter_config.json").exists():
        raise OutputError(f"{folder} holds an adapter, which would be loaded", hint="choose another --out")


def _write_files(plan: MergePlan, folder: OutputFolder[MergeResult], progress: MergeProgress) -> dict[str, str]:
    """Write every file but the record. Returns the SHA-256 of each.

    Index and config.json come last, because with them the folder can be loaded as a model.
    """
    hashes = _write_shards(plan, folder, progress)
    for name, (source_folder, _) in plan.side_files.items():
        path = source_file(source_folder, name)
        folder.write(name, read_chunks(path), mode=file_mode(path))
    if plan.index is not None:
        index = PICKLE_INDEX if plan.base.is_pickle else SAFETENSORS_INDEX
        like = index if plan.base.index is not None else "config.json"
        folder.write(SAFETENSORS_INDEX, plan.index, mode=file_mode(plan.source / like))
    folder.write("config.json", plan.config_bytes, mode=file_mode(plan.source / "config.json"))
    return {name: hashes.get(name) or sha256(folder.path / name) for name in plan.files}


def _result(  # noqa: PLR0913  the fields of the record
    plan: MergePlan, folder: Path, hashes: Mapping[str, str], *, out: str, pair: str, adapter: str, elapsed_s: float
) -> MergeResult:
    """What was merged.

    Args:
        plan: The plan, carried out.
        folder: The folder that was written.
        hashes: SHA-256 of every file of the plan.
        out, pair, adapter: The folders as given.
        elapsed_s: Seconds.
    """
    manifest = plan.manifest
    is_initial = plan.adapter.digest == manifest.hashes.get(adapter_files(manifest.method)[1])
    return MergeResult(
        out=out,
        pair=pair,
        adapter=adapter,
        model=manifest.source["model"],
        revision=manifest.source["revision"],
        from_hub=manifest.source["revision"] is not None,
        initial=is_initial and not manifest.inputs.get("nf4"),  # a base of NF4's numbers does not give the original
        modules=len(manifest.weights),
        entries=sum(math.prod(record.shape) for record in manifest.weights),
        tensors={name: task.weights[0].dtype for name, task in plan.tasks.items() if task.weights},
        changed=plan.changed,
        retrained=tuple(plan.trained.tensors),
        notices=(*([f"{adapter} {UNTRAINED}"] if plan.untrained else []), *plan.notices),
        source_files=manifest.inputs["source"],
        fingerprint=plan.fingerprint,
        inputs=plan.inputs,
        files={name: (folder / name).stat().st_size for name in plan.files},
        hashes=hashes,
        elapsed_s=elapsed_s,
    )


def _compared(merged: MergeResult, folder: Path, original: Checkpoint, manifest: Manifest) -> MergeResult:
    """The result with the number of entries that have the bits of the original model."""
    return replace(merged, bit_equal=count_bit_equal(open_checkpoint(folder), original, manifest))


def _write_shards(plan: MergePlan, folder: OutputFolder[MergeResult], progress: MergeProgress) -> dict[str, str]:
    """Write every shard that the journal does not have. Returns the SHA-256 of all shards."""
    # Allocate and free one large block now. glibc then keeps the memory of freed blocks below 32 MiB (it raises
    # M_MMAP_THRESHOLD, see mallopt(3)). Otherwise each freed block of rows goes back to the system and is asked for
    # again: 1.3 million page faults and a quarter of the time, measured on 2.2 GB.
    torch.empty(31 << 20, dtype=torch.uint8)

    cpus = [torch.device("cpu")] * weights_at_once([_needed_bytes(plan, name) for name in plan.tasks])
    with FilePool() as files, SolverPool(cpus, threads_per_device=1) as solvers:
        finished = folder.finished_shards(files)
        finished_bytes = sum(plan.headers[name].file_bytes for name in finished)
        hashes = {name: entry.hashes[name] for name, entry in finished.items()}
        compared: dict[str, Future[None]] = {}  # of the base's files; one may be in several shards
        compared_lock = threading.Lock()

        def open_shard(name: str) -> ShardWriter[None]:
            return ShardWriter(
                plan.stamps(plan.sources[name]),
                attempt=folder.attempt(),
                name=name,
                header=plan.headers[name],
                companions=plan.stamps(plan.companions[name]),
            )

        def submit(name: str, shard: ShardWriter[None]) -> list[Future[None]]:
            """Give a shard's weights to the solver pool; hash its sources meanwhile."""
            merged = [_submit_tensor(plan, tensor, shard, solvers) for tensor in _merged(plan, name)]
            # The original model was compared with its recorded hashes when it was opened.
            for file in plan.sources[name] if plan.manifest.method.writes_base else ():
                with compared_lock:
                    is_first = file not in compared
                    comparison = compared.setdefault(file, Future())
                if is_first:
                    _compare(comparison, plan, file, files.cancelled)
                comparison.result()
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
    """The tensors of a shard that are made by a task."""
    return [tensor for tensor in plan.headers[name].tensors if tensor in plan.tasks]


def _compare(comparison: Future[None], plan: MergePlan, name: str, cancelled: threading.Event) -> None:
    """Compare a file of the base with its recorded SHA-256, and give the answer to all who wait for it."""
    try:
        _require_source(plan, name, sha256(plan.source / name, cancelled=cancelled))
        comparison.set_result(None)
    except BaseException as error:
        comparison.set_exception(error)


def _submit_tensor(plan: MergePlan, tensor: str, shard: ShardWriter[None], solvers: SolverPool) -> Future[None]:
    """Give a tensor of a shard to the solver pool."""
    task, modules = plan.tasks[tensor], plan.adapter.modules
    source = locate(plan.base, task.source) if task.source else None
    if isinstance(source, QuantisedSource) and not task.weights and not task.new:
        return shard.submit_other(solvers, dense.run, dense.DenseJob(source, shard.target(tensor)))
    weights = tuple(
        MergedWeight(record, modules[record.key].scale, modules[record.key].magnitude) for record in task.weights
    )
    job = MergeJob(source, shard.target(tensor), weights, task.new, plan.adapter.weights)
    return shard.submit_other(solvers, merge_weight.run, job)


def _require_source(plan: MergePlan, name: str, found: str) -> None:
    """Raise CheckpointError for a shard of the base whose SHA-256 is not the recorded one."""
    if found != plan.manifest.hashes.get(name):
        hint = f"milora-init verify {plan.given}"
        raise CheckpointError(f"{plan.source / name} is not the file that milora-init wrote", hint=hint)


def _needed_bytes(plan: MergePlan, tensor: str) -> int:
    """Memory for one tensor: a matrix that is dequantised, what is read of the adapter's file, some blocks of rows."""
    task = plan.tasks[tensor]
    names = [task.new.whole, task.new.rows] if task.new else []
    for record in task.weights[:1]:
        factors = plan.adapter.modules[record.key]
        names += [factors.A, factors.B]
    quantised = plan.base.quantised.tensors.get(task.source or "")
    dequantised_bytes = 4 * math.prod(quantised.matrix) if quantised else 0
    read_bytes = sum(plan.adapter.header.tensors[name].size_bytes for name in names if name)
    return dequantised_bytes + read_bytes + (16 << 20)
