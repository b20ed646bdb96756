"""milora_init.json: what was done, to which weight, and how exactly.

It is written last. A folder without it is unfinished, whatever else it contains.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_init.accuracy import Certificate, Rounding
from milora_init.errors import OutputError
from milora_init.experts import ExpertSlot
from milora_init.untrusted import path_inside, plain_file, relative_name

MANIFEST = "milora_init.json"
WORK_FOLDER = ".milora-init"
FORMAT = 1


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


@dataclass(frozen=True, slots=True)
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

    def to_json(self) -> dict[str, Any]:
        """The content of the file, as plain JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished output, None where there is none.

    Raises:
        OutputError: A file of that name which this version cannot read.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(plain_file(path).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("written by another version")
        content["weights"] = tuple(WeightRecord.from_json(record) for record in content["weights"])
        content["notices"] = tuple(content["notices"])
        for name in (*content["files"], *content.get("hashes", ()), *content["inputs"]["side_files"]):
            _require_plain_name(name)
        return Manifest(**content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(
            f"{path} is not a manifest that this version reads: {error}",
            hint="put it back from where the output was made, or remove the folder",
        ) from error


def _require_plain_name(name: object) -> None:
    """Raise ValueError for a name that no file of an output has: it leads out of the folder, or is hidden."""
    if relative_name(name).startswith("."):
        raise ValueError(f"{name!r} is hidden")


def require_inside(folder: Path, names: Iterable[str]) -> None:
    """Raise OutputError where a file of a finished output is a link that leads out of its folder."""
    for name in names:
        try:
            path_inside(folder, name)
        except ValueError as error:
            raise OutputError(str(error), hint="put the file itself in its place, or fetch the output again") from error


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
