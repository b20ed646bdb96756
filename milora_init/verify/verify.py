"""Judge a folder: does it hold a residual base and an adapter that belong together, and if not, what is wrong?

The manifest says what was written. Files are compared with it by size and SHA-256, and module names with the model
that config.json builds. adapter_config.json is compared key by key, because trainers rewrite it and a push changes one
key. If the original model is given, `tensors` compares the tensors themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from milora_init.checkpoint.folder import SAFETENSORS_INDEX, Checkpoint, open_checkpoint, open_model
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import read_header
from milora_init.checkpoint.side_files import WEIGHT_SUFFIXES
from milora_init.errors import CheckpointError, MiloraError, PlanError, UsageError
from milora_init.hub.source import fetch_original
from milora_init.lora.compatibility import (
    OTHER_BASE,
    names_another_base,
    of_another_class,
    summarise_unrelated,
    unrelated_modules,
)
from milora_init.lora.folder import (
    EXTRA_WEIGHT_KEYS,
    LORA_CONFIG,
    LORA_FOLDER,
    LORA_WEIGHTS,
    UNSUPPORTED_KEYS,
    expected_tensors,
    open_factors,
    read_config,
    read_lora,
)
from milora_init.lora.targets import resolve_target_modules
from milora_init.lora.tensor_layout import initial_block, parse_lora_key
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest, WeightRecord, read_manifest
from milora_init.model.adaptable import ModelStructure, read_structure
from milora_init.options import InitOptions
from milora_init.untrusted import path_inside
from milora_init.verify import tensors
from milora_init.verify.match_by_weights import MATCHES_NEITHER, match_by_weights
from milora_init.verify.match_by_weights import MATCHES_ORIGINAL as OF_THE_ORIGINAL
from milora_init.verify.match_by_weights import MATCHES_RESIDUAL as OF_THE_RESIDUAL
from milora_init.verify.tensors import Difference

PAIR = "a matching pair: a residual base and its adapter"
TRAINED = "a matching pair: a residual base and an adapter trained on it"
FOREIGN = "a residual base with an adapter of another base"
ORIGINAL = "an original model with a residual's adapter"
BARE = "a residual base alone, which is not the original model"
UNRECORDED = "a residual base and its adapter, by their tensors; its manifest is gone"
UNFINISHED = "an unfinished output"
UNKNOWN = "not an output of milora-init, as far as can be told"
REPLACED = "a residual base, and in its lora/ another adapter: trained in place, or made with another base"
ELSEWHERE = "an output that was made from another source"
UNFIT = "a residual base, and a trained adapter that does not fit it as it is"
DAMAGED = "an output of milora-init that was changed"
_AGAIN = "make the output again: milora-init ... --overwrite, or fetch it again"
# What stands there may be hours of training.
_KEEP = "keep a copy of it if it was trained in place; the same options in another --out make the initial one again"
# What decides the function that the pair computes. Dropout and the like are the trainer's own business.
_FIELDS = ("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "init_lora_weights", "bias")
_NAMED, _LISTED = 3, 20
_PATTERNS = ("rank_pattern", "alpha_pattern")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found.

    Attributes:
        folder: As given.
        kind: What it is, in one line.
        differences: All that is not as it should be; empty if the folder is what it should be.
        notes: What is no fault and yet worth knowing.
        checked: What was looked at: files, modules, and tensors against which source.
    """

    folder: str
    kind: str
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    checked: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {"status": "ok" if self.ok else "differs", **asdict(self)}


