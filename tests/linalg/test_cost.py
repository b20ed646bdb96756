"""The limits of the Krylov methods, and the estimates of a solve."""

from __future__ import annotations

import pytest

from milora_init.linalg.cost import uses_krylov
from milora_init.methods import Mode


@pytest.mark.parametrize(
    ("p", "q", "r", "mode", "expected"),
    [
        (512, 512, 16, "min", True),
        (512, 512, 64, "min", False),
        (1024, 1024, 64, "min", True),
        (2048, 512, 16, "min", False),
        (3072, 768, 64, "min", False),
        (4096, 1024, 16, "min", True),
        (4096, 1024, 64, "min", False),
        (4096, 1024, 128, "min", False),
        (2048, 1408, 128, "min", True),
        (11008, 4096, 64, "min", True),
        (4096, 4096, 513, "min", False),
        (512, 512, 16, "max", True),
        (512, 512, 64, "max", False),
        (1024, 1024, 64, "max", True),
        (2048, 768, 16, "max", True),
        (2048, 768, 64, "max", False),
        (4096, 1024, 128, "max", False),
        (2048, 1408, 64, "max", True),
    ],
    ids=str,
)
def test_a_krylov_space_is_used_where_it_was_measured_to_be_faster(
    p: int, q: int, r: int, mode: Mode, expected: bool
) -> None:
    assert uses_krylov(p, q, r, mode) is expected


@pytest.mark.parametrize("mode", ["mid", "random"])
def test_interior_triplets_take_all_eigenvectors(mode: str) -> None:
    assert not uses_krylov(4096, 4096, 8, mode, gpu=True)  # type: ignore[arg-type]
