"""Make one file of an output on a node of a Ray cluster; `ray_makers` starts what is in here.

A node makes a file with the code of a single machine. The source is one that all nodes see, or it is fetched from the
Hub. The file is made in the output folder, in the folder of its attempt; or, where model and output are on the Hub and
the node does not see that folder, in one of its own, and is uploaded from there. Then only the factors are sent back.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from milora_init import __version__
from milora_init.checkpoint.files import Stamp, stamp
from milora_init.checkpoint.folder import Checkpoint, RemoteFiles
from milora_init.checkpoint.header import Header
from milora_init.checkpoint.tensor_file import open_shard
from milora_init.errors import CheckpointError, OutputError, PlanError
from milora_init.hub.ranges import RangesIgnoredError
from milora_init.hub.source import connected, fetch_file, fetch_tensors, hide_bars, is_cached
from milora_init.manifest import WeightRecord
from milora_init.options import InitOptions
from milora_init.plan.output_files import ShardJob
from milora_init.run import shard_job
from milora_init.run.adapter_file import part_name
from milora_init.run.makers import LocalMakers
from milora_init.run.parts import with_parts
from milora_init.run.pool import FilePool, SolverPool
from milora_init.run.progress import ShardResult

PROBE = "probe"  # a file in the attempts' folder, by which a node shows that it sees the same folder
_LOCAL = "milora-init-"  # begins the names of a node's own folders
_LOCK = "lock"
_SHARE = "mount the same file system at the same path on all nodes, or use --part on each of them"


@dataclass(frozen=True)
class Versions:
    """What must be the same on all nodes: it decides the bytes of the output."""

    milora_init: str
    torch: str

    @classmethod
    def here(cls) -> Versions:
        return cls(__version__, torch.__version__)


@dataclass(frozen=True)
class Request:
    """What every task needs besides its job.

    Attributes:
        attempts: The folder for the folders of the attempts.
        token: Content of the file `probe` in it.
        versions: Of the driver.
        on_gpu: Whether a task has a GPU.
        shared: Whether every node must see `attempts`. Otherwise a file is made in a folder of its node, and uploaded.
        options: The options of the run, with the driver's token for the Hub.
    """

    attempts: Path
    token: str
    versions: Versions
    on_gpu: bool
    shared: bool
    options: InitOptions


@dataclass(frozen=True)
class Node:
    """What a node has, as its probe found it.

    Attributes:
        name: Its name.
        output_bytes: How much is free where the output is; None if it does not see that folder.
        own_bytes: How much is free for its own folders.
        cached: The files of a model on the Hub that are in its cache.
    """

    name: str
    output_bytes: int | None
    own_bytes: int
    cached: frozenset[str] = frozenset()


def check(
    request: Request, sources: Mapping[Path, Stamp], remote: RemoteFiles | None = None, names: Iterable[str] = ()
) -> Node:
    """Check that this node can make files of the output. Runs on the node.

    Args:
        request: Of the run.
        sources: Files of a local model with their stamps.
        remote: A model on the Hub; None for a local one.
        names: Files of the model on the Hub, to be looked for in the cache.

    Raises:
        PlanError: Another version of milora_init or torch.
        OutputError: The node does not see the output folder, or another one at its path, and must see it.
        CheckpointError: The node does not see a file of the model, or another version of it.
    """
    here, name = Versions.here(), platform.node()
    if here != request.versions:
        raise PlanError(
            f"node {name} has milora_init {here.milora_init} with torch {here.torch}, this machine "
            f"{request.versions.milora_init} with torch {request.versions.torch}",
            hint="install the same versions on all nodes: other ones may write other bytes",
        )
    unseen = _why_unseen(request)
    if unseen and request.shared:
        hint = f"{_SHARE}; a model of the Hub with --push-to-hub needs no such folder"
        raise OutputError(f"node {name} {unseen}", hint=hint)
    for path, planned in sources.items():
        if not path.exists():
            raise CheckpointError(f"node {name} does not see {path}", hint=_SHARE)
        if stamp(path) != planned:
            raise CheckpointError(f"node {name} sees another version of {path}", hint=_SHARE)
    cached = frozenset(file for file in names if remote and is_cached(request.options, remote, file))
    output_bytes = None if unseen else shutil.disk_usage(request.attempts).free
    return Node(name, output_bytes, shutil.disk_usage(tempfile.gettempdir()).free, cached)


def _why_unseen(request: Request) -> str:
    """Why this node does not see the output folder; empty if it does."""
    try:
        token = (request.attempts / PROBE).read_text()
    except (OSError, UnicodeDecodeError) as error:
        return f"does not see {request.attempts}: {getattr(error, 'strerror', error)}"
    return "" if token == request.token else f"sees another folder as {request.attempts}"


def make_file(
    job: ShardJob, request: Request, model: Checkpoint, threads: int
) -> tuple[ShardResult[WeightRecord], bytes | None]:
    """Make the file of a job in the folder of a new attempt. Runs on a node.

    Args:
        job: The file. A source without a stamp is fetched from the Hub.
        request: Of the run.
        model: The headers of the files that the job reads.
        threads: How many weights the CPU solves at a time, if there is no GPU.

    Returns:
        The result. If the file was made in a folder of this node: the content of its part of the adapter too.

    Raises:
        MiloraError: As `check`, `weight.run`, `download` and `Repository.upload_alone`.
    """
    hide_bars()
    check(request, {path: planned for path, planned in job.stamps.items() if planned is not None})
    with own_folder() as own:
        if model.remote:
            model = dataclasses.replace(model, remote=connected(model.remote, request.options.token))
            job = _fetched(job, request.options, model, own)
        attempt = (request.attempts if request.shared else own) / uuid.uuid4().hex
        result = make_in(attempt, job, on_gpu=request.on_gpu, threads=threads)
        if request.shared:
            return result, None
        return _uploaded(result, attempt, request.options)


def _fetched(job: ShardJob, options: InitOptions, model: Checkpoint, folder: Path) -> ShardJob:
    """The job, with all that it reads of a model on the Hub on this machine's disk: in the cache, or in a folder."""
    path, header = _fetched_source(job, options, model, folder)
    with open_shard(path) as shard:
        if shard.header.raw != header.raw:
            raise CheckpointError(f"{path} is not the file whose header was planned with", hint="run it again")
    if model.is_pickle:  # which cannot be read by range
        files = {place.path.name for place in job.elsewhere.values()}
        paths = {name: _fetched_file(name, options, model, folder) for name in files}
        elsewhere = {n: dataclasses.replace(place, path=paths[place.path.name]) for n, place in job.elsewhere.items()}
        job = dataclasses.replace(job, elsewhere=elsewhere)
    else:
        (job,) = with_parts([job], model, folder)
    return dataclasses.replace(job, source=path, stamp=stamp(path))


