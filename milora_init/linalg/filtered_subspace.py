"""The r largest eigenpairs of a symmetric positive semi-definite operator, by filtered subspace iteration in float32.

A block of columns is multiplied by polynomials of the operator, which are small on the unwanted part of the spectrum
and large on the wanted one: Chebyshev polynomials, whose interval a first projection places. It takes more products
than a Krylov space (lanczos.py) and less of everything else: few calls, one wait of the host, no large eigenproblem.
That suits a GPU.

Source: Y. Zhou, Y. Saad, M. Tiago and J. Chelikowsky (2006), https://doi.org/10.1016/j.jcp.2006.03.017.
"""

from __future__ import annotations

import math

import torch

from milora_init.linalg.arithmetic import DeviceArithmetic
from milora_init.linalg.blocked_matrix import Operator
from milora_init.linalg.certificate import NotConverged
from milora_init.linalg.lanczos import PROBE_COLUMNS, RitzPairs, complement_projection

_GUARD = 64  # columns beyond the wanted ones
_FIRST_STEPS = 3
_AMPLIFICATION = 1e6  # of the wanted part over the unwanted one
_SPREAD = 1e5  # the most by which a polynomial may differ over the wanted part: float32 has seven digits
_MOST_DEGREE = 4  # of one polynomial
_MOST_PRODUCTS = 32


def filtered_eigenpairs(
    apply: Operator, q: int, r: int, *, arithmetic: DeviceArithmetic, device: torch.device
) -> RitzPairs:
    """A space of the r largest eigenpairs of the operator `apply` (q, q), and 64 more.

    Args:
        apply: On a float32 block (q, b) on `device`.
        q: The size of the operator.
        r: How many eigenpairs.
        arithmetic: Normalises the blocks.
        device: Of the block. It is drawn on the CPU, the same for every device.

    Returns:
        Ritz pairs whose values are rough, and whose vectors span the space, in no order.

    Raises:
        NotConverged: The projected operator is not finite.
    """
    columns = r + _GUARD
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(q, columns + PROBE_COLUMNS, generator=generator).to(device)
    block = start[:, :columns]
    for _ in range(_FIRST_STEPS):
        block = arithmetic.normalise(apply(block))
    image = apply(block)
    projected = (block.mT @ image).cpu().to(torch.float64)
    if not bool(projected.isfinite().all()):
        raise NotConverged("the operator is not finite in float32")
    values = torch.linalg.eigvalsh((projected + projected.mT) / 2).flip(0)
    largest, wanted = float(values[0]), float(values[r - 1])
    cut = max(float(values[-1]), 1e-7 * largest, 1e-30)
    roots, repeats = _filter(largest, wanted, cut)
    for repeat in range(repeats):
        for number, root in enumerate(roots):
            if repeat or number:
                image = apply(block)
            block = torch.add(block, image, alpha=-1 / root)
        block = arithmetic.normalise(block)
    basis, _ = arithmetic.orthonormalise(block.to(torch.float64), condition=1e7)
    probe = complement_projection(apply, basis.to(torch.float32), start[:, columns:], arithmetic)
    steps = _FIRST_STEPS + repeats * len(roots)
    return RitzPairs(values, basis, float(values[r]), probe, steps)


def _filter(largest: float, wanted: float, cut: float) -> tuple[list[float], int]:
    """The roots of a Chebyshev polynomial on [0, cut], and how often it is applied."""
    spread = max(largest / max(wanted, cut), 1 + 1e-6)
    degree = max(1, min(_MOST_DEGREE, int(math.log(_SPREAD) / math.log(spread))))
    roots = [cut / 2 * (1 + math.cos((2 * number + 1) * math.pi / (2 * degree))) for number in range(degree)]
    growth = math.cosh(degree * math.acosh(max(2 * wanted / cut - 1, 1.0)))
    most = _MOST_PRODUCTS // degree
    repeats = math.ceil(math.log(_AMPLIFICATION) / math.log(growth)) if growth > 1 else most
    return roots, min(repeats, most)
