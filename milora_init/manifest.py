"""Define, read and check milora_init.json, the manifest: what a run did to each weight, and how accurately.

The manifest is the last file that a run writes. Therefore an output folder without it is unfinished, even if it
contains all other files. A manifest may come from a download, so every field is checked before it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
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
PART_PREFIX = "part-"  # of the names of a part's own files in the work folder
_OF_PART = re.compile(rf"{PART_PREFIX}(\d+)-of-(\d+)\..+")
FORMAT = 1
MOST_MANIFEST_BYTES = 1 << 29  # a record has about 1,300 bytes, and the largest models have 10^5 weights


def file_of_part(part: tuple[int, int], name: str) -> str:
    """The name of a part's own file or folder in the work folder; the part is its number and their count."""
    return f"{PART_PREFIX}{part[0]}-of-{part[1]}.{name}"


def parts_begun(names: Iterable[str]) -> list[tuple[int, int]]:
    """Number and count of the parts that have one of these names in the work folder, in order."""
    found = {(int(match[1]), int(match[2])) for match in map(_OF_PART.fullmatch, names) if match}
    return sorted(found, key=lambda part: (part[1], part[0]))


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """One weight that was split.

    Attributes:
        module, tensor: The weight's names in the model and on disk.
        shape: (out, in).
        transposed: Whether the tensor is stored as (in, out).
        row: The index in the first dimension, if the tensor holds one matrix for each expert; else None.
        expert: The position in the fused parameter, if this is the weight of an expert; else None.
        key: The module's part of the tensor names in the adapter, see `lora.tensor_layout.lora_key`.
        source_dtype, dtype: The dtypes of the model's weight and of the residual, as torch names them.
        rank: The rank of the component.
        scale: The factor of B @ A: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        s_first, s_last: Largest and smallest singular value of the component.
        s_max: Largest singular value of the whole weight.
        energy: The component's share of the weight's squared Frobenius norm.
        untrainable: The number of directions with s < 1e-6 * s_max. Their rows of A and columns of B are almost zero,
            so they get almost no gradient.
        certificate: The accuracy of the singular triplets.
        rounding: The loss by rounding the residual.
        device: The device that computed the triplets.
        elapsed_s: Seconds to compute the triplets and to split the weight.
        read_s, write_s: Seconds to read the weight, and to write the residual and the factors.
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
        """The end of the name, which is the same in all layers."""
        return self.expert.suffix if self.expert else self.module.rpartition(".")[2]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> WeightRecord:
        """Make a record from its JSON object. Raises ValueError, TypeError or KeyError if it is not a record."""
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
    """The record of a whole run.

    Attributes:
        source: The model as the user gave it, its revision, and its architecture; the text of its config.json, if the
            output has another one; `other_class`, see `model.adaptable.ModelStructure`.
        out: The output folder as the user gave it.
        fingerprint: SHA-256 of `inputs`.
        inputs: Everything that determines the bytes of the output: a hash of each source file, the options, the version
            of milora-init.
        versions: The versions of milora-init and of the libraries it computes with.
        adapter: The content of adapter_config.json.
        files: The size in bytes of every file of the output except the manifest.
        notices: What the user should know before training.
        weights: One record for each weight, in the model's order.
        elapsed_s: Seconds for the whole run; for a resumed run, the seconds since it was resumed.
        checked_with: How it was checked that PEFT can load this adapter: PEFT's version, or the rules that were applied
            without PEFT.
        hashes: The SHA-256 of each of `files`.
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
        """The content of the file, as JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """The SHA-256 of everything that determines the bytes of the output."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished output; None if the folder has none.

    Raises:
        OutputError: This version cannot read the file, or a field has a value that no run writes.
    """
    path = folder / MANIFEST
    try:
        content = read_object(path, most_bytes=MOST_MANIFEST_BYTES)
        if content is None:
            return None
        written_format = content.pop("format", None)
        if type(written_format) is not int or written_format != FORMAT:
            raise ValueError(f"its format is {str(written_format)[:60]!r}, this version reads {FORMAT}")
        require_fields(content, _MANIFEST, "")
        require_fields(content["source"], _SOURCE, "source.")
        require_fields(content["inputs"], _INPUTS, "inputs.")
        require_fields(content["adapter"], _ADAPTER, "adapter.")
        for index, record in enumerate(content["weights"]):
            where = f"weights[{index}]."
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
            hint="restore the file from a copy of the output, or remove the folder",
        ) from error


def require_inside(folder: Path, names: Iterable[str]) -> None:
    """Raise OutputError if a file of a finished output is a link that leads out of the folder."""
    for name in names:
        try:
            path_inside(folder, name)
        except ValueError as error:
            raise OutputError(str(error), hint="replace the link by the file, or download the output again") from error


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(at_least_1, value))


def _targets(value: Any) -> bool:
    return all_of(text)(value) if isinstance(value, list) else bool(plain_names(value))


def _pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(bool(plain_names(k)) and positive(v) for k, v in value.items())


_DTYPE = one_of("float64", "float32", "bfloat16", "float16")
_LEAK_IF = one_of("float64", "float32", "bfloat16", "float16", "nf4")
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
    "component": number, "error": number, "leak": number, "leak_if": each(_LEAK_IF, or_none(number)),
}  # fmt: skip


def _require(ok: bool, problem: str) -> None:
    if not ok:
        raise ValueError(problem)


def _require_consistent(manifest: Manifest) -> None:
    """Check that the fields agree with each other. Raises ValueError."""
    _require(fingerprint(manifest.inputs) == manifest.fingerprint, "fingerprint is not the hash of inputs")
    _require(manifest.method.mode == manifest.inputs["mode"], "inputs.method does not agree with inputs.mode")
    for w in manifest.weights:
        e = w.expert
        _require(w.rank <= min(w.shape), f"{w.module} has rank {w.rank}, but shape {list(w.shape)}")
        _require(w.untrainable <= w.rank, f"{w.module} has {w.untrainable} untrainable directions of {w.rank}")
        _require(w.s_last <= w.s_first <= w.s_max * (1 + 1e-6), f"{w.module} has singular values in the wrong order")
        _require(
            bool(e) or (w.key == w.module and w.row is None),
            f"{w.module} has the key or the row of an expert, but is none",
        )
        _require(not e or (e.index < e.count and e.part < e.parts), f"{w.module} has the invalid position {e}")
    _require_unique("the same module name", (w.module for w in manifest.weights))
    _require_unique("the same place on disk", ((w.tensor, w.row) for w in manifest.weights))
    _require_unique(
        "the same place in the adapter",
        ((w.key, w.expert and (w.expert.part, w.expert.index)) for w in manifest.weights),
    )
    _require_complete_experts(manifest.weights)
    only_modules = not manifest.adapter.get("target_parameters")
    transposed = only_modules and all(w.transposed for w in manifest.weights)
    _require(manifest.adapter["fan_in_fan_out"] == transposed, "fan_in_fan_out does not agree with `transposed`")


def _require_unique(what: str, values: Iterable[Hashable]) -> None:
    (value, times), *_ = Counter(values).most_common(1)
    _require(times == 1, f"two weights have {what}: {value}")


def _require_complete_experts(weights: Sequence[WeightRecord]) -> None:
    """Check the experts that share a key: PEFT stacks them, so none may be missing, and all need one rank and shape."""
    by_key: dict[str, list[WeightRecord]] = {}
    for w in weights:
        by_key.setdefault(w.key, []).append(w)
    for key, group in by_key.items():
        layouts = {(w.rank, w.shape, w.expert and (w.expert.parameter, w.expert.count, w.expert.parts)) for w in group}
        expert = group[0].expert
        expected = expert.count * expert.parts if expert else 1
        _require(len(layouts) == 1, f"the experts of {key} differ in rank, shape or parameter")
        _require(len(group) == expected, f"{key} has {len(group)} weights, expected {expected}")


def require_manifest(folder: Path) -> Manifest:
    """The manifest of a finished output.

    Raises:
        OutputError: The folder has no manifest, or this version cannot read it.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise OutputError(
            f"{folder} has no {MANIFEST}: it is not a finished output of milora-init",
            hint="give the --out folder of a finished run; to finish an interrupted run, repeat its command",
        )
    return manifest
