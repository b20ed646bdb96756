"""What is done for one shard of a run, on this machine or on a node of a cluster."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from milora_init.manifest import WeightRecord
from milora_init.plan.output_files import ShardJob
from milora_init.run import dense, weight
from milora_init.run.adapter_file import part_header, part_name
from milora_init.run.pool import SolverPool
from milora_init.run.shard import ShardWriter


def shard_writer(job: ShardJob, attempt: Path) -> ShardWriter[WeightRecord]:
    """Writes the shard of a job, and its part of the adapter, in the folder of an attempt."""
    assert job.stamp is not None, "the source is on the disk"
    part = (part_name(job.target), part_header(job.splits)) if job.splits else None
    return ShardWriter(
        {job.source: job.stamp}, attempt=attempt, name=job.target, header=job.header, adapter_part=part,
        companions=job.companions,
    )  # fmt: skip


def submit(solvers: SolverPool, job: ShardJob, shard: ShardWriter[WeightRecord]) -> list[Future[Any]]:
    """Give the weights to split to the solver pool, then the tensors to dequantise; return their futures."""
    jobs = weight.weight_jobs(job, shard, on_gpus=solvers.on_gpus)
    weights = [shard.submit(solvers, weight.run, batch) for batch in jobs]
    return weights + [shard.submit_other(solvers, dense.run, dense_job) for dense_job in dense.jobs(job, shard)]


def count(job: ShardJob, *, on_gpus: bool = False) -> int:
    """The number of futures that `submit` returns."""
    return len(weight.batches(job, on_gpus=on_gpus)) + len(dense.tensors(job))
