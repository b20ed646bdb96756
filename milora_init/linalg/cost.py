"""What a solve costs: multiply-adds and memory, from sizes alone.

Pure functions of p and q (rows and columns of a weight stood upright, p >= q), r (wanted triplets) and the mode. They
serve the estimate of a run's time, the share of each weight in its progress, and the number of weights solved at once.
The constants were fitted to trained weights on a CPU; `svd` says which steps they stand for.
"""

from __future__ import annotations

from milora_init.methods import Mode

KRYLOV_MIN_COLUMNS = 512  # the smallest q for which a Krylov space is faster than all eigenvectors
_FLOAT64_BYTES = 8
_WORKSPACE_BYTES = 64 << 20


def uses_krylov(q: int, r: int, mode: Mode) -> bool:
    """Whether r triplets of q are sought in a Krylov space first, and not among all eigenvectors."""
    return mode in ("min", "max") and q >= KRYLOV_MIN_COLUMNS and r <= q // 8


def solve_flops(p: int, q: int, r: int, mode: Mode) -> int:
    """Estimate of the multiply-adds of one solve and of the residual."""
    rest = 4 * q * q * 12 * r if uses_krylov(q, r, mode) else 9 * q**3
    return round(1.3 * (0.8 * p * q * q + 0.4 * q**3 + rest + 500 * p * q))


def solve_memory_bytes(p: int, q: int, r: int, mode: Mode, stored_bytes: int) -> int:
    """Estimate of the bytes that one weight takes on a CPU while it is solved.

    stored_bytes is what the weight and its residual take as they are stored.
    """
    square = 1.5 * q + 16 * r if uses_krylov(q, r, mode) else 3 * q
    return round(stored_bytes + _FLOAT64_BYTES * q * square + 5 * (p + q) * r * _FLOAT64_BYTES + _WORKSPACE_BYTES)
