"""Carry out a plan: split every planned weight, copy all other tensors, write the adapter, check everything.

`LocalMakers` makes the shards, several at a time. This thread alone gives a finished shard its final name, and its
hashes an entry in the journal. An interrupted run is resumed by the same command.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from milora_init import __version__
from milora_init.checkpoint.files import file_mode, read_chunks, source_file
from milora_init.checkpoint.folder import PICKLE_INDEX, SAFETENSORS_INDEX
from milora_init.checkpoint.hashing import drop_from_page_cache, sha256
from milora_init.checkpoint.header import read_header
from milora_init.errors import OutputError
from milora_init.hub.ranges import RangesIgnoredError
from milora_init.hub.source import fetch_file, fetch_tensors
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest, WeightRecord, read_manifest
from milora_init.methods import recorded_method
from milora_init.plan.finished import request
from milora_init.plan.output_files import ShardJob
from milora_init.plan.peft_check import require_loadable
from milora_init.plan.plan import LOW_DISK_FILES, Plan
from milora_init.result import PartResult
from milora_init.run import shard_job
from milora_init.run.adapter_file import assemble_adapter, part_name
from milora_init.run.devices import memory_bytes, resolve_devices
from milora_init.run.journal import Entry
from milora_init.run.makers import LocalMakers, Makers
from milora_init.run.output_folder import FolderState, OutputFolder
from milora_init.run.parts import with_parts
from milora_init.run.pool import FilePool, SolverPool, solver_devices
from milora_init.run.prefetch import Prefetcher
from milora_init.run.progress import Progress, ShardResult

if TYPE_CHECKING:
    from milora_init.hub.upload import Published

Status = Literal["done", "unchanged"]


class ShardUploader(Protocol):
    """Uploads an output whose shards are not all on this disk; see `hub.upload.Repository`."""

    def mark_unfinished(self) -> None:
        """Mark the repository as unfinished, before the first `push_shard`; a resumed run does it again."""

    def pushed_shards(self, shards: Mapping[str, tuple[int, str]]) -> set[str]:
        """Of these files, with their size and SHA-256, the names of those that are uploaded already."""

    def push_shard(self, path: Path, name: str) -> None:
        """Upload a file of weights. It may be removed from the disk then."""

    def push(self, folder: Path, manifest: Manifest, *, pushed_before: Collection[str]) -> object:
        """Upload all other files: the output is finished."""


def look(plan: Plan) -> FolderState:
    """What `carry_out` would find in the output folder. Nothing is written. Raises OutputError where it would."""
    out = OutputFolder(plan.out, MANIFEST, read_manifest, plan.options.part_numbers)
    _require_same_output_kind(plan, out)
    return out.look(plan)


def carry_out(
    plan: Plan, *, progress: Progress | None = None, overwrite_repository: bool = False
) -> tuple[Manifest, Status, Published | None]:
    """Carry out a plan, and upload the output if the options ask for it; see `api.initialize`.

    The repository is checked before anything is computed: it must be writable, and empty or an earlier output of ours
    unless `overwrite_repository`.

    Returns:
        The manifest; whether the output was made now; what was uploaded, None if nothing was.
    """
    options = plan.options
    if not options.push_to_hub:
        return *run_plan(plan, progress=progress), None
    from milora_init.hub.upload import Repository

    repository = Repository(options.push_to_hub, private=options.private, token=options.token)
    repository.prepare(*_kind_and_model(plan), overwrite=overwrite_repository)
    uploader = repository if options.low_disk or plan.nodes_may_upload else None
    is_here = any((plan.out / name).exists() for name in (MANIFEST, WORK_FOLDER))  # the output, or what is left of it
    if uploader and not is_here and repository.manifest_fingerprint() == plan.fingerprint:
        return repository.manifest(), "unchanged", None
    manifest, status = run_plan(plan, progress=progress, uploader=uploader)
    if repository.published:
        return repository.published_manifest(manifest), status, repository.published
    if progress:
        progress.pushing(options.push_to_hub)
    return manifest, status, repository.push(plan.out, manifest)


def carry_out_part(plan: Plan, *, progress: Progress | None = None, overwrite_repository: bool = False) -> PartResult:
    """Make the files of the part that the options name; see `api.initialize_part`. Raises as `run_plan`."""
    options = plan.options
    assert options.part is not None
    unchanged = PartResult(options.out, "unchanged", options.part, plan.fingerprint, (), len(plan.jobs), len(plan.jobs))
    upload, pushed_shards = None, None
    if options.push_to_hub:
        from milora_init.hub.upload import Repository

        repository = Repository(options.push_to_hub, private=options.private, token=options.token)
        repository.prepare(*_kind_and_model(plan), overwrite=overwrite_repository)
        upload = repository.upload
        if options.low_disk:
            if repository.manifest_fingerprint() == plan.fingerprint:
                return unchanged
            upload, pushed_shards = repository.upload_alone, repository.pushed_shards
    progress = progress or Progress()
    started = time.monotonic() if progress.started is None else progress.started
    resolve_devices(options.device)  # a wrong one is refused before anything is written
    out = OutputFolder(plan.out, MANIFEST, read_manifest, options.part_numbers)
    _require_same_output_kind(plan, out)
    own = {job.target for job in plan.own_jobs}
    if out.prepare(plan):
        return unchanged
    try:
        with FilePool() as files:
            entries = out.finished_shards(files, pushed_shards, among=own)
            todo = [job for job in plan.own_jobs if job.target not in entries]
            require_loadable(plan)
            _report_plan_and_remade_shards(plan, todo, out, progress)
            todo = with_parts(todo, plan.checkpoint, out.attempts)
            with _makers(plan, todo, out, files, progress) as (makers, prefetcher):
                made = _Committer(plan, out, progress, upload, prefetcher, started).run(makers, todo)
        finished = len(out.entries())
    except BaseException:
        out.abandon()
        raise
    out.leave()
    return PartResult(options.out, "part", options.part, plan.fingerprint, tuple(made), finished, len(plan.jobs))


def run_plan(
    plan: Plan, *, progress: Progress | None = None, uploader: ShardUploader | None = None
) -> tuple[Manifest, Status]:
    """Carry out a plan.

    Args:
        plan: The plan.
        progress: Receives the events.
        uploader: With low_disk, shards are uploaded one by one and removed. Nodes of a Ray cluster may upload what they
            make. In both cases the whole output is uploaded then, and nothing of it is kept here.

    Returns:
        The manifest, and `unchanged` if the same request was finished before.

    Raises:
        MiloraError: See `errors`. The output is unfinished then; if a shard was finished, the same plan resumes it.
    """
    progress = progress or Progress()
    started = time.monotonic() if progress.started is None else progress.started
    if plan.options.ray is None:
        resolve_devices(plan.options.device)  # a wrong one is refused before anything is written
    out = OutputFolder(plan.out, MANIFEST, read_manifest)
    _require_same_output_kind(plan, out)
    if finished := out.prepare(plan):
        return finished, "unchanged"
    through = uploader if plan.options.low_disk else None  # every shard goes there, and none stays here
    try:
        with FilePool() as files:
            entries = out.finished_shards(files, uploader.pushed_shards if uploader else None)
            peft_version = require_loadable(plan)
            todo = [job for job in plan.jobs if job.target not in entries]
            _report_plan_and_remade_shards(plan, todo, out, progress)
            if plan.options.ray is None:  # its nodes fetch for themselves
                todo = with_parts(todo, plan.checkpoint, out.attempts)
            if through and todo:
                through.mark_unfinished()
            with _makers(plan, todo, out, files, progress) as (makers, prefetcher):
                upload = through.push_shard if through else None
                entries |= _Committer(plan, out, progress, upload, prefetcher, started).run(makers, todo)
        manifest = _assemble(plan, out, entries, peft_version, started)
        pushed = [name for name, entry in entries.items() if entry.pushed is not None]
        keeps_nothing = through is not None or bool(pushed)
        if uploader and keeps_nothing:
            uploader.push(out.path, manifest, pushed_before=pushed)
    except BaseException:
        out.abandon()
        raise
    if keeps_nothing:
        out.discard(plan.files)
    else:
        out.finish(manifest.to_json())
    return manifest, "done"


def _kind_and_model(plan: Plan) -> tuple[str, str]:
    """What `Repository.prepare` compares with the output in a repository."""
    from milora_init.hub.upload import kind_of

    model = plan.options.model
    return kind_of(MANIFEST, {"inputs": plan.inputs}), model if plan.checkpoint.remote else Path(model).name


def _require_same_output_kind(plan: Plan, out: OutputFolder[Manifest]) -> None:
    """With `--overwrite` a pair must not replace an adapter of an original model, nor an adapter a pair.

    Raises:
        OutputError: The folder holds one, finished or not, and `--overwrite` asks to replace it by the other.
    """
    if not plan.overwrite:
        return  # `OutputFolder.prepare` refuses every other request
    try:
        record, (head, _) = read_manifest(out.path), out.journal.read()
    except OutputError:
        return  # `OutputFolder.prepare` raises it, after the checks that come before it
    method = recorded_method(record.inputs if record else head.inputs if head else None)
    if method and method.writes_base != plan.writes_base:  # without a method: nothing, or of another command
        kind = "a residual base and its adapter" if method.writes_base else "an adapter of an original model"
        raise OutputError(
            f"{out.path} holds {kind}, of method {method.name}, which --overwrite does not replace by an output of "
            f"method {plan.options.effective_method.name}",
            hint="choose another --out, or remove the folder",
        )


def _report_plan_and_remade_shards(
    plan: Plan, todo: Sequence[ShardJob], out: OutputFolder[Manifest], progress: Progress
) -> None:
    planned = {job.target for job in todo}
    progress.begin(plan, [job for job in plan.own_jobs if job.target not in planned])
    for job in todo:
        if (out.path / job.target).is_file():
            progress.remaking(job.target)


@dataclass(frozen=True)
class _Committer:
    """Gives the shards that are made their final names, records and uploads them. Nobody else does."""

    plan: Plan
    out: OutputFolder[Manifest]
    progress: Progress
    upload: Callable[[Path, str], None] | None
    prefetcher: Prefetcher | None
    started: float

    def run(self, makers: Makers[ShardJob, WeightRecord], todo: Sequence[ShardJob]) -> dict[str, Entry]:
        """Let the shards of these jobs be made; return their entries of the journal by the shard's name."""
        entries: dict[str, Entry] = {}
        of = len(self.plan.own_jobs)
        finished_before = of - len(todo)
        for job, result in makers.run(todo):
            entries[job.target] = self._commit(job, result)
            finished = finished_before + len(entries)
            self.progress.shard(result, finished, of, time.monotonic() - self.started)
        return entries

    def _commit(self, job: ShardJob, result: ShardResult[WeightRecord]) -> Entry:
        """Name and record a shard; remove its source if it was downloaded for this run; upload it if asked.

        If model and output together do not fit into memory, the finished shard is removed from the page cache, so that
        it does not push out files of the model that are still to be read.
        """
        entry = self.out.commit(result)
        path = self.out.path / entry.shard
        if self.prefetcher:
            self.prefetcher.release(job)
        if not self.plan.writes_base or entry.pushed is not None:
            return entry
        if self.upload:
            self.upload(path, entry.shard)
            if self.plan.options.low_disk:
                return self.out.remove_pushed(entry)
        if self.plan.source_bytes + self.plan.base_bytes > memory_bytes():
            drop_from_page_cache(path)
        return entry


