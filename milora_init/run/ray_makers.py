"""Make the files of an output on the nodes of a Ray cluster (https://docs.ray.io), one task for each file.

Every node must see the model and the output folder at the same paths, and have the same milora_init and torch: `check`
is called on every node before the first file is made, and again by each task, because nodes may join later. A task
makes its file in the folder of its attempt, with the code of a single machine, and returns sizes, hashes and records.
The driver alone gives names and writes the journal. So a task that Ray has started twice, or that ends after the
driver, changes nothing.

A task that is lost with its worker or its node is started again by Ray. An error of a task ends the run.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from milora_init import __version__
from milora_init.checkpoint.files import Stamp, stamp
from milora_init.checkpoint.folder import RemoteFiles
from milora_init.checkpoint.header import Header, read_header
from milora_init.errors import CheckpointError, MiloraError, OutputError, PlanError, SolveError, UsageError
from milora_init.hub.source import fetch_file
from milora_init.manifest import WeightRecord
from milora_init.options import InitOptions
from milora_init.plan.output_files import ShardJob
from milora_init.plan.plan import PROCESS_BYTES, Plan
from milora_init.run import shard_job
from milora_init.run.makers import LocalMakers
from milora_init.run.pool import FilePool, SolverPool
from milora_init.run.progress import Progress, ShardResult

RETRIES = 4  # of a task whose worker or node is lost
IN_FLIGHT = 2  # tasks for each that can run at a time: a node that is free finds the next one
_ANSWER_S = 20  # in which a cluster must answer at all
_PROBE_S = 300  # in which every node must have answered
_POLL_S = 10  # how often the driver looks for new nodes while no task ends
_PROBE = "probe"  # a file in the attempts' folder, by which a node shows that it sees the same folder


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
        options: The options of the run, for the download of a file.
        remote: What the Hub knows of the model; None for a local one.
    """

    attempts: Path
    token: str
    versions: Versions
    on_gpu: bool
    options: InitOptions
    remote: RemoteFiles | None


@dataclass(frozen=True)
class Node:
    """What a node has, as its probe found it."""

    name: str
    free_bytes: int
    gpus: int


def check(request: Request, sources: Mapping[Path, Stamp | None]) -> Node:
    """Check that this node can make files of the output. Runs on the node.

    Args:
        request: Of the run.
        sources: Files of the model with their stamps; None for one that is on the Hub.

    Raises:
        PlanError: Another version of milora_init or torch.
        OutputError: The node does not see the output folder, or another one at its path.
        CheckpointError: The node does not see a file of the model, or another version of it.
    """
    here, name = Versions.here(), platform.node()
    if here != request.versions:
        raise PlanError(
            f"node {name} has milora_init {here.milora_init} with torch {here.torch}, this machine "
            f"{request.versions.milora_init} with torch {request.versions.torch}",
            hint="install the same versions on all nodes: other ones may write other bytes",
        )
    hint = "mount the same file system at the same path on all nodes, or use --part on each of them"
    try:
        token = (request.attempts / _PROBE).read_text()
    except OSError as error:
        raise OutputError(f"node {name} does not see {request.attempts}: {error.strerror}", hint=hint) from error
    if token != request.token:
        raise OutputError(f"node {name} sees another folder as {request.attempts}", hint=hint)
    for path, planned in sources.items():
        if planned is None:
            continue
        if not path.exists():
            raise CheckpointError(f"node {name} does not see {path}", hint=hint)
        if stamp(path) != planned:
            raise CheckpointError(f"node {name} sees another version of {path}", hint=hint)
    return Node(name, shutil.disk_usage(request.attempts).free, torch.cuda.device_count() if request.on_gpu else 0)


