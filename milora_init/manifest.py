"""milora_init.json: what was done, to which weight, and how exactly.

It is written last. A folder without it is unfinished, whatever else it contains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_init.accuracy import Certificate, Rounding
from milora_init.errors import OutputError
from milora_init.expert_slot import ExpertSlot
from milora_init.json_fields import (
    Check,
    all_of,
    an_object,
    anything,
    at_least_1,
    count,
    each,
    file_name,
    flag,
    non_empty,
    number,
    one_of,
    or_absent,
    or_none,
    positive,
    read_object,
    require_fields,
    sha256_text,
    text,
)
from milora_init.methods import METHODS, MODES, Method, method_of_inputs
from milora_init.untrusted import path_inside, plain_names

MANIFEST = "milora_init.json"
WORK_FOLDER = ".milora-init"
FORMAT = 1
MOST_MANIFEST_BYTES = 1 << 29  # a record takes some 1,300, and the largest models have 10^5 weights


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """One weight that was split.

    Attributes:
        module, tensor: Its names in the model and on disk.
        shape: (out, in).
        transposed: Whether it is stored as (in, out).
        row: Its index in the first dimension of a tensor that holds one matrix for each expert; None elsewhere.
        expert: Where its factors are among those of the layer's experts; None elsewhere.
        key: The module part of its tensor names in the adapter.
        source_dtype, dtype: Of the model's weight and of the residual, in torch's names.
        rank: Of the component.
        scale: The factor of B @ A: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        s_first, s_last: Largest and smallest singular value of the component.
        s_max: Largest singular value of the whole weight.
        energy: The component's share of the weight's squared Frobenius norm.
        untrainable: How many directions have s < 1e-6 * s_max. Their rows of A and columns of B are almost zero, so
            neither gets a gradient.
        certificate: How exact the singular triplets are.
        rounding: What the dtype of the residual costs.
        device: Where it was solved.
        elapsed_s: Seconds for solving and splitting.
        read_s, write_s: Seconds for reading the weight and for writing its parts.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool
    row: int | None
    expert: ExpertSlot | None
    key: str
    source_dtype: str
    dtype: str
    rank: int
    scale: float
    s_first: float
    s_last: float
    s_max: float
    energy: float
    untrainable: int
    certificate: Certificate
    rounding: Rounding
    device: str
    elapsed_s: float
    read_s: float
    write_s: float

    @property
    def suffix(self) -> str:
        """The part of its name that is the same in all layers."""
        return self.expert.suffix if self.expert else self.module.rpartition(".")[2]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> WeightRecord:
        """The record from its JSON object. Raises ValueError, TypeError or KeyError for one of another form."""
        expert = content["expert"]
        return cls(**{
            **content,
            "shape": tuple(content["shape"]),
            "expert": ExpertSlot(**expert) if expert else None,
            "certificate": Certificate(**content["certificate"]),
            "rounding": Rounding(**content["rounding"]),
        })  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Manifest:
    """The whole run.

    Attributes:
        source: The model as given, its revision and its architecture; its config.json, as text, where the output's
            differs; `other_class`, see `model.adaptable.ModelStructure`.
        out: The output folder as given.
        fingerprint: Hash of `inputs`.
        inputs: All that determines the output's bytes: a hash of each source file, the options, the version.
        versions: Of this program and of the libraries that it computes with.
        adapter: Content of adapter_config.json.
        files: Size in bytes of every file of the output except this one.
        notices: What a person should know before training.
        weights: One record a weight, in the model's order.
        elapsed_s: Seconds for the whole run; for a resumed run, those since it was resumed.
        checked_with: What confirmed that PEFT loads this adapter: PEFT's version, or the rules used without PEFT.
        hashes: SHA-256 of each of `files`.
        request: The options as they were given, with which a finished run is recognised without the model class.
    """

    source: Mapping[str, Any]
    out: str
    fingerprint: str
    inputs: Mapping[str, Any]
    versions: Mapping[str, str]
    adapter: Mapping[str, Any]
    files: Mapping[str, int]
    notices: tuple[str, ...]
    weights: tuple[WeightRecord, ...]
    elapsed_s: float
    checked_with: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Manifest(out={self.out!r}, weights={len(self.weights)}, fingerprint={self.fingerprint[:12]!r})"

    @property
    def method(self) -> Method:
        """The method of the run."""
        return method_of_inputs(self.inputs)

    def to_json(self) -> dict[str, Any]:
        """The content of the file, as plain JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the output's bytes."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished output, None where there is none.

    Raises:
        OutputError: A file of that name which this version cannot read, or a field that no run writes.
    """
    path = folder / MANIFEST
    try:
        content = read_object(path, most_bytes=MOST_MANIFEST_BYTES)
        if content is None:
            return None
        number = content.pop("format", None)
        if type(number) is not int or number != FORMAT:
            raise ValueError("written by another version")
        require_fields(content, _MANIFEST, "")
        require_fields(content["source"], _SOURCE, "source.")
        require_fields(content["inputs"], _INPUTS, "inputs.")
        require_fields(content["adapter"], _ADAPTER, "adapter.")
        for place, record in enumerate(content["weights"]):
            where = f"weights[{place}]."
            require_fields(record, _RECORD, where)
            require_fields(record["certificate"], _CERTIFICATE, f"{where}certificate.")
            require_fields(record["rounding"], _ROUNDING, f"{where}rounding.")
            if record["expert"] is not None:
                require_fields(record["expert"], _EXPERT, f"{where}expert.")
        content["weights"] = tuple(WeightRecord.from_json(record) for record in content["weights"])
        content["notices"] = tuple(content["notices"])
        manifest = Manifest(**content)
        _require_consistent(manifest)
        return manifest
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path} is not a manifest that this version reads: {str(error)[:300]}",
            hint="put it back from where the output was made, or remove the folder",
        ) from error


