"""Make the files of an output on the nodes of a Ray cluster (https://docs.ray.io), one task for each file.

Every node must have the same milora_init and torch, and must see the model and the output folder at the same paths:
`check` is called on every node before the first file is made, and again by each task, because nodes may join later. A
model on the Hub is fetched by each node. If the output goes to the Hub too, nodes need not see its folder: they upload
what they make. See `ray_node`.

A task returns sizes, hashes and records. The driver alone gives names and writes the journal. So a task that Ray has
started twice, or that ends after the driver, changes nothing.

A task that is lost with its worker or its node is started again by Ray. An error of a task ends the run.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from milora_init import __version__
from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.writer import writing
from milora_init.errors import MiloraError, OutputError, PlanError, SolveError, UsageError, explain
from milora_init.hub.source import with_token
from milora_init.manifest import WeightRecord
from milora_init.plan.output_files import ShardJob
from milora_init.plan.plan import PROCESS_BYTES, Plan
from milora_init.run import shard_job
from milora_init.run.adapter_file import part_name
from milora_init.run.progress import Progress, ShardResult
from milora_init.run.ray_node import PROBE, Node, Request, Versions, check, make_file

RETRIES = 4  # of a task whose worker or node is lost
IN_FLIGHT = 2  # tasks for each that can run at a time: a node that is free finds the next one
_ANSWER_S = 20  # in which a cluster must answer at all
_PROBE_S = 300  # in which every node must have answered
_POLL_S = 10  # how often the driver looks for new nodes while no task ends


class RayMakers:
    """Makes shards on a Ray cluster: a `Makers`. Use it with `with`, which connects to the cluster.

    Args:
        address: Of the cluster: `auto`, `HOST:PORT`, or as ray.init takes it.
        plan: The run.
        jobs: Those of its jobs that are to be done.
        attempts: The folder for the folders of the attempts.
        progress: Receives the tensors of each finished file.

    Raises:
        UsageError: Ray is not installed, no cluster answers, or it has not the devices that the options name.
        PlanError, OutputError, CheckpointError: A node cannot make files of this output; see `check`.
    """

    def __init__(self, address: str, plan: Plan, jobs: Sequence[ShardJob], attempts: Path, progress: Progress) -> None:
        self._address, self._plan, self._progress = address, plan, progress
        cache = plan.options.cache_dir
        self._jobs = [_for_nodes(job, on_hub=plan.checkpoint.remote is not None) for job in jobs]
        self._request = Request(
            attempts=attempts.absolute(),
            token=uuid.uuid4().hex,
            versions=Versions.here(),
            on_gpu=False,
            shared=not _needs_no_folder(plan),
            options=with_token(dataclasses.replace(plan.options, cache_dir=cache and str(Path(cache).absolute()))),
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
            (self._request.attempts / PROBE).write_text(self._request.token)
            self._probe()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()  # Ray ends the tasks of a driver that has left
        (self._request.attempts / PROBE).unlink(missing_ok=True)

    def run(self, jobs: Iterable[ShardJob]) -> Iterator[tuple[ShardJob, ShardResult[WeightRecord]]]:
        """See `Makers`. The costliest files are begun first; each is yielded when it is finished."""
        wanted = {job.target: job for job in jobs}
        ordered = sorted((job for job in self._jobs if job.target in wanted), key=self._plan.cost, reverse=True)
        smallest = self._smallest_node()
        for job, (result, part) in flow(self._ray, ordered, partial(self._start, smallest)):
            self._report(job)
            if not self._request.shared:
                self._receive(result, part)
            yield wanted[job.target], result

    def _start(self, smallest: Mapping[str, float], job: ShardJob) -> Any:
        """Start the task of a job; return its reference. It fits on the smallest node."""
        plan = self._plan
        request = dataclasses.replace(self._request, on_gpu=self._request.on_gpu and bool(job.splits))
        threads = self._threads(smallest, job)
        needed = sorted(map(plan.memory_bytes, job.splits), reverse=True)
        most = int(smallest.get("memory", 0))
        while not request.on_gpu and threads > 1 and most and PROCESS_BYTES + sum(needed[:threads]) > most // 2:
            threads -= 1
        task = self._ray.remote(make_file).options(
            num_cpus=1 if request.on_gpu else threads,
            num_gpus=1 if request.on_gpu else 0,
            memory=min(most, PROCESS_BYTES + sum(needed[: 2 if request.on_gpu else threads])) or None,
            max_retries=RETRIES,
            name=job.target,
        )
        return task.remote(job, request, _files_of(job, plan.checkpoint), threads)

    def _threads(self, smallest: Mapping[str, float], job: ShardJob) -> int:
        """How many weights of a job are solved at a time on CPUs, where there is enough memory."""
        return max(1, min(shard_job.count(job), int(smallest["CPU"])))

    def _receive(self, result: ShardResult[WeightRecord], content: bytes | None) -> None:
        """Write the part of the adapter that a node has sent to where `OutputFolder.commit` looks for it."""
        folder = self._request.attempts / result.attempt
        name = part_name(result.shard)
        path = folder / Path(name).name
        with writing(path):
            folder.mkdir(parents=True)
            if content is not None:
                path.write_bytes(content)
        if content is not None and sha256(path) != result.hashes[name]:
            raise OutputError(f"{path} is not what the node has sent", hint="run the same command again")

    def _probe(self) -> None:
        """Call `check` on every node that can run tasks, and decide whether they share the output folder.

        Raises:
            PlanError, OutputError, CheckpointError: What it raises; and for a node that does not answer, or whose disk
                is too small.
        """
        remote = self._plan.checkpoint.remote and self._plan.checkpoint.remote.of({})
        stamps = [(path, planned) for job in self._jobs for path, planned in job.stamps.items()]
        sources = {path: planned for path, planned in stamps if planned is not None}
        names = [job.source.name for job in self._jobs if job.stamp is None]
        task, on_node = self._ray.remote(check), self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        probes = {
            task.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=on_node(node["NodeID"], soft=False),
            ).remote(self._request, sources, remote, names): node
            for node in self._workers()
        }
        _, late = self._ray.wait(list(probes), num_returns=len(probes), timeout=_PROBE_S)
        if late:
            name = probes[late[0]]["NodeManagerHostname"]
            raise OutputError(f"node {name} of the Ray cluster has not answered in {_PROBE_S} s", hint="ray status")
        found: list[tuple[Node, Mapping[str, float]]] = []
        for probe, node in probes.items():
            name = node["NodeManagerHostname"]
            try:
                found.append((_result(self._ray, probe, f"the probe of node {name}"), node["Resources"]))
            except self._ray.exceptions.RayTaskError as error:  # it cannot even be called there
                reason = str(error.cause).strip().partition("\n")[0]
                raise PlanError(
                    f"node {name} cannot run milora_init {__version__}: {reason}",
                    hint="install the same versions of milora_init and torch on all nodes",
                ) from error
        shared = all(node.output_bytes is not None for node, _ in found)
        self._request = dataclasses.replace(self._request, shared=shared)
        self._require_disks(found)

    def _require_disks(self, nodes: Iterable[tuple[Node, Mapping[str, float]]]) -> None:
        """Compare what is free with what the files need. Raises OutputError.

        A node's own disk has the sources that it fetches, and the files if it does not see the output folder; as many
        at a time as it has places for the largest tasks.
        """
        plan, request, smallest = self._plan, self._request, self._smallest_node()
        fetched = {job.target: 0 if job.stamp is not None else self._fetched_bytes(job) for job in self._jobs}
        made = {job.target: job.base_bytes + plan.factor_bytes(job) for job in self._jobs}
        threads = max((self._threads(smallest, job) for job in self._jobs), default=1)
        for node, resources in nodes:
            own = [
                (0 if job.source.name in node.cached else fetched[job.target])
                + (0 if request.shared else made[job.target])
                for job in self._jobs
            ]
            places = resources.get("GPU", 0) if request.on_gpu else resources["CPU"] // threads
            needed = sum(sorted(own, reverse=True)[: int(places)])
            if needed > node.own_bytes:
                raise OutputError(
                    f"node {node.name} needs {needed / 1e6:,.1f} MB for the files that it makes at a time, its "
                    f"temporary folder has {node.own_bytes / 1e6:,.1f} MB free",
                    hint="set TMPDIR to a folder on a larger disk where Ray is started on that node",
                )
            needed = sum(made.values()) if request.shared else 0
            if node.output_bytes is not None and needed > node.output_bytes:
                raise OutputError(
                    f"--out {plan.out} needs {needed / 1e6:,.1f} MB, its disk has {node.output_bytes / 1e6:,.1f} MB "
                    f"free on node {node.name}",
                    hint="free some space, or choose an --out on another disk",
                )

    def _fetched_bytes(self, job: ShardJob) -> int:
        """How much a node downloads for a job."""
        header = self._plan.checkpoint.headers[job.source.name]
        return (header if self._plan.writes_base else job.source_part(header)).file_bytes

    def _smallest_node(self) -> Mapping[str, float]:
        """The resources of the node with the fewest CPUs of those that can run tasks."""
        resources: Iterable[Mapping[str, float]] = (node["Resources"] for node in self._workers())
        return min(resources, key=lambda resources: resources["CPU"])

    def _workers(self) -> list[dict[str, Any]]:
        """The nodes that can run tasks. Raises UsageError where there is none."""
        found = [node for node in self._nodes() if node["Resources"].get("CPU", 0) >= 1]
        if not found:
            what = f"no node of the Ray cluster at {self._address} has a CPU for tasks"
            raise UsageError(what, hint="add a node with CPUs to the cluster")
        return found

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _report(self, job: ShardJob) -> None:
        """Report the tensors of a finished file."""
        self._progress.solving(job.target, f"{len(self._nodes())} nodes")
        for name, info in self._plan.checkpoint.headers[job.source.name].tensors.items():
            split = job.weights.get(name, ())
            for _ in split or (() if job.header is None else (None,)):
                self._progress.tensor(name, info.size_bytes // max(1, len(split)))


def _needs_no_folder(plan: Plan) -> bool:
    """Whether nodes can do without the output folder: they fetch from the Hub, and upload or have only factors."""
    return plan.nodes_may_upload or (plan.checkpoint.remote is not None and not plan.writes_base)


def _for_nodes(job: ShardJob, *, on_hub: bool) -> ShardJob:
    """The job as a node can read it: with absolute paths; of a model on the Hub, without what is on this disk."""
    if on_hub:
        return dataclasses.replace(job, stamp=None, companions={})
    elsewhere = {n: dataclasses.replace(place, path=place.path.absolute()) for n, place in job.elsewhere.items()}
    companions = {path.absolute(): planned for path, planned in job.companions.items()}
    return dataclasses.replace(job, source=job.source.absolute(), elsewhere=elsewhere, companions=companions)


def _files_of(job: ShardJob, checkpoint: Checkpoint) -> Checkpoint:
    """What a node must know of a model on the Hub to read what a job reads."""
    names = {job.source.name, *(checkpoint.file_of[name] for name in job.elsewhere)}
    headers = {name: checkpoint.headers[name] for name in names}
    remote = checkpoint.remote and checkpoint.remote.of(headers)
    return Checkpoint(checkpoint.folder, headers, {}, None, checkpoint.is_pickle, remote)


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
        if isinstance(error.cause, OSError | MemoryError) and (explained := explain(error.cause)):
            raise SolveError(f"{what} on a node of the Ray cluster: {explained[0]}", hint=explained[1]) from error
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise SolveError(
            f"{what} was lost on the Ray cluster {RETRIES + 1} times: {reason}",
            hint="look at the memory of the nodes (`ray status`); the same command resumes the run",
        ) from error


def connect(address: str) -> Any:
    """Connect this process to a Ray cluster; return the module `ray`. Raises UsageError."""
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray, which is not installed", hint="pip install ray") from error
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