@contextmanager
def _makers(
    plan: Plan, todo: Sequence[ShardJob], out: OutputFolder[Manifest], files: FilePool, progress: Progress
) -> Iterator[tuple[Makers[ShardJob, WeightRecord], Prefetcher | None]]:
    """What makes the shards: the nodes of a Ray cluster, or the pools of this process with a prefetcher."""
    options = plan.options
    if options.ray is not None:
        from milora_init.run.ray_makers import RayMakers

        with RayMakers(options.ray, plan, todo, out.attempts, progress) as on_nodes:
            yield on_nodes, None
        return
    devices, threads_per_device = solver_devices(plan)

    with (
        SolverPool(devices, threads_per_device=threads_per_device, progress=progress) as solvers,
        _prefetcher(plan, todo, out, progress) as prefetcher,
        LocalMakers(
            solvers,
            files,
            open_shard=lambda job: shard_job.shard_writer(job, out.attempt()),
            submit=partial(shard_job.submit, solvers),
            count=partial(shard_job.count, on_gpus=solvers.on_gpus),
            fetch=prefetcher.take,
            most_files=LOW_DISK_FILES if options.low_disk or (plan.absent and not plan.writes_base) else None,
            progress=progress,
        ) as makers,
    ):
        yield makers, prefetcher


