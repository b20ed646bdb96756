"""Download the sources of shards while earlier shards are being made."""

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
        fetch: Downloads a file of the model, or the part of it that a job reads; called from other threads.
        remove: Called with a downloaded file that is no longer needed; None to keep it.
    """

    THREADS = 4  # each compares what it has downloaded with the Hub's SHA-256, which no other download waits for

    def __init__(
        self,
        jobs: Sequence[ShardJob],
        headers: Mapping[str, Collection[bytes]],
        fetch: Fetch,
        remove: Callable[[Path], None] | None = None,
    ) -> None:
        self._waiting = deque(job for job in jobs if job.stamp is None)
        self._headers, self._fetch, self._remove = headers, fetch, remove
        # What is removed is downloaded one by one: the disk is small.
        self._pool = ThreadPoolExecutor(1 if remove else self.THREADS, thread_name_prefix="fetch")
        self._downloads: dict[str, Future[ShardJob]] = {}

    def __enter__(self) -> Prefetcher:
        self._start_next()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for a download

    def take(self, job: ShardJob) -> Future[ShardJob]:
        """A future of the job with its source on the disk.

        Raises:
            CheckpointError: In the future: the file is not the one that was planned with.
            HubError: In the future: the download failed.
        """
        if job.stamp is not None:
            there: Future[ShardJob] = Future()
            there.set_result(job)
            return there
        name = job.source.name
        while name not in self._downloads:
            self._start_next()
        self._start_next()
        return self._downloads[name]

    def release(self, job: ShardJob) -> None:
        """The job is finished and recorded: remove its source if it was downloaded for this run alone."""
        name = job.source.name
        if self._remove and name in self._downloads:
            self._remove(self._downloads.pop(name).result().source)

    def _start_next(self) -> None:
        if self._waiting:
            job = self._waiting.popleft()
            self._downloads[job.source.name] = self._pool.submit(self._download, job)

    def _download(self, job: ShardJob) -> ShardJob:
        path = self._fetch(job)
        if read_header(path).raw not in self._headers[job.source.name]:
            raise CheckpointError(f"{path} is not the file whose header was planned with", hint="run it again")
        return dataclasses.replace(job, source=path, stamp=stamp(path))
