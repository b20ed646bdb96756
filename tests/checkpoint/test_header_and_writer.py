"""header and writer: a wrong header is refused, and a file with its final name is complete."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import fork_server
from support.raw_headers import entry, raw_file, write_file
from support.reference import same_bytes
from support.tiny_models import contents

from milora_init.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES
from milora_init.checkpoint.header import SAFETENSORS_DTYPES, Header, plan_header, read_header
from milora_init.checkpoint.writer import SafetensorsWriter
from milora_init.errors import CheckpointError, OutputError

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def test_a_header_read_is_the_one_that_the_library_wrote(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert content.startswith(header.raw)
    assert header.metadata == {"format": "pt"}
    assert {n: (TORCH_DTYPES[i.dtype], i.shape) for n, i in header.tensors.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }
    for name, info in header.tensors.items():
        data = content[len(header.raw) + info.start : len(header.raw) + info.end]
        assert data == tensors[name].numpy().tobytes(), name


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        pytest.param({"w": F32}, bytes(23), "describes", id="offsets outside the file"),
        pytest.param({"w": F32}, bytes(25), "describes", id="bytes that no tensor owns"),
        pytest.param({"w": entry(offsets=(0, 20))}, bytes(20), r"w is F32 \[2, 3\]", id="too few bytes for the shape"),
        pytest.param({"w": entry(offsets=(24, 0))}, bytes(24), "w is F32", id="an end before its start"),
        pytest.param({"w": entry(offsets=(-24, 0))}, bytes(24), "w.*malformed", id="a negative offset"),
        pytest.param({"v": F32, "w": entry(offsets=(12, 36))}, bytes(36), "w overlaps", id="overlapping tensors"),
        pytest.param({"v": F32, "w": F32}, bytes(24), "w overlaps", id="two tensors in one place"),
        pytest.param({"v": F32, "w": entry(offsets=(28, 52))}, bytes(52), "w leaves a gap", id="a gap"),
        pytest.param({"w": entry(offsets=(8, 32))}, bytes(32), "w leaves a gap", id="a gap before the first"),
        pytest.param({"w": entry(dtype="F31")}, bytes(24), "w has dtype 'F31'", id="an unknown dtype"),
        pytest.param({"w": entry(dtype=7)}, bytes(24), "w has dtype 7", id="a dtype that is no string"),
        pytest.param({"w": entry(dtype=["F32"])}, bytes(24), "w has dtype", id="a dtype that cannot be looked up"),
        pytest.param({"w": {"dtype": "F32"}}, bytes(24), "w.*malformed", id="an entry without a shape"),
        pytest.param({"w": [1, 2]}, bytes(24), "w.*malformed", id="an entry that is a list"),
        pytest.param({"w": None}, bytes(24), "w.*malformed", id="an entry that is null"),
        pytest.param({"w": entry(shape=6)}, bytes(24), "w.*malformed", id="a shape that is a number"),
        pytest.param({"w": entry(shape=(2, 3.0))}, bytes(24), "w.*malformed", id="a shape with a fraction"),
        pytest.param({"w": entry(shape=(2, -3))}, bytes(24), "w.*malformed", id="a negative dimension"),
        pytest.param({"w": entry(shape=(True, 6))}, bytes(24), "w.*malformed", id="a dimension that is true"),
        pytest.param({"w": entry(offsets=(0, 12, 24))}, bytes(24), "w.*malformed", id="three offsets"),
        pytest.param({"w": entry(offsets="01")}, bytes(24), "w.*malformed", id="offsets that are a string"),
        pytest.param({"w": entry(shape=(2**62, 2**62))}, bytes(24), "w is F32", id="a shape larger than any memory"),
        pytest.param({"w": entry(shape=(2**63, 1))}, bytes(24), "w.*malformed", id="a dimension beyond 63 bits"),
        pytest.param({"w": entry(shape=[1] * 5000)}, bytes(24), "w.*malformed", id="thousands of dimensions"),
        pytest.param({"__metadata__": {"n": 1}, "w": F32}, bytes(24), "__metadata__", id="metadata that is no string"),
        pytest.param({"__metadata__": [], "w": F32}, bytes(24), "__metadata__", id="metadata that is a list"),
        pytest.param([1], b"", "not a JSON object", id="a list instead of an object"),
        pytest.param(b"{", b"", "JSON", id="incomplete JSON"),
        pytest.param(b"\xff\xfe", b"", "JSON", id="a header that is not UTF-8"),
        pytest.param(b"[" * 100_000, b"", "JSON", id="deeply nested JSON"),
        pytest.param(b'{"w": 1' + b"0" * 5000 + b"}", b"", "JSON", id="a number of thousands of digits"),
        pytest.param(
            b'{"w": %b, "w": %b}' % (json.dumps(F32).encode(), json.dumps(F32).encode()),
            bytes(24),
            "'w' is in it twice",
            id="a duplicate tensor",
        ),
    ],
)
def test_an_invalid_header_is_refused_and_its_file_named(
    header: Any, data: bytes, message: str, tmp_path: Path
) -> None:
    path = write_file(tmp_path / "x.safetensors", raw_file(header, data))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("length", [0, 7, 8, 20, 90])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    save_file({"weight": torch.randn(4, 4)}, tmp_path / "whole.safetensors")
    path = write_file(tmp_path / "cut.safetensors", (tmp_path / "whole.safetensors").read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"truncated|describes"):
        read_header(path)


def test_a_header_with_a_huge_stated_size_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", (1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)
    with path.open("r+b") as file:  # a sparse file as large as stated
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(200_000_100)
    with pytest.raises(CheckpointError, match="200000000 bytes"):
        read_header(path)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(path)


PLANNED = st.lists(
    st.tuples(st.sampled_from(sorted(SAFETENSORS_DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=8,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(planned=PLANNED)
def test_a_planned_header_reads_back_and_every_tensor_is_aligned(
    planned: list[tuple[str, tuple[int, ...]]], tmp_path: Path
) -> None:
    header = plan_header([(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(planned)], metadata={"k": "é"})
    size = sum(info.size_bytes for info in header.tensors.values())
    assert read_header(write_file(tmp_path / "x.safetensors", header.raw + bytes(size))) == header
    for info in header.tensors.values():
        assert (len(header.raw) + info.start) % SAFETENSORS_DTYPES[info.dtype].itemsize == 0, info


MIXED = {
    "odd": torch.randn(3).bfloat16(),
    "wide": torch.randn(3, 5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
    "transposed": torch.randn(4, 6).T,
    "scalar": torch.tensor(7, dtype=torch.int16),
    "empty": torch.empty(0, 3),
    "half": torch.randn(2, 2).half(),
}


def header_of(tensors: dict[str, torch.Tensor]) -> Header:
    return plan_header(
        [(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()], metadata={"format": "pt"}
    )


def test_the_library_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, header_of(MIXED)) as writer:
        for name in reversed(MIXED):  # any order
            writer.write(name, MIXED[name])
        size = writer.finish()
    assert size == path.stat().st_size
    assert list(contents(tmp_path)) == [path.name]
    back = load_file(path)
    assert back.keys() == MIXED.keys()
    assert all(same_bytes(back[name], tensor) for name, tensor in MIXED.items())


@pytest.mark.parametrize("code", [None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_copied_bytes_are_the_same_with_and_without_copy_file_range(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in MIXED.items()}, source, metadata={"format": "pt"})
    if code is not None:

        def refuse(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    header = read_header(source)
    with source.open("rb") as file, SafetensorsWriter(tmp_path / "copy.safetensors", header) as writer:
        for info in header.tensors.values():
            writer.copy(info.name, file.fileno(), len(header.raw) + info.start, source)
        writer.finish()
    assert (tmp_path / "copy.safetensors").read_bytes() == source.read_bytes()


def test_a_source_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    source = write_file(tmp_path / "source", b"short")
    with (
        source.open("rb") as file,
        SafetensorsWriter(tmp_path / "x.safetensors", header_of(MIXED)) as writer,
        pytest.raises(CheckpointError, match=f"{source}: cannot read wide: .* changed during the run"),
    ):
        writer.copy("wide", file.fileno(), 0, source)
    assert list(contents(tmp_path)) == ["source"]


def test_an_unfinished_file_never_gets_its_final_name(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x.safetensors", header_of(MIXED)) as writer:
        writer.write("odd", MIXED["odd"])
        with pytest.raises(OutputError, match="6 tensors were never written"):
            writer.finish()
    assert contents(tmp_path) == {}


def test_an_exception_leaves_neither_a_file_nor_a_partial_one(tmp_path: Path) -> None:
    def fail() -> None:
        with SafetensorsWriter(tmp_path / "x.safetensors", header_of(MIXED)):
            assert list(contents(tmp_path)) == ["x.safetensors.partial"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(tmp_path) == {}


def test_an_earlier_file_is_kept_until_the_new_one_is_finished(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", b"earlier")
    with SafetensorsWriter(path, header_of(MIXED)) as writer:
        for name, tensor in MIXED.items():
            writer.write(name, tensor)
            assert path.read_bytes() == b"earlier"
        writer.finish()
    assert load_file(path).keys() == MIXED.keys()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("odd", torch.randn(3), r"odd is torch.float32 \[3\], planned BF16 \[3\]"),
        ("odd", torch.randn(4).bfloat16(), r"odd is torch.bfloat16 \[4\], planned BF16 \[3\]"),
        ("transposed", torch.randn(4, 6), r"transposed is torch.float32 \[4, 6\], planned F32 \[6, 4\]"),
        ("unplanned", torch.randn(3), "unplanned was written twice, or never planned"),
    ],
)
def test_a_tensor_other_than_planned_is_refused(name: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    with (
        SafetensorsWriter(tmp_path / "x.safetensors", header_of(MIXED)) as writer,
        pytest.raises(OutputError, match=message),
    ):
        writer.write(name, tensor)


def test_writing_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x.safetensors", header_of(MIXED)) as writer:
        writer.write("odd", MIXED["odd"])
        with pytest.raises(OutputError, match="odd was written twice"):
            writer.write("odd", MIXED["odd"])


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with SafetensorsWriter(tmp_path / "x.safetensors", header_of({})) as writer:
            writer.finish()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_missing_output_folder_is_an_output_error(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "absent" / "x.safetensors", header_of({}))
    with pytest.raises(OutputError, match="cannot write") as caught, writer:
        pass
    assert caught.value.hint


def write_more_than_fits(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        with SafetensorsWriter(path, plan_header([("w", "F32", (100, 100))])) as writer:
            writer.write("w", torch.zeros(100, 100))
    except OutputError as error:
        print(error.message, "|", error.hint)


def test_a_file_too_large_for_its_disk_is_an_output_error_that_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write, in place of a full disk."""
    path = tmp_path / "x.safetensors"
    done = fork_server.run(write_more_than_fits, path)
    assert done.returncode == 0, done.stderr
    message, hint = done.stdout.strip().split(" | ")
    assert message == f"cannot write {path}.partial: {os.strerror(errno.EFBIG)}"
    assert "free some space" in hint
    assert contents(tmp_path) == {}
