"""Compare a pair with the original model, tensor by tensor.

Nothing that the program recorded about its own results is used. A residual must lie within half a unit in the last
place of W - scale * B @ A, and the component is compared with one that is computed again from the original weight. One
tensor of each side is in memory at a time.

Letters: W (m, n) is an original weight, R (m, n) its residual, B (m, r) and A (r, n) the factors of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from milora_init.checkpoint.dequantise import QuantisedSource, locate, locate_stored
from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.tensor_file import TensorSource
from milora_init.errors import CheckpointError
from milora_init.linalg.certificate import EPS
from milora_init.linalg.nf4 import nf4
from milora_init.linalg.svd import Triplets, singular_triplets
from milora_init.lora.folder import open_factors
from milora_init.lora.tensor_layout import initial_block
from milora_init.manifest import Manifest, WeightRecord
from milora_init.plan.quantised_base import removed_parts
from milora_init.plan.weights import weight_seed
from milora_init.verification.verdict import Finding

EPS32 = torch.finfo(torch.float32).eps
_BLOCK_ELEMENTS = 1 << 20  # of a block of rows: 8 MiB in float64, of which a few are in memory at a time
_SAMPLE = 3  # the fewest with both ends and the middle of a model: a shifted order or a missing layer shows there
_CERTAIN = 1e-3  # if the solver may be off by more, directions are compared; unrelated products are off by about 1
_SOLVER = 1e-6  # 20 times `svd.TOLERANCE`, the certified error up to which a run on any device accepts a component
_MARGIN = 4  # times a first-order bound of rounding errors: for higher orders, and factors that are not quite balanced
_ENTRY = 8 * EPS  # relative, of an entry of W - D in float64: a few roundings, in any order of the sum
_PRODUCT = 64 * EPS  # relative, of a product of rank r in float64: about sqrt(r) roundings of either sign, r up to 4096
_TINY = 1e-300  # against division by zero
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # an integer dtype by the bytes of a float
_MAKE_AGAIN = "make the pair again"
_MERGE_AGAIN = "merge again"
Place = TensorSource | QuantisedSource


def compare_with_model(
    base: Checkpoint, adapter: Path, model: Checkpoint, manifest: Manifest, *, given: str, all_components: bool
) -> list[Finding]:
    """Every tensor of a pair must follow from the original model.

    If the model's files are not those that the pair was made from, its tensors may still be the same ones; the
    comparison then ends at the first difference.

    Args:
        base: The residual base.
        adapter: The file of the initial adapter's weights.
        model: The original model.
        manifest: Of the pair.
        given: The original model as the user named it.
        all_components: Compute all components again, not a sample of three.

    Raises:
        CheckpointError: A file that cannot be read.
    """
    found = _compare(base, adapter, model, manifest, given=given, all_components=all_components)
    if model.has_weights(manifest.inputs["source"]):
        return list(found)
    what = "not the files that the pair was made from: another model, or another commit"
    # Of another model every tensor would differ: only the first difference is computed.
    hint = model_hint(manifest.source["model"])
    first = [replace(finding, hint=hint, problem="other_model") for finding in islice(found, 1)]
    return [Finding(given, what, hint, "other_model"), *first]


def model_hint(recorded: object) -> str:
    """The hint where another model than the recorded original was given."""
    return f"name the model that it was made from: --model {recorded}"


def require_original(model: Checkpoint, manifest: Manifest, given: str) -> None:
    """Raise CheckpointError unless a model has the weights that an output was made from; `given` is its name."""
    if not model.has_weights(manifest.inputs["source"]):
        raise CheckpointError(
            f"{given} is not what this output was made from: another model, or another commit",
            hint=model_hint(manifest.source["model"]),
        )


def _compare(
    base: Checkpoint, adapter: Path, model: Checkpoint, manifest: Manifest, *, given: str, all_components: bool
) -> Iterator[Finding]:
    hint = model_hint(manifest.source["model"])
    side_files = {"config.json": manifest.inputs["source"]["config.json"], **manifest.inputs["side_files"]}
    for name, recorded in side_files.items():
        path = model.folder / name  # read_manifest has checked that the name stays inside the folder
        if not path.is_file() or sha256(path) != recorded:
            yield Finding(f"{given}/{name}", "not the file that the output was made from", hint)
    for name in sorted(base.tensors.keys() ^ model.tensors.keys()):
        where = "the original model" if name in base.tensors else "the residual base"
        yield Finding(name, f"{where} has no such tensor", hint)
    records: dict[str, list[WeightRecord]] = {}
    for record in manifest.weights:
        records.setdefault(record.tensor, []).append(record)
    modules = [record.module for record in manifest.weights]
    solved_again = set(modules if all_components else spread(modules))
    yield from _compare_kept_scales(base, model, _MAKE_AGAIN)
    with open_factors(adapter) as factors:
        for name in (name for name in base.tensors if name in model.tensors):
            original, residual = locate(model, name), locate(base, name)
            if original.shape != residual.shape:
                what = f"{list(original.shape)} in the original model, {list(residual.shape)} in the residual base"
                yield Finding(name, what, hint)
                continue
            if name not in records and not _same_values(original, residual):
                yield Finding(name, "not adapted, but its bytes are not the original model's", _MAKE_AGAIN)
            for record in records.get(name, ()):
                W, R = (read_row(place, record.row) for place in (original, residual))
                if record.transposed:
                    W, R = W.mT, R.mT
                B, A = factors.read(record)
                yield from _check_weight(W, R, B, A, record, manifest, solve=record.module in solved_again)


def count_bit_equal(merged: Checkpoint, model: Checkpoint, manifest: Manifest) -> int:
    """How many entries of the adapted weights have, after a merge, the same bits as in the original model.

    Raises:
        CheckpointError: A tensor that cannot be read.
    """
    count = 0
    for record in manifest.weights:
        now, W = (read_row(locate(checkpoint, record.tensor), record.row) for checkpoint in (merged, model))
        expected = W.to(now.dtype) if record.tensor in model.quantised.tensors else W
        bits = _BITS[now.itemsize]
        count += now.numel() - int((now.view(bits) != expected.view(bits)).count_nonzero())
    return count


def compare_merged(
    merged: Checkpoint, model: Checkpoint, residuals: Mapping[str, str], *, initial: bool, changed: Collection[str] = ()
) -> Iterator[Finding]:
    """Every tensor of a merged model that was not adapted must have the original's bytes.

    If the initial adapter was merged, the adapted ones must be the original's up to two roundings, of the residual
    R = W - D and of the merged W' = R + D. The component D is a part of the SVD of W, so |R|_F <= |W|_F, and
    |W' - W|_F <= u_R |R|_F + u_W |W'|_F with the unit roundoffs u of both dtypes.

    Args:
        merged: The merged model.
        model: The original model.
        residuals: The adapted tensors, and the dtype of each one's residual, in torch's names.
        initial: Whether the initial adapter was merged.
        changed: Tensors that were retrained, added or left out, or have another dtype: they are not compared.

    Raises:
        CheckpointError: A tensor that cannot be read.
    """
    for name in sorted((merged.tensors.keys() ^ model.tensors.keys()) - set(changed)):
        where = "the original model" if name in merged.tensors else "the merged model"
        yield Finding(name, f"{where} has no such tensor", _MERGE_AGAIN)
    yield from _compare_kept_scales(merged, model, _MERGE_AGAIN)
    for name in (name for name in merged.tensors if name in model.tensors and name not in changed):
        now, W = merged.tensors[name], model.tensors[name]
        rounded = name in model.quantised.tensors  # to the dtype of the merged model
        if now.shape != W.shape or (now.dtype != W.dtype and not rounded):
            what = f"{torch_name(now.dtype)} {list(now.shape)}, in the original model {torch_name(W.dtype)}"
            yield Finding(name, f"{what} {list(W.shape)}", _MERGE_AGAIN)
        elif name not in residuals:
            if not _same_values(locate(model, name), locate(merged, name)):
                yield Finding(name, "not adapted, but its bytes are not the original model's", _MERGE_AGAIN)
        elif initial:
            for before, after in _one_at_a_time(locate(model, name), locate(merged, name)):
                distance, most = _rounding_distance(after.read(), before.read(), residuals[name])
                if not distance <= most:
                    what = f"differs from the original by {distance:.2e} (Frobenius norm), rounding explains {most:.2e}"
                    yield Finding(name, what, _MERGE_AGAIN)
                    break


def _compare_kept_scales(output: Checkpoint, model: Checkpoint, hint: str) -> Iterator[Finding]:
    """Of tensors that an output keeps quantised, the scales of activations must be those of the original model.

    The parts that hold values are compared with the tensors; these scales are no part of a value.
    """
    if not output.quantised.tensors:
        return
    dense = model.quantised.tensors.keys() - output.quantised.tensors.keys()
    expected = model.quantised.dropped - removed_parts(model, dense)
    for name in sorted(expected | output.quantised.dropped):
        if name not in expected or name not in output.stored:
            where = "the original model" if name not in expected else "the output"
            yield Finding(name, f"{where} has no such tensor", hint)
        elif not _same_bytes(*(locate_stored(checkpoint, name).read() for checkpoint in (model, output))):
            yield Finding(name, "its bytes are not the original model's", hint)


def _rounding_distance(merged: Tensor, W: Tensor, residual_dtype: str) -> tuple[float, float]:
    """|W' - W|_F, and the most that rounding the residual and the sum makes of it; see `compare_merged`."""
    square, norm_square = 0.0, 0.0
    for now, before in zip(*(torch.split(t.reshape(-1), _BLOCK_ELEMENTS) for t in (merged, W)), strict=True):
        square += float((now.double() - before.double()).square().sum())
        norm_square += float(before.double().square().sum())
    most = _PRODUCT * math.sqrt(norm_square)
    for dtype in (getattr(torch, residual_dtype), merged.dtype):
        finfo = torch.finfo(dtype)
        # 1.01: products of unit roundoffs, and the product in float32 before a rounding to 16 bits.
        most += 1.01 * finfo.eps / 2 * math.sqrt(norm_square)
        most += finfo.smallest_normal * finfo.eps / 2 * math.sqrt(W.numel())
    return math.sqrt(square), most