def _prefetcher(plan: Plan, jobs: Sequence[ShardJob], out: OutputFolder[Manifest], progress: Progress) -> Prefetcher:
    """Downloads what the jobs read of files that are still on the Hub.

    These are whole files, into the Hub's cache, or with low_disk into the work folder. Without a base they are the
    weights to adapt alone, into the work folder; where the server does not send parts, whole files into the cache.
    """
    options, remote, headers = plan.options, plan.checkpoint.remote, plan.checkpoint.headers
    folder = out.work / f"{out.attempts.name}.source"
    into = folder if options.low_disk else None
    whole_files = plan.writes_base
    if whole_files and into is None:
        _require_cache_space(plan)

    def fetch(job: ShardJob) -> Path:
        nonlocal whole_files
        name = job.source.name
        if not whole_files:
            progress.fetching(name, plan.downloads[name])
            try:
                return fetch_tensors(options, remote, name, job.source_part(headers[name]), folder)
            except RangesIgnoredError as error:
                whole_files = True
                progress.note(f"{error.message}: the files are downloaded as a whole, into the cache")
                _require_cache_space(plan)
        progress.fetching(name, headers[name].file_bytes)
        return fetch_file(options, remote, name, into)

    def remove(path: Path) -> None:
        if path.parent.resolve() == folder.resolve():
            path.unlink()

    allowed: dict[str, set[bytes]] = {}
    for job in (job for job in jobs if job.stamp is None):
        header = headers[job.source.name]
        allowed[job.source.name] = {header.raw} if plan.writes_base else {header.raw, job.source_part(header).raw}
    return Prefetcher(jobs, allowed, fetch, remove if options.low_disk or not plan.writes_base else None)


