"""Carry out a plan: split every planned weight, copy all other tensors, write the adapter, check everything.

For each shard, the solver pool splits its weights while this thread copies all other tensors as bytes. Then the shard
gets its final name and an entry in the journal. An interrupted run is resumed by the same command.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from milora_init import __version__
from milora_init.checkpoint.files import file_mode, read_chunks, source_file
from milora_init.checkpoint.folder import SAFETENSORS_INDEX
from milora_init.checkpoint.hashing import drop_from_page_cache, sha256
from milora_init.checkpoint.header import read_header
from milora_init.errors import OutputError
from milora_init.hub.source import _fetch, locate_model
from milora_init.lora.folder import LORA_CONFIG, LORA_FOLDER, LORA_WEIGHTS
from milora_init.manifest import MANIFEST, Manifest, WeightRecord, read_manifest
from milora_init.options import InitOptions
from milora_init.plan.output_files import ShardJob
from milora_init.plan.peft_check import require_loadable
from milora_init.plan.plan import Plan, make_plan
from milora_init.run.adapter_file import assemble_adapter
from milora_init.run.devices import memory_bytes, solver_devices
from milora_init.run.output_folder import OutputFolder
from milora_init.run.pool import SolverPool, one_ahead
from milora_init.run.prefetch import Prefetcher
from milora_init.run.progress import Progress, ShardResult, Silent
from milora_init.run.shard import OpenShard, adapter_part_name

if TYPE_CHECKING:
    from milora_init.hub.upload import Published


def initialize(options: InitOptions, *, progress: Progress | None = None) -> Manifest:
    """Do the main job: a residual base and its adapter in `options.out`, from `options.model`.

    With `options.push_to_hub` the output goes there too; with `options.low_disk` as well, there alone.

    Returns:
        The manifest, which also stands in the folder as milora_init.json. A finished output of the same request is
        left as it is and its manifest returned.

    Raises:
        MiloraError: See `errors`; what is left of the output is then unfinished, and resumable if any shard was done.
    """
    return carry_out(make_plan(options, *locate_model(options)), progress=progress)[0]


class ShardUploader(Protocol):
    """Where finished shards go while the others are made, for a disk that cannot hold them all."""

    def begin(self) -> None:
        """Shards are about to come, the first ones or further ones."""

    def holds(self, hashes: Mapping[str, str]) -> set[str]:
        """Which of these files, by SHA-256, are there."""

    def push_shard(self, path: Path, name: str) -> str:
        """Take a file of weights; returns its SHA-256. It may go from the disk then."""

    def push(self, folder: Path, manifest: Manifest, *, there: Collection[str]) -> object:
        """Take all the rest: the output is finished."""


def carry_out(
    plan: Plan, *, progress: Progress | None = None, replace: bool = False
) -> tuple[Manifest, Published | None]:
    """Carry out a plan and publish the output, if that was asked for; see `initialize`.

    The repository is seen to be one that may be written to before anything is computed; with `replace`, also where it
    holds something else.

    Returns:
        The manifest, and where the output went: None if it was not to be published, or needed not be.
    """
    options = plan.options
    if not options.push_to_hub:
        return run_plan(plan, progress=progress), None
    from milora_init.hub.upload import Repository

    repository = Repository(options.push_to_hub, private=options.private, token=options.token)
    repository.claim(overwrite=replace)
    if not options.low_disk:
        manifest = run_plan(plan, progress=progress)
        if progress:
            progress.pushing(options.push_to_hub)
        return manifest, repository.push(plan.out, manifest)
    if repository.manifest_fingerprint() == plan.fingerprint:
        return repository.manifest(), None
    manifest = run_plan(plan, progress=progress, sink=repository)
    return repository.shown(manifest), repository.published


def run_plan(plan: Plan, *, progress: Progress | None = None, sink: ShardUploader | None = None) -> Manifest:
    """Carry out a plan; see `initialize`. With a sink, the output ends there and nothing of it stays here."""
    progress = progress or Silent()
    started = time.monotonic()
    devices, threads_per_device = solver_devices(plan)
    out = OutputFolder(plan.out, MANIFEST, read_manifest)
    if finished := out.enter(plan):
        if sink:
            sink.push(out.path, finished, there=())
        return finished
    # A file is hashed from the page cache, and its line recorded, while the next one is made.
    hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")
    recorded = _recorder(plan, out)
    try:
        lines = out.done(sink.holds if sink else None)
        done = [job for job in plan.jobs if job.target in lines]
        todo = [job for job in plan.jobs if job.target not in lines]
        asked = require_loadable(plan)
        progress.begin(plan, done)
        for job in todo:
            if (out.path / job.target).is_file():
                progress.remaking(job.target)
        if sink:
            sink.begin()
        with _prefetcher(plan, todo, out, progress) as prefetcher:

            def made() -> Iterator[tuple[ShardJob, Future[dict[str, Any]]]]:
                results = _run_shards(
                    todo, prefetcher, SolverPool(devices, threads_per_device=threads_per_device), out, progress
                )
                for finished, (job, result) in enumerate(results, len(done) + 1):
                    yield job, hashing.submit(recorded, dataclasses.asdict(result))
                    progress.shard(result, finished, len(plan.jobs), time.monotonic() - started)

            for job, future in made() if sink else one_ahead(made()):
                line = lines[job.target] = future.result()
                prefetcher.done(job)
                if sink:
                    line["pushed"] = sink.push_shard(out.path / job.target, job.target)
                    out.record(line)
                    (out.path / job.target).unlink()
        manifest = _assemble(plan, out, lines, asked, started)
        if sink:
            sink.push(out.path, manifest, there=[name for name, line in lines.items() if "pushed" in line])
    except BaseException:
        try:
            hashing.shutdown()  # waits for what is made already: with its hash it need not be made again
        finally:
            out.abandon()
        raise
    hashing.shutdown()
    if sink:
        out.discard(plan.files)
    else:
        out.finish(manifest)
    return manifest


def _recorder(plan: Plan, out: OutputFolder[Manifest]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Function that hashes the files of a finished shard and writes its line into the journal; returns the line.

    Where source and output do not fit the page cache together, what was hashed leaves it: else it would push out what
    of the source is still to be read.
    """
    crowded = plan.source_bytes + plan.base_bytes > memory_bytes()

    def recorded(line: Mapping[str, Any]) -> dict[str, Any]:
        hashed = out.record_shard(line)
        if crowded:
            drop_from_page_cache(out.path / line["shard"])
        return hashed

    return recorded


