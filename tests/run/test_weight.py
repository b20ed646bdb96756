"""weight: a job can be pickled, the CPU replaces a device without memory, and a late write changes no file."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.reference import same_bytes
from support.tiny_models import contents

from milora_init.checkpoint.header import plan_header, read_header
from milora_init.checkpoint.tensor_file import SafetensorsShard
from milora_init.checkpoint.writer import SafetensorsWriter
from milora_init.errors import CheckpointError, OutputError, SolveError
from milora_init.linalg.split import split
from milora_init.manifest import WeightRecord
from milora_init.model.adaptable import Adaptable
from milora_init.plan.weights import WeightPlan
from milora_init.run import weight as weight_run
from milora_init.run.adapter_file import part_header, part_key
from milora_init.run.progress import Progress
from milora_init.run.weight import WeightJob, run

CPU = torch.device("cpu")
MODULE, TENSOR, SHAPE, RANK = "layers.0.q_proj", "layers.0.q_proj.weight", (12, 20), 3


class Files:
    """One weight on disk, and the files for its residual and factors."""

    def __init__(self, folder: Path, *, fan_in_fan_out: bool = False, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.W = torch.randn(SHAPE).to(dtype)
        save_file({TENSOR: self.W.mT.contiguous() if fan_in_fan_out else self.W}, folder / "source.safetensors")
        source = SafetensorsShard(folder / "source.safetensors")
        source.close()
        self.base = SafetensorsWriter(folder / "base.safetensors", source.header)
        stored = source.header.tensors[TENSOR].dtype
        plan = WeightPlan(Adaptable(MODULE, TENSOR, SHAPE, fan_in_fan_out), stored, stored, RANK, 2.0, MODULE, 7)
        self.factors = SafetensorsWriter(folder / "factors.safetensors", part_header([plan]))
        self.job = WeightJob(
            plan=plan,
            source=source.locate(TENSOR),
            residual=self.base.target(TENSOR),
            A=self.factors.target(part_key(MODULE, "A")),
            B=self.factors.target(part_key(MODULE, "B")),
            mode="min",
            factors="balanced",
        )

    def run(self, job: WeightJob | None = None) -> WeightRecord:
        """Run the job and finish the files."""
        with self.base, self.factors:
            (record,) = run((job or self.job,), CPU, nullcontext(), Progress())
            self.base.mark_written(TENSOR)
            for factor in "AB":
                self.factors.mark_written(part_key(MODULE, factor))
            self.factors.finish()
            self.base.finish()
        return record

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Residual, B and A as read from disk."""
        factors = load_file(self.folder / "factors.safetensors")
        residual = load_file(self.folder / "base.safetensors")[TENSOR]
        return residual, factors[part_key(MODULE, "B")], factors[part_key(MODULE, "A")]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_the_residual_and_the_factors_are_written_to_their_files(fan_in_fan_out: bool, tmp_path: Path) -> None:
    files = Files(tmp_path, fan_in_fan_out=fan_in_fan_out)
    record = files.run()
    expected = split(files.W, RANK, scale=2.0, mode="min", dtype=torch.float32, seed=7)
    residual, B, A = files.parts()
    assert same_bytes(residual.mT.contiguous() if fan_in_fan_out else residual, expected.residual)
    assert same_bytes(B, expected.B)
    assert same_bytes(A, expected.A)
    assert (record.module, record.tensor, record.shape, record.rank) == (MODULE, TENSOR, SHAPE, RANK)
    assert record.device == "cpu"
    assert record.s_first == expected.triplets.s.tolist()[0]


