"""Verify a merged model or a converted adapter: its files against its record, and the record against the original."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from milora_init.checkpoint.folder import open_checkpoint, open_model
from milora_init.errors import MiloraError, UsageError
from milora_init.hub.source import fetch_original
from milora_init.options import InitOptions
from milora_init.records import ConvertResult, MergeResult
from milora_init.untrusted import path_inside
from milora_init.verification.files import changed_file, check_stray_files
from milora_init.verification.tensors import compare_merged, model_hint
from milora_init.verification.verdict import Code, Finding, Verdict, note

_MOST_TENSORS = 20  # that differ and are listed


def verify_plain(
    given: str, folder: Path, output: MergeResult | ConvertResult, original: InitOptions | None
) -> Verdict:
    """The verdict on a merged model or a converted adapter.

    With the original model: it must be the one that the output was made of; and the tensors of a merged model are
    compared with it, see `compare_merged`.

    Args:
        given: The folder or Hub id as the user wrote it.
        folder: The folder.
        output: Its record.
        original: Names the original model; None to compare files only.

    Raises:
        UsageError: An original model is given, and the record does not say which one it was.
        CheckpointError: A file that cannot be read.
        HubError: The original model cannot be fetched.
    """
    code: Code
    damaged: Code
    code, damaged = ("merged", "damaged_merged") if isinstance(output, MergeResult) else (
        "converted", "damaged_converted"
    )  # fmt: skip
    what_it_is = "merged model" if isinstance(output, MergeResult) else "converted adapter"
    if original is not None and not output.source_files:
        raise UsageError(
            f"{given} was converted without a milora_init.json: nothing says which original model it is for",
            hint="drop --model",
        )
    checked: dict[str, Any] = {"files": len(output.files)}
    findings = [*_check_files(folder, output), *check_stray_files(folder, output.files, what_it_is)]
    if isinstance(output, MergeResult):
        try:
            open_checkpoint(folder)
        except MiloraError as error:
            findings.append(Finding(given, error.message, error.hint))
    if findings:
        code = damaged
    elif original is not None:
        checked["model"] = original.model
        findings, code = _compare_with_original(folder, output, original, checked, code, damaged)
        if code == "merged" and isinstance(output, MergeResult) and not output.initial:
            what = f"a trained adapter was merged: its {len(output.tensors)} tensors are not the original's"
            findings = [note(given, what)]
    source = {"model": output.model, "revision": output.revision}
    return Verdict(given, code, tuple(findings), checked, output.fingerprint, source)


def _check_files(folder: Path, output: MergeResult | ConvertResult) -> list[Finding]:
    """Every file of the record must be there, with its size and SHA-256."""
    again = "merge" if isinstance(output, MergeResult) else "convert"
    findings = []
    for name, size_bytes in output.files.items():
        what, hint = "", f"{again} again with --overwrite, or download it again"
        try:
            path = path_inside(folder, name)
        except ValueError as error:
            what, hint = str(error), "replace the link by the file itself, or download it again"
        else:
            what = changed_file(path, size_bytes, output.hashes[name], "record") if path.is_file() else "missing"
        if what:
            findings.append(Finding(name, what, hint))
    return findings


def _compare_with_original(
    folder: Path,
    output: MergeResult | ConvertResult,
    original: InitOptions,
    checked: dict[str, Any],
    code: Code,
    damaged: Code,
) -> tuple[list[Finding], Code]:
    """What differs from the original model, and the verdict."""
    model = open_model(fetch_original(output.model, output.revision, original))
    if not model.has_weights(output.source_files):
        what = "not the files that it was made from: another model, or another commit"
        return [Finding(original.model, what, model_hint(output.model), "other_model")], "other_model"
    if isinstance(output, ConvertResult):
        return [], code
    merged = open_checkpoint(folder)
    checked["tensors"] = len(merged.tensors)
    compared = compare_merged(merged, model, output.tensors, initial=output.initial, changed=output.changed)
    findings = list(islice(compared, _MOST_TENSORS))
    if findings:
        return findings, damaged
    return [], code
