"""Check an adapter against the manifest of its residual base: adapter_config.json, names, shapes and values."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from milora_init.checkpoint.header import TensorInfo, read_header
from milora_init.errors import CheckpointError, MiloraError, PlanError
from milora_init.hub.source import is_repository
from milora_init.lora.compatibility import (
    OTHER_OUTPUT_HINT,
    UNTRAINED,
    explain_other_class,
    is_untrained,
    modules_not_trained_from,
    other_base_in_config,
    summarise_modules,
)
from milora_init.lora.folder import (
    CONFIG_FILE,
    EXTRA_WEIGHT_KEYS,
    UNSUPPORTED_KEYS,
    WEIGHTS_FILE,
    expected_tensors,
    open_factors,
    read_config,
)
from milora_init.lora.targets import resolve_target_modules
from milora_init.lora.tensor_layout import initial_block, parse_lora_key, parse_magnitude_key
from milora_init.manifest import WeightRecord
from milora_init.methods import Factors
from milora_init.verification.files import KEEP_A_COPY, MAKE_AGAIN, Pair
from milora_init.verification.verdict import Finding, note

# Fields that decide what the pair computes. A trainer may change all others: lora_dropout, task_type, ...
_FIELDS = ("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "init_lora_weights", "bias")
_BESIDE_FACTORS = ("bias", *EXTRA_WEIGHT_KEYS)  # a trainer may train these too
_PATTERNS = ("rank_pattern", "alpha_pattern")
_MOST_NAMES = 3  # in one message
_MOST_MODULES = 20  # with a finding of their own; more are one finding
# An edit of the config would not help: the factors were trained for the function that it describes.
_TRAIN_AGAIN = "train again from the initial adapter, with its config unchanged"
_KEPT = "trained beside the factors, and kept by merge and convert"


def check_adapter_config(pair: Pair, modules: Collection[str], trained: Path | None = None) -> list[Finding]:
    """The fields of adapter_config.json that decide what PEFT or a server computes must be those of the manifest.

    Args:
        pair: The folder.
        modules: Names of all modules of the model.
        trained: The adapter_config.json of a trained adapter; the one in the pair if None.
    """
    name = pair.adapter_files[0] if trained is None else str(trained)
    try:
        config = read_config(trained or pair.folder / name)
    except CheckpointError as error:
        return [Finding(name, error.message, MAKE_AGAIN if trained is None else error.hint)]
    wanted = pair.manifest.adapter
    findings = []
    for key in _FIELDS:
        if config.get(key) != wanted[key]:
            if trained is not None and key in _BESIDE_FACTORS:
                findings.append(note(name, f"{key} is {config.get(key)!r}: {_KEPT}"))
                continue
            what = f"{key} is {config.get(key)!r}, this output was made with {wanted[key]!r}"
            findings.append(Finding(name, what, _set_field(key, wanted[key]) if trained is None else _TRAIN_AGAIN))
    for key in _PATTERNS:
        if (config.get(key) or {}) != (wanted[key] or {}):
            what = f"{key} is {config.get(key)!r}, this output was made with {wanted[key]!r}"
            findings.append(Finding(name, what, _set_field(key, wanted[key])))
    for key in (*EXTRA_WEIGHT_KEYS, *UNSUPPORTED_KEYS):
        if config.get(key) and config[key] != wanted.get(key):
            if trained is not None and key in _BESIDE_FACTORS:
                findings.append(note(name, f"{key} is {config[key]!r}: {_KEPT}"))
                continue
            what = f"{key} is {config[key]!r}, which this adapter was not made for"
            findings.append(Finding(name, what, f"remove {key}" if trained is None else _TRAIN_AGAIN))
    findings += _check_targets(name, config, wanted, modules)
    path = config.get("base_model_name_or_path")
    if pair.manifest.method.writes_base:
        findings += _check_base_path(name, path, pair, trained=trained is not None)
    else:
        findings += _check_model_path(name, path, pair)
    return findings


def _set_field(key: str, value: object) -> str:
    return f'set "{key}": {json.dumps(value)}'


def _check_targets(
    name: str, config: Mapping[str, Any], wanted: Mapping[str, Any], modules: Collection[str]
) -> list[Finding]:
    """target_modules may be written in another way, but must name the same modules."""
    findings = []
    if config.get("target_modules") != wanted["target_modules"]:
        hint = _set_field("target_modules", wanted["target_modules"])
        try:
            named = resolve_target_modules(config.get("target_modules"), modules)
            if differing := sorted(named ^ resolve_target_modules(wanted["target_modules"], modules)):
                first = f"{'hits' if differing[0] in named else 'misses'} {differing[0]}"
                what = f"target_modules {first}; {len(differing)} modules differ from those of this output"
                findings.append(Finding(name, what, hint))
        except ValueError as error:
            findings.append(Finding(name, f"target_modules: {error}", hint))
    parameters = wanted.get("target_parameters", [])
    if set(config.get("target_parameters") or ()) != set(parameters):
        what = f"target_parameters is {config.get('target_parameters')!r}, this output was made with {parameters!r}"
        findings.append(Finding(name, what, _set_field("target_parameters", parameters)))
    return findings


def _check_base_path(name: str, path: object, pair: Pair, *, trained: bool) -> list[Finding]:
    """base_model_name_or_path must be this folder, the recorded one, or a repository on the Hub.

    A trained adapter may name another place, where its base was during the training: its factors tell the base.
    """
    key = "base_model_name_or_path"
    recorded, original = pair.manifest.adapter[key], pair.manifest.source["model"]
    hint = _set_field(key, pair.given)
    if isinstance(path, str) and path and Path(path).resolve() == pair.folder.resolve():
        return []
    if path == pair.given.partition("@")[0] and not Path(pair.given).exists():  # fetched from this repository
        return []
    if isinstance(path, str) and path == original:
        return [Finding(name, f"{key} is the original model {path}, not the residual base", hint)]
    if path == recorded:
        return [note(name, f"{key} is {path}, where the pair was made, not this folder; to load it from here, {hint}")]
    if isinstance(path, str) and is_repository(path) and not Path(path).exists():
        return [note(name, f"{key} is {path}, a repository on the Hub, as `milora-init push` writes it")]
    if trained and isinstance(path, str) and path and not other_base_in_config({key: path}, pair.manifest):
        return [note(name, f"{key} is {path}, not {pair.given}: the factors tell what it was trained from")]
    return [Finding(name, f"{key} is {path!r}, not this base", hint)]


def _check_model_path(name: str, path: object, pair: Pair) -> list[Finding]:
    """base_model_name_or_path of an adapter of an original model must name that model, which may have been moved."""
    key = "base_model_name_or_path"
    recorded = pair.manifest.adapter[key]
    if path == recorded:
        return []
    hint = _set_field(key, recorded)
    if not isinstance(path, str) or not path:
        return [Finding(name, f"{key} is {path!r}, not the original model", hint)]
    if other_base_in_config({key: path}, pair.manifest):
        return [Finding(name, f"{key} is {path}, an output of milora-init, not the original model {recorded}", hint)]
    return [note(name, f"{key} is {path}; the adapter was made for {recorded}")]


def check_adapter_header(
    path: Path, records: Sequence[WeightRecord], *, trained: bool = False, dora: bool = False
) -> list[Finding]:
    """The tensors of an adapter's file must have the names and shapes of the weights' factors.

    One finding stands for all tensors with the same problem. A trained adapter may hold other tensors beside its
    factors, such as a classification head or resized embeddings (`modules_to_save`), and with `dora` the magnitudes of
    DoRA: these are a note.
    """
    try:
        tensors = read_header(path).tensors
    except MiloraError as error:
        return [Finding(str(path), error.message.removeprefix(f"{path}: "), error.hint)]
    wanted = expected_tensors(records)
    extra = sorted(key for key in tensors.keys() - wanted.keys() if trained and not _is_lora(key, dora=dora))
    missing, unexpected, resized = _differing_tensors({k: v for k, v in tensors.items() if k not in extra}, wanted)
    findings = []
    if extra:
        more = f" and {len(extra) - _MOST_NAMES} more" if len(extra) > _MOST_NAMES else ""
        findings.append(note(str(path), f"{', '.join(extra[:_MOST_NAMES])}{more}: {_KEPT}"))
    hint = OTHER_OUTPUT_HINT if trained else KEEP_A_COPY

    def add(keys: list[str], what: str) -> None:
        more = f", and {len(keys) - 1} more like it" if keys[1:] else ""
        findings.append(Finding(keys[0], what + more, hint))

    if missing:
        add(missing, f"missing in {path}")
    if unexpected:
        parsed = parse_lora_key(unexpected[0])
        of = (
            f"{parsed[0]}, which is not adapted in this output"
            if parsed
            else "no module: its name is not one that PEFT gives a factor"
        )
        add(unexpected, f"in {path} belongs to {of}")
    if resized:
        add(resized, f"is {list(tensors[resized[0]].shape)}, expected {list(wanted[resized[0]])}")
    return findings


def _is_lora(key: str, *, dora: bool) -> bool:
    return ".lora_" in key and not (dora and parse_magnitude_key(key))


def _differing_tensors(
    tensors: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, that are not wanted, and that have another shape."""
    resized = sorted(key for key in wanted.keys() & tensors.keys() if tensors[key].shape != wanted[key])
    return sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys()), resized


