"""The r largest eigenpairs of a symmetric positive semi-definite operator, by filtered subspace iteration in float32.

A block of columns is multiplied by polynomials of the operator, which are small on the unwanted part of the spectrum
and large on the wanted one: Chebyshev polynomials, whose interval a first projection places. It takes more products
than a Krylov space (lanczos.py) and less of everything else: few calls, one wait of the host, no large eigenproblem.
That suits a GPU, and a batch of equal operators, which all get the same number of products.

Source: Y. Zhou, Y. Saad, M. Tiago and J. Chelikowsky (2006), https://doi.org/10.1016/j.jcp.2006.03.017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic
from milora_init.linalg.blocked_matrix import Operator
from milora_init.linalg.certificate import NotConverged
from milora_init.linalg.lanczos import PROBE_COLUMNS, complement_projection

_FIRST_STEPS = 3
_AMPLIFICATION = 1e9  # of the wanted part over the unwanted one: the columns next to the wanted ones are then good too
_SPREAD = 1e5  # the most by which a polynomial may differ over the wanted part: float32 has seven digits
_MOST_DEGREE = 4  # of one polynomial
_MOST_PRODUCTS = 32


@dataclass(frozen=True, slots=True)
class FilteredSpace:
    """A space that contains the wanted eigenvectors of each operator (q, q) of a batch, nearly.

    Attributes:
        vectors: (..., q, k) with k > r, an orthonormal basis in float64; NaN for an operator that is not finite.
        probe: The operators projected on a block of the complement, (..., b, b).
        products: How often the operators were applied.
    """

    vectors: Tensor
    probe: Tensor
    products: int


def filtered_space(
    apply: Operator,
    q: int,
    r: int,
    *,
    arithmetic: DeviceArithmetic,
    device: torch.device,
    batch: Sequence[int] = (),
) -> FilteredSpace:
    """A space of the r largest eigenpairs of the operators `apply` (..., q, q), and of some more.

    Args:
        apply: On a float32 block (..., q, b) on `device`.
        q: The size of an operator.
        r: How many eigenpairs.
        arithmetic: Normalises the blocks.
        device: Of the block. It is drawn on the CPU, the same for every device.
        batch: The sizes of the dimensions before q.

    Raises:
        NotConverged: No operator is finite.
    """
    columns = r + 64 + r // 2  # the more beyond the wanted ones, the fewer products and corrections
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(q, columns + PROBE_COLUMNS, generator=generator).to(device)
    start = start.expand(*batch, *start.shape)
    block = start[..., :columns]
    for _ in range(_FIRST_STEPS):
        block = arithmetic.normalise(apply(block))
    image = apply(block)
    projected = (block.mT @ image).cpu().to(torch.float64)
    finite = projected.isfinite().flatten(-2).all(dim=-1)
    if not bool(finite.any()):
        raise NotConverged("the operator is not finite in float32")
    projected[~finite] = projected[finite][0]  # whatever becomes of a broken one, it must not change the others
    values = torch.linalg.eigvalsh((projected + projected.mT) / 2).flip(-1)
    roots, repeats = _filter(values[..., 0], values[..., r - 1], values[..., -1])
    factors = (-1 / roots).to(device, torch.float32)[..., None, None].unbind()
    for repeat in range(repeats):
        for number, factor in enumerate(factors):
            if repeat or number:
                image = apply(block)
            block = torch.addcmul(block, image, factor)
        block = arithmetic.normalise(block)
    basis, _ = arithmetic.orthonormalise(block.to(torch.float64), condition=1e7)
    probe = complement_projection(apply, basis.to(torch.float32), start[..., columns:], arithmetic)
    return FilteredSpace(basis, probe, _FIRST_STEPS + repeats * len(factors))


def _filter(largest: Tensor, wanted: Tensor, smallest: Tensor) -> tuple[Tensor, int]:
    """The roots (degree, ...) of a Chebyshev polynomial for each operator, and how often it is applied.

    Args:
        largest: The largest Ritz value of each operator (...).
        wanted: The last wanted one.
        smallest: The last one; the polynomial is small between 0 and this.
    """
    cut = torch.maximum(smallest, 1e-7 * largest).clamp_min(1e-30)
    spread = (largest / torch.maximum(wanted, cut)).clamp_min(1 + 1e-6)
    degree = max(1, min(_MOST_DEGREE, int((math.log(_SPREAD) / spread.log()).min())))
    angles = (2 * torch.arange(degree, dtype=cut.dtype) + 1) * (math.pi / (2 * degree))
    roots = torch.stack([cut / 2 * (1 + cosine) for cosine in angles.cos()])
    growth = degree * (2 * wanted / cut - 1).clamp_min(1.0).acosh()  # of one polynomial, as a logarithm to base e
    growth += torch.log1p((-2 * growth).exp()) - math.log(2)  # cosh, which no large argument overflows
    most = _MOST_PRODUCTS // degree
    slowest = float(growth.min())
    repeats = math.ceil(math.log(_AMPLIFICATION) / slowest) if slowest > 0 else most
    return roots, min(repeats, most)