def _require_cache_space(plan: Plan) -> None:
    """Raise HubError where the disk of the Hub's cache has no space for the whole files that are still to come."""
    if plan.checkpoint.remote and plan.absent:
        from milora_init.hub.download import require_cache_space

        require_cache_space(dataclasses.replace(plan.checkpoint.remote, absent=plan.absent), plan.source)


def _assemble(
    plan: Plan, out: OutputFolder[Manifest], entries: Mapping[str, Entry], peft_version: str, started: float
) -> Manifest:
    """After the last shard: copy the side files, assemble the adapter, check all, and write index and config.json.

    Those two come last, because with them the folder can be loaded as a model.
    """
    source = plan.checkpoint.folder
    for name in plan.side_files:
        path = source_file(source, name)
        out.write(name, read_chunks(path), mode=file_mode(path))
    _write_adapter(plan, out)
    records = {record.module: record for entry in entries.values() for record in entry.records}
    uploaded = {name: entry.files[name] for name, entry in entries.items() if entry.pushed is not None}
    _require_complete(plan, out, set(records), uploaded)
    if plan.index is not None:
        index = source / (PICKLE_INDEX if plan.checkpoint.is_pickle else SAFETENSORS_INDEX)
        out.write(SAFETENSORS_INDEX, plan.index, mode=file_mode(index))
    if plan.writes_base:
        out.write("config.json", plan.config_bytes, mode=file_mode(source / "config.json"))
    # Without a base, the shards are no files of the output.
    shard_hashes = {name: entry.hashes[name] for name, entry in entries.items() if plan.writes_base}
    return Manifest(
        source=_source(plan),
        out=plan.options.out,
        fingerprint=plan.fingerprint,
        inputs=plan.inputs,
        versions=_versions(),
        adapter=plan.adapter_config,
        checked_with=peft_version,
        files={name: uploaded.get(name) or (out.path / name).stat().st_size for name in plan.files},
        notices=plan.notices,
        weights=tuple(records[w.weight.module] for w in plan.weights),
        hashes={name: shard_hashes.get(name) or sha256(out.path / name) for name in plan.files},
        elapsed_s=round(time.monotonic() - started, 3),
        request=request(plan.options),
    )