def _check_weight(  # noqa: PLR0913  both sides of a comparison
    W: Tensor, R: Tensor, B: Tensor, A: Tensor, record: WeightRecord, manifest: Manifest, *, solve: bool
) -> Iterator[Finding]:
    """One weight's residual; with `solve` its component too."""
    if not tuple(W.shape) == tuple(R.shape) == record.shape:
        what = f"{list(W.shape)} in the model and {list(R.shape)} in the base, the manifest says {list(record.shape)}"
        yield Finding(record.tensor, what, _MAKE_AGAIN)
        return
    scale = record.scale
    if manifest.inputs.get("nf4"):
        if what := _nf4_fault(W.float(), R.float(), scale * B.float() @ A.float(), R.dtype):
            yield Finding(record.tensor, what, _MAKE_AGAIN)
        W, R = W.float() - R.float(), torch.zeros_like(R)  # the factors are those of what NF4 leaves
    error = 0.0 if manifest.inputs.get("nf4") else residual_error(W, R, B, A, scale)
    if not error <= 1:
        what = f"the residual differs from W - scale * B @ A by {error / 2:.3g} units in the last place"
        hint = f"residual base, adapter and original model are not of one run: {_MAKE_AGAIN}"
        yield Finding(record.tensor, what, hint)
    if solve:
        own_B, own_A = initial_block(B, A, record.rank, record.expert)
        if own_B.count_nonzero() != B.count_nonzero():
            what = "its columns of B have entries in the rows of another matrix of the same expert"
            yield Finding(record.module, what, _MAKE_AGAIN)
        error, allowed = component_error(W, own_B, own_A, scale, record, manifest)
        if not error <= allowed:
            mode = manifest.inputs["mode"]
            what = f"scale * B @ A differs from the `{mode}` component by {error:.1e} (relative)"
            yield Finding(record.module, what, f"the adapter is not of this model: {_MAKE_AGAIN}")


