"""Download the next shard while the current one is in work."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from milora_init.checkpoint.files import stamp
from milora_init.checkpoint.header import Header, read_header
from milora_init.errors import CheckpointError
from milora_init.plan.output_files import ShardJob

Fetch = Callable[[str], Path]


class Prefetcher:
    """Jobs whose source is on the disk, in order; the next one's is fetched while this one's is worked on.

    Args:
        jobs: In the order in which they will be taken.
        headers: Of every file of the source, as planned.
        fetch: Fetches a file of the source by its name; called from another thread.
        release: Called with a fetched file when its output is safe.
    """

    def __init__(
        self,
        jobs: Sequence[ShardJob],
        headers: Mapping[str, Header],
        fetch: Fetch,
        release: Callable[[Path], None] | None = None,
    ) -> None:
        self._waiting = deque(job.source.name for job in jobs if job.stamp is None)
        self._headers, self._fetch, self._release = headers, fetch, release
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._coming: dict[str, Future[Path]] = {}

    def __enter__(self) -> Prefetcher:
        self._send_for_next()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for a download

    def take(self, job: ShardJob) -> ShardJob:
        """The job with its source on the disk. Raises what fetching raises, and CheckpointError for another file."""
        if job.stamp is not None:
            return job
        name = job.source.name
        while name not in self._coming:
            self._send_for_next()
        path = self._coming[name].result()
        self._send_for_next()
        if read_header(path).raw != self._headers[name].raw:
            raise CheckpointError(f"{path} is not the file whose header was planned with", hint="run it again")
        return dataclasses.replace(job, source=path, stamp=stamp(path))

    def done(self, job: ShardJob) -> None:
        """A job's output is safe: its source, if it was fetched for this run, may go."""
        name = job.source.name
        if self._release and name in self._coming:
            self._release(self._coming.pop(name).result())

    def _send_for_next(self) -> None:
        if self._waiting:
            name = self._waiting.popleft()
            self._coming[name] = self._pool.submit(self._fetch, name)