def _write_adapter(plan: Plan, out: OutputFolder[Manifest]) -> None:
    """Assemble the adapter from the parts of the shards, and write its config.

    It holds components of the weights: nobody may read it who may not read every file of them.
    """
    config_name, weights_name = plan.adapter_files
    (out.path / config_name).parent.mkdir(exist_ok=True)
    permissions = file_mode(plan.checkpoint.folder / "config.json")
    for job in plan.jobs:
        if job.stamp is not None:
            permissions &= file_mode(job.source)
    parts = [out.path / part_name(job.target) for job in plan.jobs if job.splits]
    assemble_adapter(parts, plan.weights, plan.adapter_header, out.path / weights_name, mode=permissions)
    out.write(config_name, (json.dumps(plan.adapter_config, indent=2) + "\n").encode(), mode=permissions)


def _source(plan: Plan) -> dict[str, Any]:
    """What the manifest says about the original model. Keys of rare cases are left out where they do not apply."""
    structure, remote = plan.structure, plan.checkpoint.remote
    return {
        "model": plan.options.model,
        "revision": remote.commit if remote else None,
        "architecture": structure.architecture,
        **({"other_class": structure.other_class} if structure.other_class else {}),
        **({"config.json": plan.merged_config_bytes.decode()} if plan.writes_base and plan.changes_config else {}),
        **({"trust_remote_code": True} if plan.options.trust_remote_code else {}),
    }


def _require_complete(plan: Plan, out: OutputFolder[Manifest], modules: set[str], uploaded: Collection[str]) -> None:
    """Compare the files on the disk with the plan: every weight, and each tensor's dtype, shape and offset.

    Raises:
        OutputError: Something is missing or differs.
    """
    planned = {w.weight.module for w in plan.weights}
    if modules != planned:
        differing = planned ^ modules
        raise OutputError(f"{len(differing)} weights are unaccounted for, {min(differing)} first")
    for path, header in ((out.path / job.target, job.header) for job in plan.jobs if job.target not in uploaded):
        if header and read_header(path).tensors != header.tensors:
            raise OutputError(f"{path} is not the file that was planned", hint="start again with --overwrite")
    weights_name = plan.adapter_files[1]
    if read_header(out.path / weights_name).tensors != plan.adapter_header.tensors:
        raise OutputError(f"{weights_name} is not the adapter that was planned", hint="start again with --overwrite")


def _versions() -> dict[str, str]:
    import safetensors
    import transformers

    return {
        "milora_init": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
