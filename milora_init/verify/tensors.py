"""Compare an output with the original model, tensor by tensor.

This file does not use what the program recorded about its own results. A residual must lie within half a unit in the
last place of W - scale * B @ A, and the component is compared with one that is solved again from the original. One
tensor of each side is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.tensor_file import PickleShard, SafetensorsShard, TensorSource, open_shard
from milora_init.linalg.certificate import EPS
from milora_init.linalg.svd import singular_triplets
from milora_init.lora.folder import open_factors
from milora_init.lora.tensor_layout import initial_block
from milora_init.manifest import Manifest, WeightRecord
from milora_init.model.adaptable import Adaptable, ModelStructure
from milora_init.plan.weights import own_seed

OTHER_SOURCE = "not the files that the output was made from: another model, or another commit"
EPS32 = torch.finfo(torch.float32).eps
_BLOCK_ELEMENTS = 1 << 20
_SAMPLE = 3
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of a float that takes so many bytes


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be: where, what, and what repairs it."""

    where: str
    what: str
    hint: str


def misrecorded(base: Checkpoint, manifest: Manifest, structure: ModelStructure | None) -> Iterator[Difference]:
    """Weights of the manifest that the base, or the model that its config.json builds, has otherwise or not at all."""
    hint = "put milora_init.json back from where the output was made"
    model: dict[str, Adaptable] = {}
    if structure:
        model = {w.module: w for w in (*structure.adaptable.values(), *chain(*structure.experts.values()))}
    for record in manifest.weights:
        info = base.tensors.get(record.tensor)
        stored = record.shape[::-1] if record.transposed else record.shape
        if info is None:
            yield Difference(record.module, f"lies in {record.tensor}, which the base has not", hint)
            continue
        matrix = info.shape if record.row is None else info.shape[1:]
        if matrix != stored or (record.row or 0) >= info.shape[0] or torch_name(info.dtype) != record.dtype:
            what = f"is {record.dtype} {list(stored)} by the manifest, {record.tensor} is {torch_name(info.dtype)}"
            yield Difference(record.module, f"{what} {list(info.shape)}", hint)
        if record.module in model:
            for name in ("tensor", "transposed", "row", "expert"):
                recorded, right = getattr(record, name), getattr(model[record.module], name)
                if recorded != right:
                    yield Difference(
                        record.module, f"has {name} {recorded} by the manifest, {right} in the model", hint
                    )


class TensorReader:
    """Tensors of a checkpoint by name, with the file of the last one kept open."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._homes = {name: file for file, header in checkpoint.headers.items() for name in header.tensors}
        self._shard: SafetensorsShard | PickleShard | None = None

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own. Raises CheckpointError."""
        return self._home(name).read(name)

    def locate(self, name: str) -> TensorSource:
        """Where a tensor can be read, or one entry of its first dimension. Raises CheckpointError."""
        return self._home(name).locate(name)

    def _home(self, name: str) -> SafetensorsShard | PickleShard:
        path = self._folder / self._homes[name]
        if self._shard is None or self._shard.path != path:
            self.close()
            self._shard = open_shard(path)
        return self._shard

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


@contextmanager
def open_tensors(checkpoint: Checkpoint) -> Iterator[TensorReader]:
    reader = TensorReader(checkpoint)
    try:
        yield reader
    finally:
        reader.close()


def compare_with_model(
    base: Checkpoint, lora: Path, source: Checkpoint, manifest: Manifest, *, every: bool
) -> Iterator[Difference]:
    """Judge a residual base and its adapter by the source. `every` solves all components anew, not a sample.

    Of a source in other files all tensors may be right; else the first that is not ends the inspection.

    Raises:
        CheckpointError: A file that cannot be read.
    """
    wrong_source = f"name the model it was made from: --against {manifest.source['model']}"
    found = _compared(base, lora, source, manifest, wrong_source, every=every)
    if not source.has_weights(manifest.inputs["source"]):
        yield Difference(str(source.folder), OTHER_SOURCE, wrong_source)
        found = islice(found, 1)
    yield from found


def _compared(
    base: Checkpoint, lora: Path, source: Checkpoint, manifest: Manifest, wrong_source: str, *, every: bool
) -> Iterator[Difference]:
    side_files = {"config.json": manifest.inputs["source"]["config.json"], **manifest.inputs["side_files"]}
    for name, recorded in side_files.items():
        path = source.folder / name  # a name that the manifest was read with
        if not path.is_file() or sha256(path) != recorded:
            yield Difference(str(path), "not the file that the output was made from", wrong_source)
    for name in sorted(base.tensors.keys() ^ source.tensors.keys()):
        where = "the source" if name in base.tensors else "the output"
        yield Difference(name, f"{where} has no such tensor", wrong_source)
    split: dict[str, list[WeightRecord]] = {}
    for record in manifest.weights:
        split.setdefault(record.tensor, []).append(record)
    modules = [record.module for record in manifest.weights]
    sample = set(modules if every else _spread(modules))
    with open_tensors(base) as written, open_tensors(source) as original, open_factors(lora) as factors:
        for name in (name for name in base.tensors if name in source.tensors):
            before, after = original.read(name), written.read(name)
            if name not in split and not _same_bytes(before, after):
                yield Difference(name, "not adapted, yet not the source's bytes", "make the output again")
            if before.shape != after.shape:
                what = f"{list(before.shape)} in the source, {list(after.shape)} in the output"
                yield Difference(name, what, wrong_source)
                continue
            for record in split.get(name, ()):
                W, R = (tensor if record.row is None else tensor[record.row] for tensor in (before, after))
                if record.transposed:
                    W, R = W.mT, R.mT
                B, A = factors.read(record)
                yield from _judge(W, R, B, A, record, manifest, solve=record.module in sample)


def count_bit_equal(merged: Checkpoint, source: Checkpoint, manifest: Manifest) -> int:
    """How many entries of the adapted weights are, after a merge, to the bit what they were in the source.

    Raises:
        CheckpointError: A tensor that cannot be read.
    """
    count = 0
    with open_tensors(merged) as after, open_tensors(source) as before:
        for record in manifest.weights:
            places = (reader.locate(record.tensor) for reader in (after, before))
            if record.row is not None:
                places = (place.at(record.row) for place in places)
            one, other = (place.read() for place in places)
            bits = _BITS[one.itemsize]
            count += one.numel() - int((one.view(bits) != other.view(bits)).count_nonzero())
    return count


def _judge(
    W: Tensor, R: Tensor, B: Tensor, A: Tensor, record: WeightRecord, manifest: Manifest, *, solve: bool
) -> Iterator[Difference]:
    if not tuple(W.shape) == tuple(R.shape) == record.shape:
        what = f"source and residual are {list(W.shape)} and {list(R.shape)}, recorded is {list(record.shape)}"
        yield Difference(record.tensor, what, "make the output again")
        return
    scale = record.scale
    off = residual_error(W, R, B, A, scale)
    if not off <= 1:
        what = f"the residual is off from source - scale * B @ A by {off / 2:.3g} units in the last place"
        yield Difference(record.tensor, what, "base, adapter and source are not of one run: make the output again")
    if solve:
        own_B, own_A = initial_block(B, A, record.rank, record.expert)
        if own_B.count_nonzero() != B.count_nonzero():
            yield Difference(record.module, "its factors reach into those of another matrix", "make the output again")
        error, allowed = component_error(W, own_B, own_A, scale, record, manifest)
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
    mode, seed = manifest.inputs["mode"], own_seed(manifest.inputs["seed"], record.tensor, record.row)
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
    if certified is not None and certified < 1e-3:
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