def verify(
    out: str,
    *,
    model: str | None = None,
    revision: str | None = None,
    every: bool = False,
    trained: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Verdict:
    """Judge an output folder.

    Args:
        out: The folder.
        model: The source, to judge every tensor by: a folder or a Hub id.
        revision: Of the source; of the model that it was made of, the recorded commit if None.
        every: Solve every component anew from the source, not a sample of three.
        trained: The folder of a trained adapter, to judge by the base in `out`.
        trust_remote_code: Run the code in the folder if its config.json names it.
        cache_dir, token: For a source on the Hub.

    Raises:
        UsageError: `every` without a source.
        MiloraError: A folder that is not there, or a source that cannot be read.
    """
    if every and model is None:
        raise UsageError("--all needs the source to solve from", hint="add --against MODEL")
    folder = Path(out).expanduser()
    if not out or not folder.is_dir():
        raise UsageError(f"{out}: no such folder", hint="name the --out of a run of milora-init")
    if trained is not None and not (trained and Path(trained).expanduser().is_dir()):
        raise UsageError(f"{trained}: no such folder", hint="name the folder that the trainer saved")
    manifest = read_manifest(folder)
    if manifest is None:
        return _without_manifest(out, folder, trained, trust_remote_code)
    source = None
    if model is not None:
        source = InitOptions(model=model, out=out, revision=revision, cache_dir=cache_dir, token=token)
    return _Inspection(out, folder, manifest, trust_remote_code).verdict(source, every, trained)


def _without_manifest(out: str, folder: Path, trained: str | None, trusted: bool) -> Verdict:
    """A folder judged by what its tensors say, where nothing else does."""
    if (folder / WORK_FOLDER).is_dir():
        hint = "run the same command again: it resumes"
        missing = Difference(MANIFEST, "missing: it is written last, when all else is whole", hint)
        return Verdict(out, UNFINISHED, (missing,), (), {"files": 0})
    missing = Difference(
        MANIFEST, "missing: what was written is unknown", "if an output it is, get it back from where that was made"
    )
    lora = folder / LORA_FOLDER if (folder / LORA_CONFIG).is_file() else folder
    lora = Path(trained).expanduser() if trained else lora
    found = MATCHES_NEITHER
    # What cannot be read, or is nothing of ours, stays what it is: unknown.
    with suppress(MiloraError):
        base = open_checkpoint(folder)
        shapes = {name: info.shape for name, info in base.tensors.items()}
        read = read_lora(lora)
        structure = read_structure(folder, base.config, shapes, trust_remote_code=trusted)
        if structure.other_class and read.modules.keys().isdisjoint(structure.modules):
            structure = read_structure(folder, base.config, shapes, trust_remote_code=trusted, text_only=True)
        found = match_by_weights(base, structure, read)
    if found == OF_THE_ORIGINAL:
        what = "the weights still hold the components that this adapter adds: they would count twice"
        hint = "put it beside the residual base it was made with; onto the original, trained: milora-init convert"
        return Verdict(out, ORIGINAL, (Difference(str(lora), what, hint), missing), (), {"files": 0})
    kind = UNRECORDED if found == OF_THE_RESIDUAL else UNKNOWN
    return Verdict(out, kind, (missing,), ("without a manifest nothing else was compared",), {"files": 0})


class _Inspection:
    """One folder under inspection; its differences as they are found."""

    def __init__(self, out: str, folder: Path, manifest: Manifest, trusted: bool) -> None:
        self.out, self.folder, self.manifest, self.trusted = out, folder, manifest, trusted
        self.records = {record.module: record for record in manifest.weights}
        self.notes: list[str] = []
        self.changed: set[str] = set()

    def verdict(self, original: InitOptions | None, every: bool, trained: str | None) -> Verdict:
        found = [*self.files(), *self.strangers()]
        checked: dict[str, Any] = {"files": len(self.manifest.files), "modules": len(self.records)}
        base, kind = None, DAMAGED
        try:
            base = open_checkpoint(self.folder)
            structure = self.structure(base)
            modules = structure.modules
            found += islice(tensors.misrecorded(base, self.manifest, structure), _LISTED)
        except MiloraError as error:
            found.append(Difference(self.out, error.message, error.hint or _AGAIN))
            modules = tuple(self.records)
        has_adapter = all((self.folder / name).is_file() for name in (LORA_CONFIG, LORA_WEIGHTS))
        readable = False
        if has_adapter:
            header_faults, _ = _header_faults(self.folder / LORA_WEIGHTS, self.manifest.weights)
            readable = not header_faults
            found += header_faults
            found += self.config_faults(self.folder / LORA_CONFIG, modules)
        if base is not None and self.changed and self.is_original(base):
            kind = ORIGINAL
            found.insert(0, Difference(self.out, "holds the source's weights, not the residual's", _AGAIN))
        elif not has_adapter and not self.changed & set(self.shards()):
            kind = BARE
        elif readable and LORA_WEIGHTS in self.changed and self.is_foreign():
            kind = REPLACED
            what = "its singular values are not those of this base's components: of another base, or trained since"
            found.append(Difference(LORA_WEIGHTS, what, _KEEP))
        if trained is not None:
            foreign, faults = self.judge_trained(Path(trained).expanduser(), modules, comparable=readable)
            kind = FOREIGN if foreign else kind if found else UNFIT
            found += faults
            checked["trained"] = trained
        if original is not None and base is not None and readable:
            source = open_model(fetch_original(self.manifest, original))
            by_source = list(
                tensors.compare_with_model(base, self.folder / LORA_WEIGHTS, source, self.manifest, every=every)
            )
            if not found and by_source and by_source[0].what == tensors.OTHER_SOURCE:
                kind = ELSEWHERE
            found += by_source
            checked |= {
                "against": original.model,
                "tensors": len(base.tensors),
                "components": "all" if every else "sample",
            }
        if not found:
            kind = PAIR if trained is None else TRAINED
        return Verdict(self.out, kind, tuple(found), tuple(self.notes), checked)

    def shards(self) -> list[str]:
        return [name for name in self.manifest.files if Path(name).suffix == ".safetensors" and "/" not in name]

    def files(self) -> Iterator[Difference]:
        """Every file of the manifest: there, of its size, with its hash. adapter_config.json is judged by its keys."""
        for name, size_bytes in {LORA_CONFIG: 0, LORA_WEIGHTS: 0, **self.manifest.files}.items():
            path = self.folder / name
            fault = ""
            try:
                path_inside(self.folder, name)
            except ValueError as error:
                self.changed.add(name)
                yield Difference(name, str(error), "put the file itself in its place, or fetch the output again")
                continue
            if not path.is_file():
                fault = "missing"
            elif name == LORA_CONFIG:
                continue
            elif (found := path.stat().st_size) != size_bytes:
                fault = f"{found} bytes, recorded are {size_bytes}"
            elif name not in self.manifest.hashes:
                fault = "no hash is recorded"
            elif sha256(path) != self.manifest.hashes[name]:
                fault = "its bytes were changed: another hash than recorded"
            if fault:
                self.changed.add(name)
                in_place = name == LORA_WEIGHTS and path.is_file()
                yield Difference(name, fault, _KEEP if in_place else _AGAIN)

    def strangers(self) -> Iterator[Difference]:
        """Weights that are not ours, and what would make transformers load something else than the base."""
        for path in sorted([*self.folder.iterdir(), *self.folder.glob(f"{LORA_FOLDER}/*")]):
            name = path.relative_to(self.folder).as_posix()
            if name in self.manifest.files or not path.is_file():
                continue
            weights = path.suffix.lower() in WEIGHT_SUFFIXES
            if weights or path.name == "adapter_config.json" or path.name.endswith(SAFETENSORS_INDEX):
                yield Difference(name, "not of this output, and could be loaded in its stead", f"move {name} away")

    def structure(self, base: Checkpoint) -> ModelStructure:
        shapes = {name: info.shape for name, info in base.tensors.items()}
        text_only = bool(self.manifest.inputs.get("text_only"))  # an older manifest does not say
        return read_structure(self.folder, base.config, shapes, trust_remote_code=self.trusted, text_only=text_only)

    def config_faults(self, path: Path, modules: tuple[str, ...], *, trained: bool = False) -> Iterator[Difference]:
        """The fields of an adapter_config.json that decide what a trainer or a server makes of it."""
        name = str(path) if trained else LORA_CONFIG
        try:
            config = read_config(path)
        except CheckpointError as error:
            yield Difference(name, error.message, error.hint if trained else _AGAIN)
            return
        # What was trained with another function has learnt for that one: an edit would make a third one of it.
        retrain = "train again from this base's lora/, without a change to it" if trained else ""
        wanted = self.manifest.adapter
        for key in _FIELDS:
            if config.get(key) != wanted[key]:
                what = f"{key} is {config.get(key)!r}, this base was made with {wanted[key]!r}"
                yield Difference(name, what, retrain or f'set "{key}": {json.dumps(wanted[key])}')
        for key in _PATTERNS:
            if (config.get(key) or {}) != (wanted[key] or {}):
                what = f"{key} is {config.get(key)!r}"
                yield Difference(name, what, f'set "{key}": {json.dumps(wanted[key])}')
        for key in UNSUPPORTED_KEYS:
            if config.get(key) and config[key] != wanted.get(key):
                if trained and key in EXTRA_WEIGHT_KEYS:
                    self.notes.append(f"{name}: merge and convert do not take: {key} = {config[key]!r}")
                    continue
                yield Difference(
                    name, f"{key} is {config[key]!r}, which this adapter was not made for", retrain or f"remove {key}"
                )
        if config.get("target_modules") != wanted["target_modules"]:
            hint = f'set "target_modules": {json.dumps(wanted["target_modules"])}'
            try:
                hit = resolve_target_modules(config.get("target_modules"), modules)
                if odd := sorted(hit ^ resolve_target_modules(wanted["target_modules"], modules)):
                    first = f"{'hits' if odd[0] in hit else 'misses'} {odd[0]}"
                    yield Difference(name, f"target_modules {first}, {len(odd)} differ in all", hint)
            except ValueError as error:
                yield Difference(name, f"target_modules: {error}", hint)
        parameters = wanted.get("target_parameters", [])
        if set(config.get("target_parameters") or ()) != set(parameters):
            what = f"target_parameters is {config.get('target_parameters')!r}"
            yield Difference(name, what, f'set "target_parameters": {json.dumps(parameters)}')
        yield from self.path_faults(name, config.get("base_model_name_or_path"))

    def path_faults(self, name: str, path: object) -> Iterator[Difference]:
        """base_model_name_or_path: this folder, or what it was recorded as, or the repository it was pushed to."""
        recorded, source = self.manifest.adapter["base_model_name_or_path"], self.manifest.source["model"]
        hint = f'set "base_model_name_or_path": {json.dumps(self.out)}'
        here = isinstance(path, str) and bool(path) and Path(path).resolve() == self.folder.resolve()
        if here:
            return
        if isinstance(path, str) and path == source:
            yield Difference(name, f"base_model_name_or_path is the original model {path}, not the residual base", hint)
        elif path == recorded:
            self.notes.append(
                f"{name}: base_model_name_or_path is {path}, from where it was made; to follow it, {hint}"
            )
        elif isinstance(path, str) and _HUB_ID.fullmatch(path) and not Path(path).exists():
            self.notes.append(f"{name}: base_model_name_or_path is {path}, as after a push")
        else:
            yield Difference(name, f"base_model_name_or_path is {path!r}, not this base", hint)

    def is_original(self, base: Checkpoint) -> bool:
        """Whether the files of weights are those that the output was made from."""
        changed = base.headers.keys() & self.changed or base.headers.keys() - self.manifest.files.keys()
        return bool(changed) and base.has_weights(self.manifest.inputs["source"])

    def is_foreign(self) -> bool:
        """Whether most of an adapter's modules have other singular values than recorded."""
        with open_factors(self.folder / LORA_WEIGHTS) as factors:
            others = sum(_is_other(*factors.read(record), record) for record in self.manifest.weights)
        return others > len(self.records) / 2

    def judge_trained(
        self, folder: Path, modules: tuple[str, ...], *, comparable: bool
    ) -> tuple[bool, list[Difference]]:
        """Whether a trained adapter is of another base, and all that does not fit this one."""
        config, weights = (folder / Path(name).name for name in (LORA_CONFIG, LORA_WEIGHTS))
        found = [Difference(str(path), "missing", "name a folder that save_pretrained wrote")
                 for path in (config, weights) if not path.is_file()]  # fmt: skip
        if found:
            return False, found
        with suppress(MiloraError):  # of a file that cannot be read, below
            named = {key[0] for key in map(parse_lora_key, read_header(weights).tensors) if key}
            own = {record.key for record in self.manifest.weights}
            if told := of_another_class(own, named, self.manifest):
                return False, [Difference(str(weights), *told)]
        found += self.config_faults(config, modules, trained=True)
        faults, count = _header_faults(weights, self.manifest.weights, beside=self.notes)
        found += faults
        foreign = count > len(self.records)  # a file that cannot be read at all says nothing of its base
        with suppress(CheckpointError):  # which is among the faults
            foreign = foreign or bool(names_another_base(read_config(config), self.manifest))
        if comparable and not faults:
            try:
                odd = unrelated_modules(weights, self.folder / LORA_WEIGHTS, self.manifest.weights)
            except PlanError as error:
                found.append(Difference(str(weights), error.message.removeprefix(f"{weights}: "), error.hint))
                odd = {}
            foreign = foreign or len(odd) > len(self.records) / 2
            if odd:
                found.append(Difference(str(weights), summarise_unrelated(odd), OTHER_BASE))
                some = list(odd.items())[:_LISTED]
                found += [Difference(module, f"unrelated: {why}", OTHER_BASE) for module, why in some]
        # A change to its config would make a foreign adapter look like this base's.
        return foreign, [replace(fault, hint=OTHER_BASE) for fault in found] if foreign else found


def _is_other(B: Tensor, A: Tensor, record: WeightRecord) -> bool:
    """Whether a weight's factors have other singular values than recorded."""
    B, A = initial_block(B.double(), A.double(), record.rank, record.expert)
    s = record.scale * B.norm(dim=0) * A.norm(dim=1)
    slack = 1e-4 * record.s_first + 1e-12 * record.s_max
    ends = (float(s.max()) - record.s_first, float(s.min()) - record.s_last)
    return not all(abs(off) <= slack for off in ends)


def _header_faults(
    path: Path, records: tuple[WeightRecord, ...], *, beside: list[str] | None = None
) -> tuple[list[Difference], int]:
    """Keys and shapes of an adapter file that do not fit the modules, one of each kind, and how many there are.

    With `beside`, tensors that are no factors are no fault: they are named there.
    """
    try:
        tensors = read_header(path).tensors
    except MiloraError as error:
        return [Difference(str(path), error.message, error.hint)], 1
    wanted = expected_tensors(records)
    missing, strange = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    odd = sorted(key for key in wanted.keys() & tensors.keys() if tensors[key].shape != wanted[key])
    others = [key for key in strange if ".lora_" not in key] if beside is not None else []
    if beside is not None and others:
        strange = [key for key in strange if ".lora_" in key]
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        beside.append(f"{path}: merge and convert do not take: {', '.join(others[:_NAMED])}{more}")
    faults = []

    def add(keys: list[str], what: str) -> None:
        more = f", and {len(keys) - 1} more like it" if keys[1:] else ""
        faults.append(Difference(keys[0], what + more, "name the base that this adapter was made for"))

    if missing:
        add(missing, f"missing in {path}")
    if strange:
        named = parse_lora_key(strange[0])
        add(strange, f"{path} adapts {named[0] if named else 'what is no module'}, not this base's")
    if odd:
        add(odd, f"is {list(tensors[odd[0]].shape)}, expected {list(wanted[odd[0]])}")
    return faults, len(missing) + len(strange) + len(odd)
