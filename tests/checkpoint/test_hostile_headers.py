"""Fuzz tests of header: every outcome is a valid header or a CheckpointError, in bounded time and memory."""

from __future__ import annotations

import math
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.raw_headers import entry, raw_file, write_file

from milora_init.checkpoint.header import SAFETENSORS_DTYPES, read_header
from milora_init.errors import CheckpointError

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def require_valid_or_refused(path: Path) -> bool:
    """Whether the header is valid. If it is, every tensor must be inside the file and have the size of its shape."""
    try:
        header = read_header(path)
    except CheckpointError:
        return False
    size = path.stat().st_size - len(header.raw)
    for info in header.tensors.values():
        assert 0 <= info.start <= info.end <= size
        assert info.size_bytes == math.prod(info.shape) * SAFETENSORS_DTYPES[info.dtype].itemsize
    return True


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_header_with_mutated_fields_is_valid_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"},
        "v": entry(),
        "w": entry("BF16", (3,), (24, 30)),
        "x": entry("I8", (), (30, 31)),
    }
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(["__metadata__", "v", "w", "x", "new"]))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "format", None]))
        value = data.draw(
            ANY_JSON | st.lists(st.integers(-1, 40), max_size=3) | st.sampled_from(list(SAFETENSORS_DTYPES))
        )
        if field is None or not isinstance(header.get(where), dict):
            header[where] = value
        else:
            header[where] = {**header[where], field: value}
    require_valid_or_refused(write_file(tmp_path / "x.safetensors", raw_file(header, bytes(31))))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    length=st.integers(0, 420),
)
def test_a_file_with_mutated_bytes_is_valid_or_refused(
    flips: list[tuple[int, int]], length: int, tmp_path: Path
) -> None:
    valid = raw_file({"v": entry(), "w": entry("BF16", (3,), (24, 30)), "x": entry("I8", (), (30, 31))}, bytes(31))
    content = bytearray(valid[:length])
    for position, value in flips:
        content[position % len(valid) : position % len(valid) + 1] = bytes([value])
    require_valid_or_refused(write_file(tmp_path / "x.safetensors", bytes(content)))


@pytest.mark.slow
def test_a_hundred_thousand_mutated_headers_are_valid_or_refused_in_bounded_time_and_memory(tmp_path: Path) -> None:
    """Bytes are changed, removed, doubled or replaced by JSON tokens, in headers and in their length field."""
    draw = random.Random(0)
    tensors = {f"model.layers.{i}.weight": entry("BF16", (3, i), (3 * i * (i - 1), 3 * i * (i + 1))) for i in range(5)}
    valid = [
        raw_file({"v": entry(), "w": entry("BF16", (3,), (24, 30)), "x": entry("I8", (), (30, 31))}, bytes(31)),
        raw_file({"__metadata__": {"format": "pt"}, **tensors}, bytes(120)),
        raw_file({}, b""),
    ]
    json_tokens = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"-",
        b"0",
        b"9" * 20,
        b"1e9",
        b"null",
        b"\\u0000",
        b"\xff",
        b"",
    ]
    accepted, slowest_s = 0, 0.0
    path = tmp_path / "x.safetensors"
    memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100_000):
        content = bytearray(draw.choice(valid))
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            at = draw.randrange(len(content) + 1)
            upto = min(at + draw.choice((0, 1, 1, 1, 8)), len(content))
            content[at:upto] = draw.choice((draw.choice(json_tokens), draw.randbytes(1), bytes(content[at:upto]) * 2))
        path.write_bytes(content)
        started = time.monotonic()
        accepted += require_valid_or_refused(path)
        slowest_s = max(slowest_s, time.monotonic() - started)
    assert 0 < accepted < 50_000  # some mutations have no effect, but most must be refused
    assert slowest_s < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kib < 64 << 10
