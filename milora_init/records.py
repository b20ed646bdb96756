"""milora_merge.json and milora_convert.json: what a merged model and a converted adapter were made of.

Like milora_init.json, each is written last and names every file with its size and SHA-256. `read_output` reads
whichever of the three a folder has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milora_init.envelope import Status, envelope
from milora_init.errors import OutputError, UsageError
from milora_init.json_fields import (
    Check,
    all_of,
    at_least_1,
    count,
    each,
    file_name,
    flag,
    number,
    one_of,
    or_none,
    read_object,
    require_fields,
    sha256_text,
    text,
)
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest, fingerprint, parts_begun, read_manifest
from milora_init.result import Result
from milora_init.serving import FORMS, NO_LORA, serving_command

MERGED = "milora_merge.json"
CONVERTED = "milora_convert.json"
RECORDS = (MANIFEST, MERGED, CONVERTED)
ORIGINAL_MODEL = "original model"  # `base` in the inputs of a merge or conversion without a residual base
_FORMAT = 1
_OF_THE_CALL = ("unchanged", "bit_equal", "dry_run")  # not in the file
_NOT_PRINTED = ("inputs", "source_files", "tensors", "changed", "from_hub", "model", "revision", "unchanged", "dry_run")


class _Recorded(Result):
    """A result that is also the record of a finished output."""

    __slots__ = ()

    def content(self) -> dict[str, Any]:
        """The content of the record's file, as plain JSON values."""
        fields = asdict(self)  # type: ignore[call-overload]  # the subclasses are dataclasses
        return {"format": _FORMAT, **{name: value for name, value in fields.items() if name not in _OF_THE_CALL}}


@dataclass(frozen=True, slots=True, repr=False)
class MergeResult(_Recorded):
    """What was merged: the content of milora_merge.json.

    Attributes:
        out, pair, adapter: The folders as given.
        model, revision: The original model and its commit, as the manifest of the pair names them.
        from_hub: Whether `model` is a Hub id, and not a folder.
        initial: Whether the adapter was the initial one, so that this is the original model again, up to rounding.
        modules: How many modules were merged.
        entries: How many entries the merged weights have.
        tensors: The tensors with merged weights, and the dtype of each one's residual.
        changed: The tensors that cannot be compared with the original's: retrained, added, left out, or of another
            dtype.
        retrained: The tensors that were trained beside the factors.
        notices: What to know before the model is used.
        source_files: A hash of each file of the original model, as in the manifest's `inputs`.
        fingerprint: Hash of `inputs`.
        inputs: All that determines the bytes: the pair's fingerprint, the adapter's hash and scales, the version.
        files, hashes: Size in bytes and SHA-256 of every file of the output except this one.
        elapsed_s: Seconds; for a resumed merge, those since it was resumed.
        bit_equal: How many of the entries have the bits of the original model; None where that was not asked.
        unchanged: Whether the same merge was finished before.
    """

    out: str
    pair: str
    adapter: str
    model: str
    revision: str | None
    from_hub: bool
    initial: bool
    modules: int
    entries: int
    tensors: Mapping[str, str]
    source_files: Mapping[str, str]
    fingerprint: str
    inputs: Mapping[str, Any]
    files: Mapping[str, int]
    hashes: Mapping[str, str]
    elapsed_s: float
    changed: tuple[str, ...] = ()
    retrained: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    bit_equal: int | None = None
    unchanged: bool = False

    def summary(self) -> Mapping[str, object]:
        status = "unchanged" if self.unchanged else "done"
        found = {"status": status, "out": self.out, "modules": self.modules, "model": self.model}
        return found if self.bit_equal is None else {**found, "bit_equal": f"{self.bit_equal / self.entries:.4%}"}

    def to_json(self) -> dict[str, Any]:
        return _envelope("merge", self)


@dataclass(frozen=True, slots=True)
class ConvertedModule:
    """One module of the plain adapter.

    Attributes:
        module: Its name.
        rank: Of its factors.
        lost: The relative Frobenius norm of what the rank cut off; 0 without a cut.
    """

    module: str
    rank: int
    lost: float


