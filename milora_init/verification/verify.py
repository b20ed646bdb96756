"""Verify a folder: does it hold a residual base and an adapter that belong together, and if not, what is wrong?

Every check is a function that returns its findings. They compare the folder with its manifest, milora_init.json; if the
original model is given, they also compare every tensor with it. `verdict_code` derives the verdict from the findings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_init.checkpoint.folder import Checkpoint, open_checkpoint, open_model
from milora_init.errors import MiloraError, UsageError
from milora_init.hub.pair import locate_adapter, locate_output
from milora_init.hub.source import fetch_original, require_model_of_revision
from milora_init.manifest import Manifest
from milora_init.model.adaptable import ModelStructure, read_structure
from milora_init.options import InitOptions
from milora_init.records import MergeResult, read_output, require_no_part
from milora_init.verification.adapter import (
    check_adapter_config,
    check_adapter_header,
    check_initial_factors,
    check_trained_adapter,
)
from milora_init.verification.files import (
    MAKE_AGAIN,
    Pair,
    check_files,
    check_original_weights,
    check_stray_files,
    check_weight_records,
)
from milora_init.verification.original import verify_adapter
from milora_init.verification.plain import verify_plain
from milora_init.verification.tensors import compare_with_model
from milora_init.verification.verdict import Finding, Verdict, verdict_code
from milora_init.verification.without_manifest import verify_without_manifest

_MOST_RECORDS = 20  # that differ and are listed


def verify(  # noqa: PLR0913  the options of the command
    pair: str,
    *,
    model: str | None = None,
    revision: str | None = None,
    all_components: bool = False,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Verdict:
    """Verify what milora-init wrote: a pair, an adapter of an original model, a merged model or a converted adapter.

    Args:
        pair: The folder that milora-init wrote, or its Hub id.
        model: The original model, to compare with: a folder or a Hub id. Of a pair every tensor is compared.
        revision: Branch, tag or commit of `model`. None is the recorded commit if `model` is the recorded name.
        all_components: Compute every component again from the model, not a sample of three.
        adapter: A trained adapter, to check against the base: a folder or a Hub id.
        trust_remote_code: Run the code in the folder if its config.json names it.
        cache_dir: The Hub's cache.
        token: The Hub's access token.

    Raises:
        UsageError: A folder that is not there, `all_components` without `model`, or an option that this kind of output
            does not have.
        CheckpointError: A model that cannot be read.
        OutputError: A record, such as milora_init.json, that cannot be read.
        HubError: The Hub refused, or cannot be reached.
    """
    if all_components and model is None:
        raise UsageError("--all needs the original model to compute the components from", hint="add --model MODEL")
    require_model_of_revision(model, revision)
    folder = locate_output(pair, cache_dir=cache_dir, token=token)
    trained = None if adapter is None else locate_adapter(adapter, cache_dir=cache_dir, token=token)
    output = read_output(folder)
    if output is None:
        require_no_part(folder, pair)
        return verify_without_manifest(pair, folder, trained, trust_remote_code=trust_remote_code)
    original = None
    if model is not None:
        original = InitOptions(model=model, out=pair, revision=revision, cache_dir=cache_dir, token=token)
    if not isinstance(output, Manifest):
        if all_components or adapter is not None:
            option, value = ("--all", "") if all_components else ("--adapter", f" {adapter}")
            what = "a merged model" if isinstance(output, MergeResult) else "a converted adapter"
            raise UsageError(
                f"{pair} is {what}: {option} is for the pair that it was made from",
                hint=f"drop {option}, or name that pair: milora-init verify {output.pair} {option}{value}",
            )
        return verify_plain(pair, folder, output, original)
    if not output.method.writes_base:
        return verify_adapter(
            Pair(pair, folder, output), original, trained, given_adapter=adapter, all_components=all_components
        )
    return _verify(
        Pair(pair, folder, output),
        original,
        trained,
        given_adapter=adapter,
        all_components=all_components,
        trust_remote_code=trust_remote_code,
    )


def _verify(
    pair: Pair,
    original: InitOptions | None,
    adapter: Path | None,
    *,
    given_adapter: str | None,
    all_components: bool,
    trust_remote_code: bool,
) -> Verdict:
    manifest = pair.manifest
    modules = tuple(record.module for record in manifest.weights)
    checked: dict[str, Any] = {"files": len(manifest.files), "modules": len(set(modules))}
    file_findings = check_files(pair)
    findings = [*file_findings, *check_stray_files(pair.folder, manifest.files)]
    base = None
    try:
        base = open_checkpoint(pair.folder)
        structure = _read_structure(pair, base, trust_remote_code=trust_remote_code)
        modules = structure.modules
        findings += check_weight_records(base, manifest, structure)[:_MOST_RECORDS]
    except MiloraError as error:
        findings.append(Finding(pair.given, error.message, error.hint or MAKE_AGAIN))

    has_adapter = all((pair.folder / name).is_file() for name in pair.adapter_files)
    readable = False
    if has_adapter:
        header_findings = check_adapter_header(pair.weights, manifest.weights)
        readable = not header_findings
        findings += [*header_findings, *check_adapter_config(pair, modules)]
    of_original = check_original_weights(pair, base, file_findings) if base is not None else []
    findings = [*of_original, *findings]  # first, because it explains the others
    is_initial = not any(finding.where == pair.adapter_files[1] for finding in file_findings)
    if readable and not of_original and not is_initial:
        findings += check_initial_factors(pair)

    trained = False
    if adapter is not None:
        of_adapter, trained = check_trained_adapter(pair, adapter, modules, compare_values=readable, initial=is_initial)
        findings += of_adapter
        checked["adapter"] = given_adapter
    if original is not None and base is not None and readable:
        model = open_model(fetch_original(manifest.source["model"], manifest.source["revision"], original))
        findings += compare_with_model(
            base, pair.weights, model, manifest, given=original.model, all_components=all_components
        )
        components = "all" if all_components else "sample"
        checked |= {"model": original.model, "tensors": len(base.tensors), "components": components}
    code = verdict_code(findings, trained=trained)
    return Verdict(pair.given, code, tuple(dict.fromkeys(findings)), checked, manifest.fingerprint, manifest.source)


def _read_structure(pair: Pair, base: Checkpoint, *, trust_remote_code: bool) -> ModelStructure:
    shapes = {name: info.shape for name, info in base.tensors.items()}
    text_only = bool(pair.manifest.inputs.get("text_only"))  # older manifests have no such key
    return read_structure(pair.folder, base.config, shapes, trust_remote_code=trust_remote_code, text_only=text_only)