def _prefetcher(plan: Plan, jobs: Sequence[ShardJob], out: OutputFolder[Manifest], progress: Progress) -> Prefetcher:
    """The source's files: those on the Hub fetched into its cache, or, to spare the disk, beside the journal."""
    options, remote = plan.options, plan.checkpoint.remote
    folder = out.work / "source" if options.low_disk else None
    if remote and remote.absent and not folder:
        from milora_init.hub.download import require_cache_space

        require_cache_space(remote, plan.source)

    def fetch(name: str) -> Path:
        progress.fetching(name, plan.checkpoint.headers[name].file_bytes)
        return _fetch(options, remote, name, folder)

    return Prefetcher(jobs, plan.checkpoint.headers, fetch, Path.unlink if folder else None)


def _run_shards(
    jobs: Sequence[ShardJob],
    prefetcher: Prefetcher,
    pool: SolverPool,
    out: OutputFolder[Manifest],
    progress: Progress,
) -> Iterator[tuple[ShardJob, ShardResult]]:
    """Turn files of the source into files of the output, two at a time.

    The crew has the weights of the next file before this one is waited for, so it never runs dry; this thread copies
    what is not adapted meanwhile.
    """
    with pool, ExitStack() as stack:

        def begun() -> Iterator[tuple[ShardJob, OpenShard]]:
            for job in jobs:
                opened = stack.enter_context(OpenShard(prefetcher.take(job), out.path, progress))
                opened.start(pool)
                opened.copy_the_rest()
                yield job, opened

        for job, opened in one_ahead(begun()):
            yield job, opened.finish()


def _assemble(
    plan: Plan,
    out: OutputFolder[Manifest],
    lines: dict[str, dict[str, Any]],
    asked: str,
    started: float,
) -> Manifest:
    """All shards stand: copy the side files, put the adapter together, then make the folder loadable."""
    source = plan.checkpoint.folder
    for name in plan.side_files:
        path = source_file(source, name)
        out.write(name, read_chunks(path), mode=file_mode(path))
    (out.path / LORA_FOLDER).mkdir(exist_ok=True)
    adapter_parts = [out.path / adapter_part_name(job) for job in plan.jobs if job.splits]
    assemble_adapter(adapter_parts, plan.weights, plan.adapter_header, out.path / LORA_WEIGHTS)
    out.write(LORA_CONFIG, (json.dumps(plan.adapter_config, indent=2) + "\n").encode())
    records = {record["module"]: record for line in lines.values() for record in line["records"]}
    pushed = {name: line["files"][name] for name, line in lines.items() if "pushed" in line}
    _account(plan, out, set(records), pushed)
    if plan.index is not None:
        out.write(SAFETENSORS_INDEX, plan.index, mode=file_mode(source / "config.json"))
    out.write("config.json", plan.config_bytes, mode=file_mode(source / "config.json"))
    hashes = {name: line["hashes"][name] for name, line in lines.items()}
    options = plan.options
    return Manifest(
        source={
            "model": options.model,
            "revision": plan.checkpoint.remote.commit if plan.checkpoint.remote else None,
            "architecture": plan.structure.architecture,
            **({"other_class": plan.structure.other_class} if plan.structure.other_class else {}),
            **({"config.json": plan.checkpoint.config_bytes.decode()} if plan.changes_config else {}),
            **({"trust_remote_code": True} if options.trust_remote_code else {}),
        },
        out=options.out,
        fingerprint=plan.fingerprint,
        inputs=plan.inputs,
        versions=_versions(),
        adapter=plan.adapter_config,
        checked_with=asked,
        files={name: pushed.get(name) or (out.path / name).stat().st_size for name in plan.files},
        notices=plan.notices,
        weights=tuple(WeightRecord.from_json(records[w.weight.module]) for w in plan.weights),
        hashes={name: hashes.get(name) or sha256(out.path / name) for name in plan.files},
        elapsed_s=round(time.monotonic() - started, 3),
    )


def _account(plan: Plan, out: OutputFolder[Manifest], done: set[str], pushed: Collection[str]) -> None:
    """Compare what stands on disk with what was planned, down to each tensor's dtype, shape and place."""
    planned = {w.weight.module for w in plan.weights}
    if done != planned:
        raise OutputError(f"{len(planned ^ done)} weights are unaccounted for, {min(planned ^ done)} first")
    for path, header in ((out.path / job.target, job.header) for job in plan.jobs if job.target not in pushed):
        if read_header(path).tensors != header.tensors:
            raise OutputError(f"{path} is not the file that was planned", hint="start again with --overwrite")
    if read_header(out.path / LORA_WEIGHTS).tensors != plan.adapter_header.tensors:
        raise OutputError(f"{LORA_WEIGHTS} is not the adapter that was planned", hint="start again with --overwrite")


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