def check_initial_factors(pair: Pair) -> list[Finding]:
    """Most modules of the adapter in the pair must have the singular values that the manifest records.

    Raises:
        CheckpointError: A file that cannot be read.
    """
    records = pair.manifest.weights
    with open_factors(pair.weights) as factors:
        of = pair.manifest.method.factors
        differing = sum(_has_other_singular_values(*factors.read(record), record, of) for record in records)
    if differing <= len(records) / 2:
        return []
    if of in ("right", "left"):
        what = "it is not the initial adapter that the manifest describes: it was trained in place, or replaced"
        return [Finding(pair.adapter_files[1], what, KEEP_A_COPY, "replaced_adapter")]
    what = "its singular values are not those in the manifest: the adapter was trained in place, or is of another base"
    return [Finding(pair.adapter_files[1], what, KEEP_A_COPY, "replaced_adapter")]


def _has_other_singular_values(B: Tensor, A: Tensor, record: WeightRecord, factors: Factors) -> bool:
    """Whether the first or the last singular value of a module's B (m, R) and A (R, n) is not the recorded one.

    In an initial adapter column j of B and row j of A have lengths whose product is a singular value, or with
    orthonormal factors 1. With `right` and `left` factors one of both is zero, and the lengths of the other are 1.
    """
    B, A = initial_block(B.double(), A.double(), record.rank, record.expert)
    if factors in ("right", "left"):
        kept, zero = (A.norm(dim=1), B) if factors == "right" else (B.norm(dim=0), A)
        return bool(zero.any()) or not float((kept - 1).abs().max()) <= 1e-4
    s = record.scale * B.norm(dim=0) * A.norm(dim=1)
    first, last = (record.s_first, record.s_last) if factors == "balanced" else (record.scale, record.scale)
    tolerance = 1e-4 * first + (1e-12 * record.s_max if factors == "balanced" else 0.0)
    errors = (float(s.max()) - first, float(s.min()) - last)
    return not all(abs(error) <= tolerance for error in errors)


