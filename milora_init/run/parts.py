"""Fetch the parts of quantised tensors that lie in files of the Hub which this run does not have yet.

A scale may be in another file than its codes. Files are downloaded one after the other, and with --low-disk removed
again, so such parts are read by range before the first file is made, and kept in the work folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from milora_init.checkpoint.dtypes import TORCH_DTYPES
from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.header import TensorInfo, plan_header
from milora_init.checkpoint.tensor_file import SafetensorsShard, TensorSource
from milora_init.checkpoint.writer import SafetensorsWriter
from milora_init.plan.output_files import ShardJob

PARTS_FILE = "parts.safetensors"
_MOST_BYTES = 64 << 20  # of one request


def with_parts(jobs: Sequence[ShardJob], checkpoint: Checkpoint, work: Path) -> list[ShardJob]:
    """The jobs, with all parts from other files on the disk.

    Args:
        jobs: The jobs that are still to be done.
        checkpoint: The model.
        work: The folder of this run's attempts, inside the work folder of the output.

    Raises:
        HubError: A part cannot be read from the Hub.
        OutputError: It cannot be written.
    """
    absent = checkpoint.remote.absent if checkpoint.remote else {}
    names = {name for job in jobs for name in job.elsewhere if checkpoint.file_of[name] in absent}
    if not names:
        return list(jobs)
    fetched = _fetch(sorted(names), checkpoint, work / PARTS_FILE)
    return [
        dataclasses.replace(job, elsewhere={name: fetched.get(name, place) for name, place in job.elsewhere.items()})
        for job in jobs
    ]


def _fetch(names: Sequence[str], checkpoint: Checkpoint, path: Path) -> Mapping[str, TensorSource]:
    """Read stored tensors by range into a safetensors file, and return where they are in it."""
    assert checkpoint.remote is not None
    stored = checkpoint.stored
    header = plan_header((name, stored[name].dtype, stored[name].shape) for name in names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(path, header) as writer:
        for file, infos in _runs(names, checkpoint):
            base = len(checkpoint.headers[file].raw)
            content = checkpoint.remote.read(file, base + infos[0].start, base + infos[-1].end)
            for info in infos:
                part = content[info.start - infos[0].start : info.end - infos[0].start]
                tensor = torch.frombuffer(bytearray(part), dtype=torch.uint8).view(TORCH_DTYPES[info.dtype])
                writer.write(info.name, tensor.reshape(info.shape))
        writer.finish()
    with SafetensorsShard(path) as shard:
        return {name: shard.locate(name) for name in names}


def _runs(names: Sequence[str], checkpoint: Checkpoint) -> Iterator[tuple[str, list[TensorInfo]]]:
    """Groups of tensors that follow each other in a file, with the name of the file: one request for each group."""
    places = sorted((checkpoint.file_of[name], checkpoint.stored[name].start, name) for name in names)
    run: list[TensorInfo] = []
    run_file = ""
    for file, _, name in places:
        info = checkpoint.stored[name]
        if run and (file != run_file or info.start != run[-1].end or info.end - run[0].start > _MOST_BYTES):
            yield run_file, run
            run = []
        run_file = file
        run.append(info)
    if run:
        yield run_file, run
