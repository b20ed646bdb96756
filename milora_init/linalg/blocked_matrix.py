"""A weight as the solver reads it: in float64, scaled by a power of two, one block of rows at a time.

On a GPU it may be a batch of equal weights, (b, p, q): every product then has this first dimension too.

No float64 copy of the whole weight is held, so memory is bounded whatever the number of rows. The upcast from bfloat16,
float16 or float32 is exact, and so is a scaling by a power of two.

Cost: p q^2 operations for the Gram matrix, of which nearly half are saved by its symmetry; 2 p q for each column of a
product. Every product reads the weight once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import PRODUCT_COLUMNS, DeviceArithmetic, add_product

Operator = Callable[[Tensor], Tensor]
"""A symmetric (q, q) matrix as a function: it multiplies a block of columns (q, b)."""


@dataclass(frozen=True, slots=True)
class BlockedMatrix:
    """The matrix X = stored * 2^-exponent (p, q), p >= q, in float64; or a batch of such matrices.

    Attributes:
        stored: The weight or its transpose (p, q), in the dtype and on the device where it lies; or (b, p, q).
        exponent: Of the power of two that is divided out.
        arithmetic: Chooses the block sizes.
    """

    stored: Tensor
    exponent: int
    arithmetic: DeviceArithmetic

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        p, q = self.stored.shape[-2:]
        return p, q

    @property
    def batch(self) -> tuple[int, ...]:
        """(b,), or () for one matrix."""
        return tuple(self.stored.shape[:-2])

    def blocks(self, most_rows: int = 1 << 60) -> Iterator[tuple[slice, Tensor]]:
        """Each block of rows: which rows, and the block (rows, q) in float64. The next block takes its memory."""
        p, q = self.shape
        step = max(1, min(most_rows, self._rows_in_a_block(8 * q)))
        memory: Tensor | None = None  # new memory for each block would take longer than the conversion
        for start in range(0, p, step):
            rows = slice(start, min(p, start + step))
            if memory is None:
                memory = block = self._convert(rows, torch.float64)
            else:
                block = memory[..., : rows.stop - start, :].copy_(self.stored[..., rows, :])
            if self.exponent:
                # Two factors, because 2^1074 is not a float64.
                half = self.exponent // 2
                block.mul_(math.ldexp(1.0, -half)).mul_(math.ldexp(1.0, half - self.exponent))
            yield rows, block

    def float32_blocks(self) -> Iterator[Tensor]:
        """Each block of rows (rows, q), rounded to float32 where that is shorter than the weight's dtype."""
        p, q = self.shape
        if self.exponent:
            for _, block in self.blocks(self.arithmetic.float32_rows):
                yield block.to(torch.float32)
            return
        step = max(1, min(self.arithmetic.float32_rows, self._rows_in_a_block(4 * q)))
        for start in range(0, p, step):
            yield self._convert(slice(start, min(p, start + step)), torch.float32)

    def _rows_in_a_block(self, row_bytes: int) -> int:
        return self.arithmetic.row_block_bytes // (row_bytes * math.prod(self.batch))

    def _convert(self, rows: slice, dtype: torch.dtype) -> Tensor:
        block = self.stored[..., rows, :]
        if block.stride(-2) < block.stride(-1):  # the transpose of a wide weight: convert in the order of its memory
            return block.mT.to(dtype, copy=True).mT
        return block.to(dtype, copy=True)

    def times(self, V: Tensor) -> Tensor:
        """X V (p, k) for V (q, k)."""
        padded = self._pad(V)
        images = [(block @ padded)[..., : V.shape[-1]] for _, block in self.blocks()]
        return _stacked(images).contiguous()

    def transposed_times(self, U: Tensor) -> Tensor:
        """X^T U (q, k) for U (p, k)."""
        padded = self._pad(U)
        out: Tensor | None = None  # transposed: the block is faster as the second factor
        for rows, block in self.blocks():
            part = padded[..., rows, :].mT
            out = part @ block if out is None else add_product(out, part, block)
        assert out is not None
        return out[..., : U.shape[-1], :].mT.contiguous()

    def times_and_back(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """X V (p, k) and X^T X V (q, k) for V (q, k), reading X once."""
        padded = self._pad(V)
        images: list[Tensor] = []
        back: Tensor | None = None
        for _, block in self.blocks():
            images.append(block @ padded)
            back = block.mT @ images[-1] if back is None else add_product(back, block.mT, images[-1])
        assert back is not None
        k = V.shape[-1]
        return _stacked(images)[..., :k], back[..., :k]

    def _pad(self, V: Tensor) -> Tensor:
        """V (q, k) with zero columns up to a multiple of what the device multiplies at a time."""
        missing = -V.shape[-1] % self.arithmetic.product_columns
        return torch.nn.functional.pad(V, (0, missing)) if missing else V

    def to_float64(self) -> Tensor:
        """X itself (p, q), all of it."""
        out = torch.empty(self.stored.shape, dtype=torch.float64, device=self.stored.device)
        for rows, block in self.blocks():
            out[..., rows, :] = block
        return out

    def gram_operator(self, columns: int) -> Operator:
        """V -> X^T X V, for about so many columns altogether.

        The Gram matrix is computed where that costs less. Otherwise X is held in float64 where it takes no more than
        3 q^2 numbers.
        """
        p, q = self.shape
        if 0.28 * q < columns * (1 - q / (2 * p)) and p >= 2 * q:
            G = self.gram().tril_()
            G += G.tril(-1).mT
            return lambda V: G @ V
        if p <= 3 * q:
            full = self.to_float64()
            return lambda V: full.mT @ (full @ V)

        def apply(V: Tensor) -> Tensor:
            out = torch.zeros_like(V)
            for _, block in self.blocks():
                out.addmm_(block.mT, block @ V)
            return out

        return apply

    def float32_gram_operator(self, columns: int) -> Operator:
        """The same in float32. Where the Gram matrix costs more, X is held in float32."""
        p, q = self.shape
        if 0.28 * q < columns * (1 - q / (2 * p)) and p >= 2 * q:
            G = self.float32_gram().tril_()
            G += G.tril(-1).mT
            return lambda V: G @ V
        blocks = list(self.float32_blocks())

        def apply(V: Tensor) -> Tensor:
            # The image lies row by row, and so its transpose is fast as the first factor.
            out = torch.zeros(V.shape[1], q, dtype=V.dtype, device=V.device)
            for block in blocks:
                out.addmm_((block @ V).mT, block)
            return out.mT

        return apply

    def gram(self) -> Tensor:
        """The lower triangle of the Gram matrix X^T X (q, q); the entries above it have no meaning."""
        q = self.shape[1]
        G = torch.zeros(q, q, dtype=torch.float64, device=self.stored.device)
        for _, block in self.blocks():
            _add_gram(G, block, self.arithmetic.gram_columns)
        return G

    def float32_gram(self) -> Tensor:
        """The same in float32."""
        return gram_of_blocks(self.float32_blocks(), self.shape[1], self.arithmetic)


def gram_of_blocks(blocks: Iterable[Tensor], q: int, arithmetic: DeviceArithmetic) -> Tensor:
    """The lower triangle of the Gram matrix (q, q) of float32 blocks of rows (rows, q), of which there is one at least.

    What lies above it has no meaning.
    """
    G: Tensor | None = None
    for block in blocks:
        G = block.new_zeros(*block.shape[:-2], q, q) if G is None else G
        _add_gram(G, block, arithmetic.gram_columns)
    assert G is not None
    return G


def _add_gram(G: Tensor, block: Tensor, whole_columns: int) -> None:
    """Add block^T block to the lower triangle of G (q, q), for block (rows, q).

    The columns are halved until no more than `whole_columns` are left: nearly all the work is in large products.
    """
    q = G.shape[-1]
    if q <= whole_columns:
        add_product(G, block.mT, block)
        return
    half = -(-q // (2 * PRODUCT_COLUMNS)) * PRODUCT_COLUMNS
    left, right = block[..., :half], block[..., half:]
    _add_gram(G[..., :half, :half], left, whole_columns)
    _add_gram(G[..., half:, half:], right, whole_columns)
    add_product(G[..., half:, :half], right.mT, left)


def _stacked(blocks: list[Tensor]) -> Tensor:
    """Blocks of rows (rows, k) as one matrix; a single one is not copied."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)