def make_file(job: ShardJob, request: Request, header: Header, threads: int) -> ShardResult[WeightRecord]:
    """Make the file of a job in the folder of a new attempt. Runs on a node.

    Args:
        job: The file.
        request: Of the run.
        header: Of the source, as planned.
        threads: How many weights the CPU solves at a time, if there is no GPU.

    Raises:
        MiloraError: As `check`, `weight.run` and `download`.
    """
    check(request, {job.source: job.stamp})
    if job.stamp is None:
        path = fetch_file(request.options, request.remote, job.source.name, None)
        if read_header(path).raw != header.raw:
            raise CheckpointError(f"{path} is not the file whose header was planned with", hint="run it again")
        job = dataclasses.replace(job, source=path, stamp=stamp(path))
    devices = (torch.device("cuda", 0),) if request.on_gpu else (torch.device("cpu"),) * threads
    with (
        FilePool() as files,
        SolverPool(devices, threads_per_device=2 if request.on_gpu else 1) as solvers,
        LocalMakers(
            solvers,
            files,
            open_shard=lambda job: shard_job.shard_writer(job, request.attempts / uuid.uuid4().hex),
            submit=partial(shard_job.submit, solvers),
            count=partial(shard_job.count, on_gpus=solvers.on_gpus),
        ) as makers,
    ):
        ((_, result),) = makers.run([job])
    return result


