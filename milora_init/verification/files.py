"""Check the files of a pair against its manifest: names, sizes, SHA-256, and the weights' records."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import torch_name
from milora_init.checkpoint.side_files import brings_weights
from milora_init.lora.folder import LORA_FOLDER, adapter_files
from milora_init.manifest import Manifest
from milora_init.model.adaptable import Adaptable, ModelStructure
from milora_init.untrusted import path_inside
from milora_init.verification.verdict import Finding, Problem

MAKE_AGAIN = "make it again with the same options and --overwrite, or download it again"
# The file may be hours of training.
KEEP_A_COPY = (
    "if you trained in place, copy this file first; to get the initial adapter again, run milora-init with the same "
    "options and another --out"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The folder that is checked.

    Attributes:
        given: The folder as the user wrote it.
        folder: The folder.
        manifest: Its milora_init.json.
    """

    given: str
    folder: Path
    manifest: Manifest

    @property
    def adapter_files(self) -> tuple[str, str]:
        """The initial adapter's config and weights, by the path relative to the folder."""
        return adapter_files(self.manifest.method)

    @property
    def weights(self) -> Path:
        """The file of the initial adapter's weights."""
        return self.folder / self.adapter_files[1]


def check_files(pair: Pair) -> list[Finding]:
    """Every file of the manifest must be there, with its size and SHA-256.

    Of adapter_config.json only the presence is checked, because trainers and `push` rewrite it; `check_adapter_config`
    compares its fields.
    """
    findings = []
    config_name, weights_name = pair.adapter_files
    for name, size_bytes in {config_name: 0, weights_name: 0, **pair.manifest.files}.items():
        path = pair.folder / name
        present = path.is_file()
        what, hint = "", KEEP_A_COPY if name == weights_name and present else MAKE_AGAIN
        try:
            path_inside(pair.folder, name)
        except ValueError as error:
            what, hint = str(error), "replace the link by the file itself, or download it again"
        else:
            if not present:
                what = "missing"
            elif name != config_name:
                what = changed_file(path, size_bytes, pair.manifest.hashes.get(name))
        if what:
            findings.append(Finding(name, what, hint, _problem(pair, name, present=present)))
    return findings


def changed_file(path: Path, size_bytes: int, digest: str | None, record: str = "manifest") -> str:
    """How a file differs from its recorded size and SHA-256; empty if it does not. Raises CheckpointError."""
    found_bytes = path.stat().st_size
    if found_bytes != size_bytes:
        return f"{found_bytes} bytes, the {record} says {size_bytes}"
    if digest is None:
        return f"the {record} has no SHA-256 of it"
    return "" if sha256(path) == digest else f"its SHA-256 is not the one in the {record}: the file was changed"


def _problem(pair: Pair, name: str, *, present: bool) -> Problem:
    if name in pair.adapter_files:
        return "changed" if present else "missing_adapter"
    return "changed_weights" if name.endswith(".safetensors") and "/" not in name else "changed"


def check_stray_files(folder: Path, files: Collection[str], what_it_is: str = "pair") -> list[Finding]:
    """No other file may hold weights, or make transformers or PEFT load something else than the output's `files`."""
    findings = []
    for path in sorted([*folder.iterdir(), *folder.glob(f"{LORA_FOLDER}/*")]):
        name = path.relative_to(folder).as_posix()
        if name in files or not path.is_file():
            continue
        if brings_weights(path.name):
            what = f"not a file of this {what_it_is}, and could be loaded instead of one"
            findings.append(Finding(name, what, f"move {name} out of the folder"))
    return findings


def check_original_weights(pair: Pair, base: Checkpoint, file_findings: Sequence[Finding]) -> list[Finding]:
    """The changed files of weights must not be the files of the original model.

    Raises:
        CheckpointError: A file that cannot be read.
    """
    changed = {finding.where for finding in file_findings}
    suspect = base.headers.keys() & changed or base.headers.keys() - pair.manifest.files.keys()
    if not (changed and suspect and base.has_weights(pair.manifest.inputs["source"])):
        return []
    what = "holds the weights of the original model, not those of the residual base"
    return [Finding(pair.given, what, MAKE_AGAIN, "original_weights")]


def check_weight_records(base: Checkpoint, manifest: Manifest, structure: ModelStructure | None) -> list[Finding]:
    """The weights that the manifest records must be in the base, and in the model that its config.json builds.

    Args:
        base: The residual base, headers read.
        manifest: Its manifest.
        structure: The model's modules; None where the model cannot be built.
    """
    hint = "replace milora_init.json by the one of the run that made this output"
    model: Mapping[str, Adaptable] = {}
    if structure:
        model = {w.module: w for w in (*structure.adaptable.values(), *chain(*structure.experts.values()))}
    findings = []
    for record in manifest.weights:
        info = base.tensors.get(record.tensor)
        stored = record.shape[::-1] if record.transposed else record.shape
        if info is None:
            what = f"is stored in {record.tensor} by the manifest, but the model has no such tensor"
            findings.append(Finding(record.module, what, hint))
            continue
        matrix = info.shape if record.row is None else info.shape[1:]
        if matrix != stored or (record.row or 0) >= info.shape[0] or torch_name(info.dtype) != record.dtype:
            what = f"is {record.dtype} {list(stored)} by the manifest, {record.tensor} is {torch_name(info.dtype)}"
            findings.append(Finding(record.module, f"{what} {list(info.shape)}", hint))
        if record.module in model:
            for name in ("tensor", "transposed", "row", "expert"):
                recorded, right = getattr(record, name), getattr(model[record.module], name)
                if recorded != right:
                    what = f"has {name} {recorded} by the manifest, {right} in the model"
                    findings.append(Finding(record.module, what, hint))
    return findings
