"""The limits of the Krylov methods, and the estimates of a solve."""

from __future__ import annotations

import pytest

from milora_init.linalg.cost import uses_krylov


@pytest.mark.parametrize(
    ("p", "q", "r", "expected"),
    [
        (512, 512, 16, True),
        (512, 512, 64, False),
        (1024, 1024, 64, True),
        (1024, 1024, 128, True),
        (2048, 512, 16, False),
        (3072, 768, 64, False),
        (4096, 1024, 16, True),
        (4096, 1024, 64, True),
        (4096, 1024, 128, False),
        (11008, 4096, 64, True),
        (4096, 4096, 513, False),
    ],
    ids=str,
)
def test_a_krylov_space_is_used_where_it_was_measured_to_be_faster(p: int, q: int, r: int, expected: bool) -> None:
    assert uses_krylov(p, q, r, "min") is expected


@pytest.mark.parametrize("mode", ["mid", "random"])
def test_interior_triplets_take_all_eigenvectors(mode: str) -> None:
    assert not uses_krylov(4096, 4096, 8, mode, gpu=True)  # type: ignore[arg-type]