def check_trained_adapter(
    pair: Pair, folder: Path, modules: Collection[str], *, compare_values: bool, initial: bool
) -> tuple[list[Finding], bool]:
    """A trained adapter must fit an output, and must have been trained from its initial adapter.

    Args:
        pair: The folder of the output.
        folder: The trained adapter.
        modules: Names of all modules of the model.
        compare_values: Compare its factors with those in the output, which must be readable.
        initial: Whether those in the output are still the initial ones.

    Returns:
        The findings, and whether it is trained: not, if it holds the initial factors alone, which is a note.

    Raises:
        CheckpointError: An initial adapter that cannot be read.
    """
    findings = _check_trained(pair, folder, modules, compare_values=compare_values)
    weights, untrained = folder / WEIGHTS_FILE, False
    with suppress(MiloraError):  # what cannot be read is a finding already
        untrained = initial and compare_values and weights.is_file() and is_untrained(pair.weights, weights)
    return ([note(str(weights), UNTRAINED)] if untrained else []) + findings, not untrained


def _check_trained(pair: Pair, folder: Path, modules: Collection[str], *, compare_values: bool) -> list[Finding]:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if missing := [path for path in (config, weights) if not path.is_file()]:
        hint = "name a folder that save_pretrained wrote"
        return [Finding(str(path), "missing", hint, "adapter_misfit") for path in missing]
    records = pair.manifest.weights
    with suppress(MiloraError):  # a header that cannot be read is a finding below
        adapted = {parsed[0] for parsed in map(parse_lora_key, read_header(weights).tensors) if parsed}
        if found := explain_other_class({record.key for record in records}, adapted, pair.manifest):
            return [Finding(str(weights), *found, "adapter_misfit")]
    findings = check_adapter_config(pair, modules, config)
    dora = False
    with suppress(CheckpointError):  # a config that cannot be read is a finding above
        dora = bool(read_config(config).get("use_dora"))
    header_findings = check_adapter_header(weights, records, trained=True, dora=dora)
    findings += header_findings
    other_base = ""
    with suppress(CheckpointError):  # a config that cannot be read is a finding above
        other_base = other_base_in_config(read_config(config), pair.manifest)
    foreign = bool(other_base) or _most_factors_differ(weights, records)
    if compare_values and not any(finding.problem for finding in header_findings):
        unrelated: dict[str, str] = {}
        try:
            unrelated = modules_not_trained_from(pair.weights, weights, records)
        except PlanError as error:
            findings.append(Finding(str(weights), error.message.removeprefix(f"{weights}: "), error.hint))
        foreign = foreign or len(unrelated) > len(records) / 2
        if (foreign and unrelated) or len(unrelated) > _MOST_MODULES:
            findings.append(Finding(str(weights), summarise_modules(unrelated), OTHER_OUTPUT_HINT))
        else:
            what = "unrelated to the initial adapter of this output"
            findings += [Finding(module, f"{what}: {why}", OTHER_OUTPUT_HINT) for module, why in unrelated.items()]
    if foreign:  # the hints of the checks would only make it look as if it were of this base
        hint = f"by its config it was trained from {other_base}: give that" if other_base else OTHER_OUTPUT_HINT
        return [replace(f, hint=hint, problem="foreign_adapter") if f.problem else f for f in findings]
    return [replace(f, problem="adapter_misfit") if f.problem else f for f in findings]


def _most_factors_differ(path: Path, records: Sequence[WeightRecord]) -> bool:
    """Whether more factors of an adapter's file differ in name or shape than the base has weights.

    A file that cannot be read says nothing about its base.
    """
    try:
        tensors = read_header(path).tensors
    except MiloraError:
        return False
    factors = {key: info for key, info in tensors.items() if _is_lora(key, dora=True)}
    return sum(map(len, _differing_tensors(factors, expected_tensors(records)))) > len(records)