def _nf4_fault(W: Tensor, Q: Tensor, D: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a residual Q of NF4's numbers beside a component D, all (m, n) in float32; else empty.

    Another round trip through NF4 must not change it, and the pair must be nearer to W than NF4 alone is.
    """
    if not torch.equal(nf4(Q).to(dtype).float(), Q):
        return "the residual holds numbers that NF4 does not have"
    pair, alone = float((W - Q - D).norm()), float((W - nf4(W)).norm())
    if not pair <= alone:
        return f"base and adapter differ from the weight by {pair:.3g}, NF4 alone by {alone:.3g} (Frobenius norm)"
    return ""


def residual_error(W: Tensor, R: Tensor, B: Tensor, A: Tensor, scale: float) -> float:
    """The largest |W - scale * B @ A - R|, in half units in the last place of R's dtype.

    It is at most 1 if R was computed exactly and rounded once.
    """
    finfo = torch.finfo(R.dtype)
    B64, A64 = B.double(), scale * A.double()
    # Error of the float64 product, of r terms, and of the difference. The solver may have summed in another order.
    noise = _ENTRY * float(W.abs().max()) + EPS * A.shape[0] * float(B64.abs().max()) * float(A64.abs().max())
    worst = 0.0
    rows = max(1, _BLOCK_ELEMENTS // W.shape[1])
    for top in range(0, W.shape[0], rows):
        block = slice(top, top + rows)
        exact = W[block].double() - B64[block] @ A64
        exponent = torch.frexp(exact).exponent
        # frexp gives |x| in [0.5, 1) * 2^e: a unit in the last place is eps * 2^(e - 1), half of it eps / 4 * 2^e.
        half_ulp = torch.ldexp(torch.full_like(exact, finfo.eps / 4), exponent)
        half_ulp.clamp_(min=finfo.smallest_normal * finfo.eps / 2)
        error = ((exact - R[block].double()).abs() - noise).clamp_(min=0) / half_ulp
        worst = max(worst, float(torch.nan_to_num(error, nan=math.inf).max()))
    return worst


def component_error(
    W: Tensor, B: Tensor, A: Tensor, scale: float, record: WeightRecord, manifest: Manifest
) -> tuple[float, float]:
    """Distance of scale * B @ A from the component, computed again from W, and the most that is allowed.

    Both are relative to the component in Frobenius norm. Where the cut falls in a cluster of singular values, the
    component is not unique. Then the singular values must agree, and the stored directions must be singular
    directions of W; both relative to W's largest singular value.
    """
    mode, seed = manifest.inputs["mode"], weight_seed(manifest.inputs["seed"], record.tensor, record.row)
    truth = singular_triplets(W, record.rank, mode=mode, seed=seed)
    if manifest.method.factors == "orthonormal":
        return _orthonormal_error(W, B.double(), A.double(), truth)
    s, s_max = truth.s, max(truth.s_max, _TINY)
    left, right = scale * B.double(), A.double()
    lengths = right.norm(dim=1)
    unit = (right / lengths.clamp_min(_TINY)[:, None]).mT
    component_square, direction_square = 0.0, 0.0
    rows = max(1, _BLOCK_ELEMENTS // W.shape[1])
    for top in range(0, W.shape[0], rows):
        block = slice(top, top + rows)
        D = (truth.U[block] * s) @ truth.V.mT
        component_square += float((left[block] @ right - D).square().sum())
        direction_square += float((W[block].double() @ unit - left[block] * lengths).square().sum())
    certified = truth.certificate.component_error
    if certified is not None and certified < _CERTAIN:
        norm = max(float(s.norm()), min(W.shape) * EPS * s_max * math.sqrt(record.rank))
        # Rounding to float32 changes B by at most EPS32 / 2 * |B|_F, and A likewise.
        rounding = EPS32 * math.sqrt(float(s.sum() * s.max())) / norm
        # Twice the certified error: of the run's component, and of this one.
        return math.sqrt(component_square) / norm, _MARGIN * rounding + _SOLVER + 2 * certified
    value_errors = (left.norm(dim=0) * lengths).sort(descending=True).values - s
    # Rounding to float32 changes a direction by EPS32 / 2, which W multiplies by up to s_max, and a value by EPS32 * s.
    rounding = 2 * EPS32 * math.sqrt(record.rank)
    return (float(value_errors.norm()) + math.sqrt(direction_square)) / s_max, _MARGIN * rounding


def _orthonormal_error(W: Tensor, B: Tensor, A: Tensor, truth: Triplets) -> tuple[float, float]:
    """Distance of B @ A from U V^T, relative to it in Frobenius norm, and the most that is allowed.

    U V^T of the solver is less certain than its component by up to s_max / s_last, because small singular values weigh
    as much as large ones. Where it is not certain at all, B and A must be orthonormal singular directions of W instead:
    W A^T = B diag(s). Both are relative to W's largest singular value.
    """
    s, s_max, root = truth.s, max(truth.s_max, _TINY), math.sqrt(len(truth.s))
    eye = torch.eye(len(s), dtype=torch.float64)
    orthonormality_error = float(max((B.mT @ B - eye).norm(), (A @ A.mT - eye).norm()))
    certificate, s_last = truth.certificate, max(float(s.min()), _TINY)
    # If a triplet turns by an angle a, the component changes by s * a: so a is at most the component's certified error
    # over s_last. Inside the wanted space, U and V also turn by about residual / s.
    angle_bound = math.inf
    if certificate.component_error is not None:
        angle_bound = (
            (certificate.component_error * float(s.norm()) + certificate.residual * s_max * root) / s_last / root
        )
    # Rounding to float32 changes B and A by EPS32 / 2 * root each: EPS32 in the product, EPS32 * root in B^T B.
    rounding = 2 * EPS32 * root
    if angle_bound < _CERTAIN:
        rows, square = max(1, _BLOCK_ELEMENTS // W.shape[1]), 0.0
        for top in range(0, W.shape[0], rows):
            block = slice(top, top + rows)
            square += float((B[block] @ A - truth.U[block] @ truth.V.mT).square().sum())
        # Four times the angle: of U and of V, in the run and here.
        return math.sqrt(square) / root + orthonormality_error, _MARGIN * rounding + _SOLVER + 4 * angle_bound
    WA = W.double() @ A.mT
    values = (B * WA).sum(dim=0)
    error = float((WA - B * values).norm()) + float((values.sort().values - s.sort().values).norm())
    return error / s_max + orthonormality_error, _MARGIN * rounding


def _same_values(original: Place, stored: Place) -> bool:
    """Whether a tensor has the original's bytes; or, where only the original is quantised, its values, rounded once."""
    return all(_same_piece(before, after) for before, after in _one_at_a_time(original, stored))


def _same_piece(original: Place, stored: Place) -> bool:
    if isinstance(original, QuantisedSource) and isinstance(stored, QuantisedSource):
        return (
            original.tensor.rule == stored.tensor.rule
            and original.parts.keys() == stored.parts.keys()
            and all(_same_bytes(part.read(), stored.parts[role].read()) for role, part in original.parts.items())
        )
    expected, found = original.read(), stored.read()
    return _same_bytes(expected.to(found.dtype) if isinstance(original, QuantisedSource) else expected, found)


def _one_at_a_time(original: Place, stored: Place) -> Iterator[tuple[Place, Place]]:
    """Both places of a tensor; of experts that are fused and quantised those of one expert after the other."""
    if len(original.shape) > 2 and isinstance(original, QuantisedSource):
        yield from ((original.at(row), stored.at(row)) for row in range(original.shape[0]))
    else:
        yield original, stored


def read_row(place: Place, row: int | None) -> Tensor:
    """A tensor, or one entry of its first dimension. Raises CheckpointError."""
    return (place if row is None else place.at(row)).read()


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def spread(names: list[str]) -> list[str]:
    """The first, the middle and the last of some names."""
    last = len(names) - 1
    return [names[round(last * i / (_SAMPLE - 1))] for i in range(_SAMPLE)]
