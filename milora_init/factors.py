"""The factors of one weight after another, out of an adapter's file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from milora_init.checkpoint import SafetensorsShard
from milora_init.layout import Expert, cut, factor_shapes, lora_key
from milora_init.manifest import WeightRecord


class Placed(Protocol):
    """A weight and where its factors are: a WeightRecord, or what is known of one without a manifest."""

    @property
    def module(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def rank(self) -> int: ...
    @property
    def expert(self) -> Expert | None: ...
    @property
    def untrainable(self) -> int: ...


class FactorReader:
    """An adapter's file, open. The tensors read last are kept: the experts of a layer share theirs."""

    def __init__(self, path: Path) -> None:
        self._shard = SafetensorsShard(path)
        self.header = self._shard.header
        self._key = ""
        self._tensors: tuple[Tensor, Tensor] | None = None

    def read(self, record: Placed) -> tuple[Tensor, Tensor]:
        """B (m, R) and A (R, n) of a weight (m, n), as `layout.cut` gives them. Raises CheckpointError."""
        if self._tensors is None or self._key != record.key:
            A, B = (self._shard.read(lora_key(record.key, factor)) for factor in "AB")
            self._key, self._tensors = record.key, (A, B)
        return cut(*self._tensors, record.shape[0], record.expert)

    def close(self) -> None:
        self._shard.close()


@contextmanager
def reading_factors(path: Path) -> Iterator[FactorReader]:
    """Open an adapter's file for a while. Raises CheckpointError."""
    reader = FactorReader(path)
    try:
        yield reader
    finally:
        reader.close()


def wanted_tensors(records: tuple[WeightRecord, ...]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the adapter that these weights' factors make up."""
    wanted: dict[str, tuple[int, ...]] = {}
    for record in records:
        for factor, shape in zip("AB", factor_shapes(record.rank, record.shape, record.expert), strict=True):
            wanted[lora_key(record.key, factor)] = shape
    return wanted