def require_inside(folder: Path, names: Iterable[str]) -> None:
    """Raise OutputError where a file of a finished output is a link that leads out of its folder."""
    for name in names:
        try:
            path_inside(folder, name)
        except ValueError as error:
            raise OutputError(str(error), hint="put the file itself in its place, or fetch the output again") from error


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(at_least_1, value))


def _targets(value: Any) -> bool:
    return all_of(text)(value) if isinstance(value, list) else bool(plain_names(value))


def _pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(bool(plain_names(k)) and positive(v) for k, v in value.items())


_DTYPE = one_of("float64", "float32", "bfloat16", "float16")
_MANIFEST: Mapping[str, Check] = {
    "source": an_object, "out": text, "fingerprint": sha256_text, "inputs": an_object,
    "versions": lambda value: each(text, text)(value) and "milora_init" in value,
    "adapter": an_object, "files": each(file_name, count), "notices": all_of(text),
    "weights": lambda value: isinstance(value, list) and bool(value), "elapsed_s": number,
    "checked_with": or_absent(text), "hashes": or_absent(each(file_name, sha256_text)),
    "request": or_absent(an_object),
}  # fmt: skip
_SOURCE: Mapping[str, Check] = {
    "model": text, "revision": or_none(text), "architecture": text, "config.json": or_absent(text),
    "trust_remote_code": or_absent(flag), "other_class": or_absent(or_none(text)),
}  # fmt: skip
_INPUTS: Mapping[str, Check] = {
    "version": text, "source": lambda value: each(text, text)(value) and "config.json" in value,
    "side_files": each(file_name, sha256_text), "rank": at_least_1, "mode": one_of(*MODES),
    "method": or_absent(one_of(*METHODS)),
    "alpha": at_least_1, "rslora": flag, "seed": count, "text_only": or_absent(flag),
}  # fmt: skip
_ADAPTER: Mapping[str, Check] = {
    "peft_type": one_of("LORA"), "task_type": or_none(text), "base_model_name_or_path": text, "r": at_least_1,
    "lora_alpha": positive, "lora_dropout": number, "bias": text, "target_modules": _targets,
    "target_parameters": or_absent(all_of(text)), "init_lora_weights": anything, "fan_in_fan_out": flag,
    "use_rslora": flag, "rank_pattern": _pattern, "alpha_pattern": _pattern, "revision": or_absent(or_none(text)),
}  # fmt: skip
_RECORD: Mapping[str, Check] = {
    "module": non_empty, "tensor": non_empty, "shape": _shape, "transposed": flag, "row": or_none(count),
    "expert": or_none(an_object), "key": non_empty, "source_dtype": _DTYPE, "dtype": _DTYPE, "rank": at_least_1,
    "scale": positive, "s_first": number, "s_last": number, "s_max": number, "energy": number, "untrainable": count,
    "certificate": an_object, "rounding": an_object, "device": text, "elapsed_s": number, "read_s": number,
    "write_s": number,
}  # fmt: skip
_EXPERT: Mapping[str, Check] = {
    "parameter": non_empty, "index": count, "count": at_least_1, "part": count, "parts": at_least_1,
}  # fmt: skip
_CERTIFICATE: Mapping[str, Check] = {
    "path": text, "reason": text, "residual": or_none(number), "orthogonality": or_none(number),
    "gap": or_none(number), "component_error": or_none(number), "complete": text,
}  # fmt: skip
_ROUNDING: Mapping[str, Check] = {
    "component": number, "error": number, "leak": number, "leak_if": each(_DTYPE, or_none(number)),
}  # fmt: skip