def _fetched_source(job: ShardJob, options: InitOptions, model: Checkpoint, folder: Path) -> tuple[Path, Header]:
    """The source of a job and its header; without a base, a file with only the tensors that are read if possible."""
    name = job.source.name
    header = model.headers[name]
    assert model.remote is not None
    if job.header is None and not model.is_pickle and not is_cached(options, model.remote, name):
        part = job.source_part(header)
        with suppress(RangesIgnoredError):
            return fetch_tensors(options, model.remote, name, part, folder), part
    return _fetched_file(name, options, model, folder), header


def _fetched_file(name: str, options: InitOptions, model: Checkpoint, folder: Path) -> Path:
    assert model.remote is not None
    return fetch_file(options, model.remote, name, None if is_cached(options, model.remote, name) else folder)


def make_in(attempt: Path, job: ShardJob, *, on_gpu: bool, threads: int) -> ShardResult[WeightRecord]:
    """Make the file of a job in the folder of an attempt, which does not exist yet; see `ShardWriter`."""
    devices = (torch.device("cuda", 0),) if on_gpu else (torch.device("cpu"),) * threads
    with (
        FilePool() as files,
        SolverPool(devices, threads_per_device=2 if on_gpu else 1) as solvers,
        LocalMakers(
            solvers,
            files,
            open_shard=lambda job: shard_job.shard_writer(job, attempt),
            submit=partial(shard_job.submit, solvers),
            count=shard_job.count,
        ) as makers,
    ):
        ((_, result),) = makers.run([job])
    return result


def _uploaded(
    result: ShardResult[WeightRecord], attempt: Path, options: InitOptions
) -> tuple[ShardResult[WeightRecord], bytes | None]:
    """Upload the shard, if there is one; return the result and the content of its part of the adapter."""
    part = attempt / Path(part_name(result.shard)).name
    content = part.read_bytes() if part.exists() else None
    if result.shard in result.files:
        from milora_init.hub.upload import Repository

        assert options.push_to_hub is not None
        repository = Repository(options.push_to_hub, private=options.private, token=options.token)
        repository.upload_alone(attempt / result.shard, result.shard)
        result = dataclasses.replace(result, uploaded=True)
    return result, content


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder on this machine's own disk, removed at the end. What killed processes have left is removed first.

    Each folder has a file that is locked as long as its process lives.
    """
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{_LOCAL}*"):
        with suppress(OSError):
            _remove_unless_locked(left)
    made = Path(tempfile.mkdtemp(prefix=f".{_LOCAL}"))
    with (made / _LOCK).open("x") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = made.rename(parent / made.name.removeprefix("."))  # nobody looks for it before it is locked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_unless_locked(folder: Path) -> None:
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        return
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
