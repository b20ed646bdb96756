"""Download the next shard while the current one is being split."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from milora_init.checkpoint.files import stamp
from milora_init.checkpoint.header import read_header
from milora_init.errors import CheckpointError
from milora_init.plan.output_files import ShardJob

Fetch = Callable[[ShardJob], Path]


class Prefetcher:
    """Downloads the source files of jobs in order, one ahead of the job that is taken.

    Args:
        jobs: In the order in which they will be taken.
        headers: The headers, as bytes, that each file may have: its own, or that of a part of it.
        fetch: Downloads a file of the model, or the part of it that a job reads; called from another thread.
        remove: Called with a downloaded file that is no longer needed; None to keep it.
    """

    def __init__(
        self,
        jobs: Sequence[ShardJob],
        headers: Mapping[str, Collection[bytes]],
        fetch: Fetch,
        remove: Callable[[Path], None] | None = None,
    ) -> None:
        self._waiting = deque(job for job in jobs if job.stamp is None)
        self._headers, self._fetch, self._remove = headers, fetch, remove
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._downloads: dict[str, Future[Path]] = {}

    def __enter__(self) -> Prefetcher:
        self._start_next()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for a download

    def take(self, job: ShardJob) -> ShardJob:
        """The job with its source on the disk. Waits for the download if it is not finished.

        Raises:
            CheckpointError: The file is not the one that was planned with.
            HubError: The download failed.
        """
        if job.stamp is not None:
            return job
        name = job.source.name
        while name not in self._downloads:
            self._start_next()
        path = self._downloads[name].result()
        self._start_next()
        if read_header(path).raw not in self._headers[name]:
            raise CheckpointError(f"{path} is not the file whose header was planned with", hint="run it again")
        return dataclasses.replace(job, source=path, stamp=stamp(path))

    def release(self, job: ShardJob) -> None:
        """The job is finished and recorded: remove its source if it was downloaded for this run alone."""
        name = job.source.name
        if self._remove and name in self._downloads:
            self._remove(self._downloads.pop(name).result())

    def _start_next(self) -> None:
        if self._waiting:
            job = self._waiting.popleft()
            self._downloads[job.source.name] = self._pool.submit(self._fetch, job)