def _require_consistent(manifest: Manifest) -> None:
    """See that fields agree with each other. Raises ValueError."""

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(what)

    require(fingerprint(manifest.inputs) == manifest.fingerprint, "fingerprint is not the hash of inputs")
    require(manifest.method.mode == manifest.inputs["mode"], "inputs.method does not agree with inputs.mode")
    for w in manifest.weights:
        e = w.expert
        require(w.rank <= min(w.shape), f"{w.module} has rank {w.rank}, its shape is {list(w.shape)}")
        require(w.untrainable <= w.rank, f"{w.module} has {w.untrainable} untrainable directions of {w.rank}")
        require(w.s_last <= w.s_first <= w.s_max * (1 + 1e-6), f"{w.module} has singular values out of order")
        require(bool(e) or (w.key == w.module and w.row is None), f"{w.module} is no expert's, its key or row is one's")
        require(not e or (e.index < e.count and e.part < e.parts), f"{w.module} has expert {e}")
    for what, times in (
        ("module", Counter(w.module for w in manifest.weights)),
        ("place on disk", Counter((w.tensor, w.row) for w in manifest.weights)),
        (
            "place in the adapter",
            Counter((w.key, w.expert and (w.expert.part, w.expert.index)) for w in manifest.weights),
        ),
    ):
        (most, found), *_ = times.most_common(1)
        require(found == 1, f"two weights have one {what}: {most}")
    # PEFT's layout stacks the experts of a key, so they are alike and all there.
    kinds: dict[str, set[tuple[Any, ...]]] = {}
    for w in manifest.weights:
        e = w.expert
        kinds.setdefault(w.key, set()).add((w.rank, w.shape, e and (e.parameter, e.count, e.parts)))
    found_of = Counter(w.key for w in manifest.weights)
    for key, kind in kinds.items():
        (_, _, stack), *others = kind
        wanted = stack[1] * stack[2] if stack else 1
        require(not others and found_of[key] == wanted, f"the experts of {key} are not alike, or not all there")
    plain = not manifest.adapter.get("target_parameters")
    transposed = plain and all(w.transposed for w in manifest.weights)
    require(manifest.adapter["fan_in_fan_out"] == transposed, "fan_in_fan_out does not agree with `transposed`")


def require_manifest(folder: Path) -> Manifest:
    """The manifest of a finished output.

    Raises:
        OutputError: There is none, or none that this version can read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise OutputError(
            f"{folder} has no {MANIFEST}: it is no finished output of milora-init",
            hint="name the --out of a finished run; an unfinished one is resumed by the same command",
        )
    return manifest


def require_pair(folder: Path, manifest: Manifest, instead: str) -> None:
    """Raise OutputError unless the output has a residual base.

    Args:
        folder: The output.
        manifest: Its manifest.
        instead: What to do with an adapter of an original model.
    """
    if not manifest.method.writes_base:
        raise OutputError(
            f"{folder} has no residual base: it is an adapter of {manifest.source['model']!r}, of method "
            f"{manifest.method.name}, which this command does not know yet",
            hint=instead,
        )