class RayMakers:
    """Makes shards on a Ray cluster: a `Makers`. Use it with `with`, which connects to the cluster.

    Args:
        address: Of the cluster: `auto`, `HOST:PORT`, or as ray.init takes it.
        plan: The run.
        attempts: The folder for the folders of the attempts.
        progress: Receives the tensors of each finished file.

    Raises:
        UsageError: Ray is not installed, no cluster answers, or it has not the devices that the options name.
        PlanError, OutputError, CheckpointError: A node cannot make files of this output; see `check`.
    """

    def __init__(self, address: str, plan: Plan, attempts: Path, progress: Progress) -> None:
        self._address, self._plan, self._progress = address, plan, progress
        remote = plan.checkpoint.remote
        self._request = Request(
            attempts=attempts.absolute(),
            token=uuid.uuid4().hex,
            versions=Versions.here(),
            on_gpu=False,
            options=dataclasses.replace(plan.options, out=str(plan.out.absolute())),
            remote=dataclasses.replace(remote, absent={}) if remote else None,
        )

    def __enter__(self) -> RayMakers:
        self._ray = connect(self._address)
        try:
            names = self._plan.options.device
            has_gpus = self._ray.cluster_resources().get("GPU", 0) >= 1
            if not has_gpus and any(name.startswith("cuda") for name in names):
                raise UsageError(f"the Ray cluster at {self._address} has no GPU", hint="--device cpu or auto")
            on_gpu = has_gpus and "cpu" not in names
            self._request = dataclasses.replace(self._request, on_gpu=on_gpu)
            self._request.attempts.mkdir(parents=True, exist_ok=True)
            (self._request.attempts / _PROBE).write_text(self._request.token)
            self._probe()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()  # Ray ends the tasks of a driver that has left
        (self._request.attempts / _PROBE).unlink(missing_ok=True)

    def run(self, jobs: Iterable[ShardJob]) -> Iterator[tuple[ShardJob, ShardResult[WeightRecord]]]:
        """See `Makers`. The costliest files are begun first; each is yielded when it is finished."""
        ordered = sorted(jobs, key=self._plan.cost, reverse=True)
        workers = [node for node in self._nodes() if _cpus(node) >= 1]
        smallest = min(workers, key=_cpus, default=None)
        if smallest is None:
            raise UsageError(f"no node of the Ray cluster at {self._address} has a CPU for tasks")
        for job, result in flow(self._ray, ordered, partial(self._start, smallest["Resources"])):
            self._report(job)
            yield job, result

    def _start(self, smallest: Mapping[str, float], job: ShardJob) -> Any:
        """Start the task of a job; return its reference. It fits on the smallest node."""
        plan, request = self._plan, self._request
        threads = max(1, min(shard_job.count(job), int(smallest["CPU"])))
        on_gpu = request.on_gpu and bool(job.splits)
        needed = sorted(map(plan.memory_bytes, job.splits), reverse=True)
        most = int(smallest.get("memory", 0))
        while not on_gpu and threads > 1 and most and PROCESS_BYTES + sum(needed[:threads]) > most // 2:
            threads -= 1
        if request.remote:
            name = job.source.name
            hashes = {name: request.remote.hashes[name]} if name in request.remote.hashes else {}
            request = dataclasses.replace(request, remote=dataclasses.replace(request.remote, hashes=hashes))
        task = self._ray.remote(make_file).options(
            num_cpus=1 if on_gpu else threads,
            num_gpus=1 if on_gpu else 0,
            memory=min(most, PROCESS_BYTES + sum(needed[: 2 if on_gpu else threads])) or None,
            max_retries=RETRIES,
            name=job.target,
        )
        header = plan.checkpoint.headers[job.source.name]
        return task.remote(job, dataclasses.replace(request, on_gpu=on_gpu), header, threads)

    def _probe(self) -> None:
        """Call `check` on every node. Raises what it raises, and OutputError for a node that does not answer."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        sources = {job.source: job.stamp for job in self._plan.jobs}
        task = self._ray.remote(check)
        probes = {
            task.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(self._request, sources): node
            for node in self._nodes()
        }
        _, late = self._ray.wait(list(probes), num_returns=len(probes), timeout=_PROBE_S)
        if late:
            name = probes[late[0]]["NodeManagerHostname"]
            raise OutputError(f"node {name} of the Ray cluster has not answered in {_PROBE_S} s", hint="ray status")
        for probe, node in probes.items():
            name = node["NodeManagerHostname"]
            try:
                _result(self._ray, probe, f"the probe of node {name}")
            except self._ray.exceptions.RayTaskError as error:  # it cannot even be called there
                reason = str(error.cause).strip().partition("\n")[0]
                raise PlanError(
                    f"node {name} cannot run milora_init {__version__}: {reason}",
                    hint="install the same versions of milora_init and torch on all nodes",
                ) from error

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _report(self, job: ShardJob) -> None:
        """Report the tensors of a finished file."""
        self._progress.solving(job.target, f"{len(self._nodes())} nodes")
        for name, info in self._plan.checkpoint.headers[job.source.name].tensors.items():
            split = job.weights.get(name, ())
            for _ in split or (() if job.header is None else (None,)):
                self._progress.tensor(name, info.size_bytes // max(1, len(split)))


def flow(ray: Any, jobs: Iterable[Any], start: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Run one task for each job, a bounded number at a time; yield each job and its result when it is finished.

    Args:
        ray: The module.
        jobs: In the order in which they are started.
        start: Starts the task of a job and returns its reference.

    Raises:
        MiloraError: What a task has raised. SolveError for a task that was lost more often than it is retried.
    """
    waiting, running = deque(jobs), dict[Any, Any]()
    try:
        while waiting or running:
            resources = ray.cluster_resources()
            window = IN_FLIGHT * max(1, int(max(resources.get("GPU", 0), resources.get("CPU", 0))))
            while waiting and len(running) < window:
                job = waiting.popleft()
                running[start(job)] = job
            done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_S)
            for reference in done:
                job = running.pop(reference)
                yield job, _result(ray, reference, getattr(job, "target", str(job)))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _result(ray: Any, reference: Any, what: str) -> Any:
    """The result of a task. Raises the MiloraError that the task has raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MiloraError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise SolveError(
            f"{what} was lost on the Ray cluster {RETRIES + 1} times: {reason}",
            hint="look at the memory of the nodes (`ray status`); the same command resumes the run",
        ) from error


def _cpus(node: Mapping[str, Any]) -> float:
    return float(node["Resources"].get("CPU", 0))


def connect(address: str) -> Any:
    """Connect this process to a Ray cluster; return the module `ray`. Raises UsageError."""
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray, which is not installed", hint="pip install 'milora-init[ray]'") from error
    _require_answer(address)
    try:
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # a lost node is reported where it matters
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, or an error of authentication
        reason = " ".join(str(error).split())[:300]
        raise _no_cluster(address, reason) from error
    return ray


def _require_answer(address: str) -> None:
    """Raise UsageError where no cluster answers. ray.init would wait for minutes, and then end this process."""
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "health-check",
        "--address",
        address,
        "--skip-version-check",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        raise _no_cluster(address, f"no answer in {_ANSWER_S} s") from None
    if done.returncode:
        raise _no_cluster(address, (done.stderr.strip().splitlines() or ["it is not healthy"])[-1])


def _no_cluster(address: str, reason: str) -> UsageError:
    return UsageError(
        f"no Ray cluster answers at {address}: {reason}",
        hint="start one with `ray start --head`, and name it with --ray HOST:PORT. If it was started with token "
        "authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too",
    )