@dataclass(frozen=True, slots=True, repr=False)
class ConvertResult(_Recorded):
    """What was converted: the content of milora_convert.json.

    Attributes:
        out, pair, adapter: The folders as given.
        model, revision: The original model, as adapter_config.json names it, and its commit if the pair records one.
        from_hub: Whether `model` is a Hub id, and not a folder.
        modules: One entry for each module.
        cut: Whether a rank was given, so that something may be lost.
        source_files: A hash of each file of the original model, from the manifest of the pair; empty without one.
        fingerprint: Hash of `inputs`.
        inputs: All that determines the bytes: the hashes of both adapters, the new config, the version.
        files, hashes: Size in bytes and SHA-256 of every file of the output except this one.
        elapsed_s: Seconds.
        form: What reads the adapter: `peft`, `vllm` or `sglang`.
        notices: What to know before the adapter is used.
        unchanged: Whether the same conversion was finished before.
        dry_run: Whether nothing was written.
    """

    out: str
    pair: str
    adapter: str
    model: str
    revision: str | None
    from_hub: bool
    modules: tuple[ConvertedModule, ...]
    cut: bool
    source_files: Mapping[str, str]
    fingerprint: str
    inputs: Mapping[str, Any]
    files: Mapping[str, int]
    hashes: Mapping[str, str]
    elapsed_s: float
    form: str = "peft"
    notices: tuple[str, ...] = ()
    unchanged: bool = False
    dry_run: bool = False

    @property
    def serve(self) -> str:
        """The command that serves it; empty for PEFT, and where the server has no LoRA for the model."""
        if any(notice.startswith(NO_LORA) for notice in self.notices):
            return ""
        return serving_command(max(module.rank for module in self.modules), self.form, self.model, self.out)

    def summary(self) -> Mapping[str, object]:
        return {"status": _status(self), "out": self.out, "modules": len(self.modules), "model": self.model}

    def to_json(self) -> dict[str, Any]:
        return _envelope("convert", self)


Output = Manifest | MergeResult | ConvertResult


def _envelope(command: str, result: MergeResult | ConvertResult) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(result).items() if name not in _NOT_PRINTED}
    if isinstance(result, ConvertResult):
        fields["modules"] = list(fields["modules"])
        fields["serve"] = result.serve
    else:
        fields["retrained"] = list(fields["retrained"])
    fields["warnings"] = list(fields.pop("notices"))
    return envelope(command, _status(result), source={"model": result.model, "revision": result.revision}, **fields)


def _status(result: MergeResult | ConvertResult) -> Status:
    if isinstance(result, ConvertResult) and result.dry_run:
        return "planned"
    return "unchanged" if result.unchanged else "done"


_COMMON: Mapping[str, Check] = {
    "format": lambda value: type(value) is int and value == _FORMAT,
    "out": text, "pair": text, "adapter": text, "model": text, "revision": or_none(text), "from_hub": flag,
    "source_files": each(text, text), "fingerprint": sha256_text, "inputs": each(text, lambda _: True),
    "files": each(file_name, count), "hashes": each(file_name, sha256_text), "elapsed_s": number,
}  # fmt: skip
_DTYPE = one_of("float64", "float32", "bfloat16", "float16")
_MERGE: Mapping[str, Check] = {
    **_COMMON, "initial": flag, "modules": at_least_1, "entries": at_least_1, "tensors": each(text, _DTYPE),
    "changed": all_of(text), "retrained": all_of(text), "notices": all_of(text),
}  # fmt: skip
_CONVERT: Mapping[str, Check] = {
    **_COMMON, "cut": flag, "modules": lambda value: isinstance(value, list) and bool(value),
    "form": one_of(*FORMS), "notices": all_of(text),
}  # fmt: skip
_MODULE: Mapping[str, Check] = {"module": text, "rank": at_least_1, "lost": number}
_LEAST_FILES = {MERGED: ("config.json",), CONVERTED: ("adapter_config.json", "adapter_model.safetensors")}


def read_merged(folder: Path) -> MergeResult | None:
    """The record of a finished merge, None where there is none. Raises OutputError."""
    content = _read(folder / MERGED, _MERGE)
    if content is None:
        return None
    lists = {name: tuple(content[name]) for name in ("changed", "retrained", "notices")}
    return MergeResult(**{**content, **lists})


