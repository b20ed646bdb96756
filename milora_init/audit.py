"""An output against its source, tensor by tensor: what was copied, what was split, and whether the right part left.

Nothing here asks the program that wrote the output. A residual must lie within half a unit in the last place of
source - scale * B @ A, and the component is compared with one solved anew from the source. One tensor of each side is
held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_init import adapter
from milora_init.certificate import EPS
from milora_init.checkpoint import Checkpoint, PickleShard, SafetensorsShard, open_shard
from milora_init.manifest import Manifest, WeightRecord
from milora_init.plan import own_seed
from milora_init.svd import singular_triplets

EPS32 = torch.finfo(torch.float32).eps
_BLOCK_ELEMENTS = 1 << 20
_SAMPLE = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be: where, what, and what repairs it."""

    where: str
    what: str
    hint: str


class Reader:
    """Tensors of a checkpoint by name, with the file of the last one kept open."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._homes = {name: file for file, header in checkpoint.headers.items() for name in header.tensors}
        self._shard: SafetensorsShard | PickleShard | None = None

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own. Raises CheckpointError."""
        path = self._folder / self._homes[name]
        if self._shard is None or self._shard.path != path:
            self.close()
            self._shard = open_shard(path)
        return self._shard.read(name)

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


@contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[Reader]:
    reader = Reader(checkpoint)
    try:
        yield reader
    finally:
        reader.close()