def test_a_job_and_its_record_can_be_pickled(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here, there = Files(tmp_path / "here"), Files(tmp_path / "there")
    unpickled = pickle.loads(pickle.dumps(there.job))
    assert unpickled == there.job
    record, other = here.run(), there.run(unpickled)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert pickle.loads(pickle.dumps(other)) == other
    assert {f.name for f in dataclasses.fields(record) if getattr(record, f.name) != getattr(other, f.name)} <= {
        "read_s",
        "elapsed_s",
        "write_s",
    }


def test_a_job_is_small_and_frozen(tmp_path: Path) -> None:
    """A job with tensors would break the memory bound, and one with an open file could not be pickled."""
    job = Files(tmp_path).job
    assert len(pickle.dumps(job)) < 2000
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.mode = "max"  # type: ignore[misc]


class SplitOutOfMemory:
    """Replaces `split` by one that runs out of memory in the first `times` calls."""

    def __init__(self, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.attempts = times, 0
        monkeypatch.setattr(weight_run, "split", self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.attempts += 1
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return split(*arguments, **options)


@pytest.mark.parametrize(("times", "device"), [(1, "cpu"), (2, "cpu, because cpu ran out of memory")])
def test_a_device_out_of_memory_is_tried_again_then_replaced_by_the_cpu_and_recorded(
    times: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reference", "short"):
        (tmp_path / name).mkdir()
    reference = Files(tmp_path / "reference")
    reference.run()
    small = SplitOutOfMemory(times, monkeypatch)
    short = Files(tmp_path / "short")
    record = short.run()
    assert small.attempts == times + 1
    assert record.device == device
    assert contents(tmp_path / "short") == contents(tmp_path / "reference")


def test_a_weight_that_does_not_fit_with_another_one_is_copied_again_under_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight is copied to its device without the lock. If memory is lacking, it is copied again with the lock."""
    files = Files(tmp_path)
    real, locked, this_thread = torch.Tensor.to, [False], threading.get_ident()  # an earlier test's solve may still run

    class Lock:
        def __enter__(self) -> None:
            locked[0] = True

        def __exit__(self, *_: object) -> None:
            locked[0] = False

    def to(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if arguments == (CPU,) and not locked[0] and threading.get_ident() == this_thread:
            refused.append(self.shape)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments, **options)

    refused: list[torch.Size] = []
    with files.base, files.factors:
        monkeypatch.setattr(torch.Tensor, "to", to)
        assert run((files.job,), CPU, Lock(), Progress())[0].device == "cpu"
    assert refused == [SHAPE]


def test_a_permanent_lack_of_memory_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, small = Files(tmp_path), SplitOutOfMemory(9, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        files.run()
    assert small.attempts == 3
    assert list(contents(tmp_path)) == ["source.safetensors"]


def test_a_weight_that_cannot_be_split_is_named_with_its_file(tmp_path: Path) -> None:
    files = Files(tmp_path)
    path = tmp_path / "source.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")  # a NaN
    with pytest.raises(SolveError, match=rf"{TENSOR} in {path}.*NaN") as caught:
        files.run()
    assert "--exclude" in caught.value.hint


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_read_error_names_the_file_and_the_tensor(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError) as caught:
        files.run()
    for part in (str(tmp_path / "source.safetensors"), TENSOR, os.strerror(code)):
        assert part in caught.value.message
    assert list(contents(tmp_path)) == ["source.safetensors"]


def test_a_truncated_source_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    files = Files(tmp_path)
    path = tmp_path / "source.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{path} ended inside {TENSOR}"):
        files.run()


def test_a_weight_may_need_several_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux moves at most 2 GiB in one call, and a signal may cut any call short."""
    files = Files(tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: real(file, [views[0][:7]], at))
    assert same_bytes(files.job.source.read(), files.W)


def test_an_empty_tensor_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.empty(0, 4)}, tmp_path / "x.safetensors")
    shard = SafetensorsShard(tmp_path / "x.safetensors")
    shard.close()
    assert shard.read("x").shape == (0, 4)


def test_a_late_write_of_a_failed_run_changes_no_file(tmp_path: Path) -> None:
    """The solve of a failed run cannot be stopped; the next run may already use the same file name."""
    header = plan_header([("w", "F32", (4,))])
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, header) as failed:
        late = failed.target("w").opened()
        write = late.__enter__()
    with SafetensorsWriter(path, header) as following:
        write(torch.full((4,), 13.0))
        following.write("w", torch.ones(4))
        write(torch.full((4,), 13.0))
        late.__exit__(None, None, None)
        following.finish()
    assert load_file(path)["w"].tolist() == [1, 1, 1, 1]
    assert list(contents(tmp_path)) == [path.name]


def test_a_write_target_in_a_deleted_file_is_an_output_error(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x.safetensors", plan_header([("w", "F32", (4,))])) as failed:
        target = failed.target("w")
    with pytest.raises(OutputError, match=r"x\.safetensors\.partial"), target.opened():
        pass
    assert contents(tmp_path) == {}


def test_write_targets_of_one_file_do_not_overlap(tmp_path: Path) -> None:
    header = plan_header([("a", "F32", (3,)), ("b", "BF16", (5,)), ("c", "F32", ())])
    given = {"a": torch.tensor([1.0, 2, 3]), "b": torch.arange(5).bfloat16(), "c": torch.tensor(4.0)}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, header) as writer:
        targets = {name: pickle.loads(pickle.dumps(writer.target(name))) for name in ("b", "c", "a")}
        for name, target in targets.items():
            with target.opened() as write:
                write(given[name])
            writer.mark_written(name)
        writer.finish()
    assert read_header(path) == header
    assert all(same_bytes(tensor, given[name]) for name, tensor in load_file(path).items())