def read_converted(folder: Path) -> ConvertResult | None:
    """The record of a finished conversion, None where there is none. Raises OutputError."""
    content = _read(folder / CONVERTED, _CONVERT)
    return None if content is None else ConvertResult(**{**content, "notices": tuple(content["notices"])})


def _read(path: Path, fields: Mapping[str, Check]) -> dict[str, Any] | None:
    """The checked fields of a record, None where there is no file. Raises OutputError."""
    try:
        content = read_object(path)
        if content is None:
            return None
        require_fields(content, fields, "")
        if unknown := content.keys() - fields.keys():
            raise ValueError(f"{min(unknown)} is no field of it")
        if missing := [name for name in _LEAST_FILES[path.name] if name not in content["files"]]:
            raise ValueError(f"files lacks {missing[0]}")
        if content["files"].keys() != content["hashes"].keys() or content["files"].keys() & set(RECORDS):
            raise ValueError("files and hashes do not name the files of one output")
        if fingerprint(content["inputs"]) != content["fingerprint"]:
            raise ValueError("fingerprint is not the hash of inputs")
        if fields is _CONVERT:
            for place, module in enumerate(content["modules"]):
                require_fields(module, _MODULE, f"modules[{place}].")
            content["modules"] = tuple(ConvertedModule(**module) for module in content["modules"])
        del content["format"]
        return content
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path} is not a record that this version reads: {str(error)[:300]}",
            hint="make the output again, in another --out",
        ) from error


def read_output(folder: Path) -> Output | None:
    """The record of the finished output in a folder, None where there is none. Raises OutputError."""
    return read_manifest(folder) or read_merged(folder) or read_converted(folder)


def record_name(output: Output) -> str:
    """The file name of an output's record."""
    return MANIFEST if isinstance(output, Manifest) else MERGED if isinstance(output, MergeResult) else CONVERTED


def unfinished_output(folder: Path) -> tuple[str, str] | None:
    """Which parts of an unfinished output were begun, as text that may be empty, and what finishes it.

    None for a folder that no run is writing.
    """
    work = folder / WORK_FOLDER
    if not work.is_dir():
        return None
    parts = parts_begun(path.name for path in work.iterdir())
    if not parts:
        return "", "run the command that writes it again: it keeps the files that were finished"
    begun = ", ".join(f"{number}/{count}" for number, count in parts)
    return (
        f", begun with --part {begun}",
        "when all parts have ended, run the same command without --part: it makes what is missing, and finishes",
    )


def require_output(folder: Path, given: str) -> Output:
    """The record of the finished output in a folder.

    Args:
        folder: The folder.
        given: The folder or Hub id as the user wrote it.

    Raises:
        OutputError: The output is unfinished, or the folder is no output of milora-init.
    """
    output = read_output(folder)
    if output is not None:
        return output
    if unfinished := unfinished_output(folder):
        what, hint = unfinished
        raise OutputError(f"{given} is an unfinished output of milora-init{what}", hint=hint)
    require_no_part(folder, given)
    if (folder / "adapter_config.json").is_file():
        hint = (
            "name the pair that it belongs to; a trained adapter is given to verify, report, merge and convert "
            "with --adapter. To publish it, push what convert or merge makes of it"
        )
        raise OutputError(f"{given} is an adapter, and no output of milora-init", hint=hint)
    raise OutputError(
        f"{given} has no {MANIFEST}: it is no finished output of milora-init", hint="name the --out of a finished run"
    )


def require_no_part(folder: Path, given: str) -> None:
    """Raise UsageError for the folder of the initial adapter in a pair."""
    if folder.name == "lora" and (folder.parent / MANIFEST).is_file():
        raise UsageError(f"{given} is a part of a pair: its initial adapter", hint=f"name the pair: {folder.parent}")


def require_pair(folder: Path, given: str) -> Manifest:
    """The manifest of a pair. Raises OutputError as `require_output`, and for a merged model or converted adapter."""
    output = require_output(folder, given)
    if isinstance(output, Manifest):
        return output
    what = "a merged model" if isinstance(output, MergeResult) else "a converted adapter"
    raise OutputError(f"{given} is {what}, not a pair", hint=f"name what it was made of: {output.pair}")