def scale_of(config: dict[str, Any] | Any, rank: int) -> float:
    """What PEFT multiplies a module's B @ A with, under an adapter_config without patterns."""
    alpha = float(config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def against(
    base: Checkpoint, lora: Path, source: Checkpoint, manifest: Manifest, *, every: bool
) -> Iterator[Difference]:
    """Judge a residual base and its adapter by the source. `every` solves all components anew, not a sample.

    Raises:
        CheckpointError: A file that cannot be read.
    """
    wrong_source = f"name the model it was made from: --against {manifest.source['model']}"
    if dict(source.digest) != manifest.inputs["source"]:
        what = "not the files that the output was made from: another model, or another commit"
        yield Difference(str(source.folder), what, wrong_source)
    for name in sorted(base.tensors.keys() ^ source.tensors.keys()):
        where = "the source" if name in base.tensors else "the output"
        yield Difference(name, f"{where} has no such tensor", wrong_source)
    split = {record.tensor: record for record in manifest.weights}
    sample = set(split) if every else set(_spread(list(split)))
    factors = SafetensorsShard(lora)
    try:
        with reading(base) as written, reading(source) as original:
            for name in (name for name in base.tensors if name in source.tensors):
                before, after = original.read(name), written.read(name)
                if name not in split:
                    if not _same_bytes(before, after):
                        yield Difference(name, "not adapted, yet not the source's bytes", "make the output again")
                    continue
                record = split[name]
                keys = [adapter.lora_key(record.module, factor) for factor in "BA"]
                if missing := [key for key in keys if key not in factors.header.tensors]:
                    yield Difference(missing[0], "not in the adapter", "make the output again")
                    continue
                B, A = (factors.read(key) for key in keys)
                yield from _judge(before, after, B, A, record, manifest, solve=name in sample)
    finally:
        factors.close()


def _judge(
    W: Tensor, R: Tensor, B: Tensor, A: Tensor, record: WeightRecord, manifest: Manifest, *, solve: bool
) -> Iterator[Difference]:
    if manifest.adapter["fan_in_fan_out"]:
        W, R = W.mT, R.mT
    wanted = ((record.shape, record.shape), ((record.shape[0], record.rank), (record.rank, record.shape[1])))
    found = ((tuple(W.shape), tuple(R.shape)), (tuple(B.shape), tuple(A.shape)))
    if found != wanted:
        what = f"shapes of source and residual, B and A are {found}, recorded are {wanted}"
        yield Difference(record.tensor, what, "make the output again")
        return
    scale = scale_of(manifest.adapter, record.rank)
    off = residual_error(W, R, B, A, scale)
    if not off <= 1:
        what = f"the residual is off from source - scale * B @ A by {off / 2:.3g} units in the last place"
        yield Difference(record.tensor, what, "base, adapter and source are not of one run: make the output again")
    if solve:
        error, allowed = component_error(W, B, A, scale, record, manifest)
        if not error <= allowed:
            what = f"scale * B @ A is off from the `{manifest.inputs['mode']}` component by {error:.1e} (relative)"
            yield Difference(record.module, what, "the adapter is not of this model: make the output again")


def residual_error(W: Tensor, R: Tensor, B: Tensor, A: Tensor, scale: float) -> float:
    """The largest |W - scale * B @ A - R| in half units in the last place of R's dtype; at most 1 when rounded once."""
    finfo = torch.finfo(R.dtype)
    B64, A64 = B.double(), scale * A.double()
    # Of the float64 product and difference, which whoever wrote the residual may have summed in another order.
    noise = EPS * (8 * float(W.abs().max()) + A.shape[0] * float(B64.abs().max()) * float(A64.abs().max()))
    worst = 0.0
    rows = max(1, _BLOCK_ELEMENTS // W.shape[1])
    for top in range(0, W.shape[0], rows):
        block = slice(top, top + rows)
        exact = W[block].double() - B64[block] @ A64
        exponent = torch.frexp(exact).exponent
        half_ulp = torch.ldexp(torch.full_like(exact, finfo.eps / 4), exponent)
        half_ulp.clamp_(min=finfo.smallest_normal * finfo.eps / 2)
        off = ((exact - R[block].double()).abs() - noise).clamp_(min=0) / half_ulp
        worst = max(worst, float(torch.nan_to_num(off, nan=math.inf).max()))
    return worst


def component_error(
    W: Tensor, B: Tensor, A: Tensor, scale: float, record: WeightRecord, manifest: Manifest
) -> tuple[float, float]:
    """How far scale * B @ A is from the component, solved anew, and how far it may be; both relative to it.

    Where the cut falls in a cluster the component is not unique. Then what must agree is the singular values, and
    the stored directions must be singular for W; both relative to W's largest singular value.
    """
    mode, seed = manifest.inputs["mode"], own_seed(manifest.inputs["seed"], record.tensor)
    truth = singular_triplets(W, record.rank, mode=mode, seed=seed)
    s, s_max = truth.s, max(truth.s_max, 1e-300)
    left, right = scale * B.double(), A.double()
    lengths = right.norm(dim=1)
    unit = (right / lengths.clamp_min(1e-300)[:, None]).mT
    missed, strayed = 0.0, 0.0
    rows = max(1, _BLOCK_ELEMENTS // W.shape[1])
    for top in range(0, W.shape[0], rows):
        block = slice(top, top + rows)
        D = (truth.U[block] * s) @ truth.V.mT
        missed += float((left[block] @ right - D).square().sum())
        strayed += float((W[block].double() @ unit - left[block] * lengths).square().sum())
    certified = truth.certificate.component_error
    if certified < 1e-3:
        norm = max(float(s.norm()), min(W.shape) * EPS * s_max * math.sqrt(record.rank))
        rounding = EPS32 * math.sqrt(float(s.sum() * s.max())) / norm
        return math.sqrt(missed) / norm, 4 * rounding + 1e-6 + 2 * certified
    values = (left.norm(dim=0) * lengths).sort(descending=True).values - s
    # A direction in float32 is off by eps, and W stretches that by up to s_max.
    return (float(values.norm()) + math.sqrt(strayed)) / s_max, 8 * EPS32 * math.sqrt(record.rank)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _spread(names: list[str]) -> list[str]:
    """A few names, evenly spread: the same ones on every run."""
    last = len(names) - 1
    return [names[round(last * i / (_SAMPLE - 1))] for i in range(_SAMPLE)]
