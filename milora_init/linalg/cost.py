"""What a solve costs: multiply-adds and memory, from sizes alone.

Pure functions of p and q (rows and columns of a weight stood upright, p >= q), r (wanted triplets) and the mode. They
serve the estimate of a run's time, the share of each weight in its progress, and the number of weights solved at once.
The constants were fitted to trained weights on a CPU; `svd` says which steps they stand for.
"""

from __future__ import annotations

from milora_init.methods import Mode

FLOAT32_ENTRIES = 1 << 21  # 1448 x 1448: in a larger weight a CPU seeks the smallest triplets in float32 first
MOST_AT_ONCE = 8  # weights of one batch
_SMALL = 2048  # rows or columns, whichever are fewer: a larger weight keeps a GPU busy alone
_BATCH_ENTRIES = 1 << 25  # 256 MiB in float64
_FLOAT64_BYTES = 8
_WORKSPACE_BYTES = 64 << 20


def uses_krylov(p: int, q: int, r: int, mode: Mode, *, gpu: bool = False) -> bool:
    """Whether r triplets of q are sought in a Krylov space first, and not among all eigenvectors.

    On a CPU, where both were measured (torch 2.13 with MKL, one thread, q from 512 to 1408, r from 16 to 128, with a
    moderate and a strong head), the crossing depends on r and on whether the weight is square: at the small end the
    spectrum of a rectangular one takes more steps. At the large end the strength of the head decides as much: the
    limits are between the two.
    """
    if mode not in ("min", "max") or r > q // 8:
        return False
    if gpu:
        return q >= 512
    rectangular = 4 * p > 5 * q
    if mode == "max":
        return q >= 370 + 7 * r + 150 * rectangular
    return q >= (750 + 4.5 * r if rectangular else 350 + 6 * r)


def weights_at_once(p: int, q: int, r: int, mode: Mode) -> int:
    """How many equal weights a GPU solves in one batch; 1 where each is solved alone.

    A small weight takes hundreds of calls that are shorter than their start. It depends on sizes alone, so that the
    same weights are always solved together: alone, a weight may get other last bits.
    """
    if q > _SMALL or not uses_krylov(p, q, r, mode, gpu=True):
        return 1
    return max(1, min(MOST_AT_ONCE, _BATCH_ENTRIES // (p * q)))


def solve_flops(p: int, q: int, r: int, mode: Mode) -> int:
    """Estimate of the multiply-adds of one solve and of the residual."""
    krylov = uses_krylov(p, q, r, mode)
    rest = 4 * q * q * 12 * r if krylov else 9 * q**3
    factor = 1.0 if krylov and mode == "min" and p * q > FLOAT32_ENTRIES else 1.3  # float32 work counts for less
    return round(factor * (0.8 * p * q * q + 0.4 * q**3 + rest + 500 * p * q))


def solve_memory_bytes(p: int, q: int, r: int, mode: Mode, stored_bytes: int) -> int:
    """Estimate of the bytes that one weight takes on a CPU while it is solved.

    stored_bytes is what the weight and its residual take as they are stored.
    """
    square = 1.5 * q + 16 * r if uses_krylov(p, q, r, mode) else 3 * q
    return round(stored_bytes + _FLOAT64_BYTES * q * square + 5 * (p + q) * r * _FLOAT64_BYTES + _WORKSPACE_BYTES)
