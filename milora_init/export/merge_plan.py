"""Plan a merge from the headers and the manifest: every tensor and every file of the merged model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from milora_init import __version__
from milora_init.checkpoint.files import Stamp, read_bytes, stamp
from milora_init.checkpoint.folder import SAFETENSORS_INDEX, SAFETENSORS_SINGLE, Checkpoint, open_model
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import FLOATS, SAFETENSORS_DTYPES, Header, TensorInfo, plan_header, safetensors_name
from milora_init.checkpoint.quantised_tensors import QuantisedTensors
from milora_init.checkpoint.side_files import travels
from milora_init.errors import CheckpointError, PlanError
from milora_init.export.tokenizer import Tokenizer, choose_tokenizer, is_tokenizer_file
from milora_init.export.trained_parameters import NewTensor, TrainedParameters, trained_parameters
from milora_init.lora.compatibility import (
    OTHER_OUTPUT_HINT,
    is_untrained,
    require_initial_adapter,
    require_same_modules,
    require_trained_on,
)
from milora_init.lora.folder import LoraAdapter, adapter_files, adapter_folder, expected_tensors, read_lora
from milora_init.manifest import MANIFEST, Manifest, WeightRecord, fingerprint, require_inside
from milora_init.model.adaptable import read_structure
from milora_init.plan.finished import copied_side_files
from milora_init.plan.output_files import config_with_dtype, plain_config, target_name, with_dtype
from milora_init.plan.quantised_base import dense_layout, stored_layout
from milora_init.records import ORIGINAL_MODEL, require_pair
from milora_init.verification.files import check_weight_records

_FETCH_AGAIN = "fetch the output again, from somebody you trust"


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How the merged model is written.

    Attributes:
        dtype: The dtype of the weights, by torch's name; `auto` for that of the original model.
        shard_bytes: The largest size of a file; None to divide the tensors into files as the base does.
        tokenizer: The folder of the tokenizer to write. None for the base's; after a resize of the vocabulary, for the
            one in the folder of the trained adapter, if it has one.
        overwrite: Whether an earlier merge may be replaced.
    """

    dtype: str = "auto"
    shard_bytes: int | None = None
    tokenizer: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class TensorTask:
    """How a tensor of the merged model is made, where it is not a copy of the base's bytes.

    Without weights and trained values it is the tensor of the base in another dtype, or dequantised.

    Attributes:
        source: The tensor of the base; None if the adapter's file has all of it.
        weights: The adapted weights in it; experts are several in one tensor.
        new: The trained values that replace it; None where there are none.
    """

    source: str | None
    weights: tuple[WeightRecord, ...] = ()
    new: NewTensor | None = None


@dataclass(frozen=True)
class MergePlan:
    """What is to be merged, and what is written: a `run.output_folder.OutputPlan`.

    Attributes:
        base: The residual base, or the original model where the method writes no base; its headers read.
        manifest: Of the pair.
        given: The pair as the user named it.
        adapter: The adapter, its header read.
        tasks: The tensors that are no copies, by their name in the output.
        headers: Of each shard of the output, by its name.
        sources: The files of the base that the tensors of each shard of the output are in.
        companions: Further files of the base that are read for a shard: they hold parts of its quantised tensors.
        side_files: The files that are copied, each with its folder and size: tokenizer, licence, code.
        config_bytes: Content of config.json.
        index: Content of the index; None for a model of one file.
        trained: What was trained beside the factors.
        notices: What the user should know before the model is used.
        untrained: Whether the adapter that was given holds the initial factors alone.
        options: How it is written.
    """

    base: Checkpoint
    manifest: Manifest
    given: str
    adapter: LoraAdapter
    tasks: Mapping[str, TensorTask]
    headers: Mapping[str, Header]
    sources: Mapping[str, Sequence[str]]
    companions: Mapping[str, Sequence[str]]
    side_files: Mapping[str, tuple[Path, int]]
    config_bytes: bytes
    index: bytes | None
    trained: TrainedParameters
    notices: Sequence[str] = ()
    untrained: bool = False
    options: MergeOptions = field(default_factory=MergeOptions)

    @property
    def source(self) -> Path:
        return self.base.folder

    def stamps(self, names: Iterable[str]) -> dict[Path, Stamp]:
        """Each of these files of the base, with its stamp when it was planned."""
        return {self.source / name: self.base.stamps[name] for name in names}

    @property
    def overwrite(self) -> bool:
        return self.options.overwrite

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        options = self.options
        return {
            "merge": __version__,
            "source": self.manifest.fingerprint,
            "adapter": self.adapter.digest,
            "scales": {module: factors.scale for module, factors in self.adapter.modules.items()},
            **({} if self.manifest.method.writes_base else {"base": ORIGINAL_MODEL}),
            **({} if options.dtype == "auto" else {"dtype": options.dtype}),
            **({} if options.shard_bytes is None else {"shard_bytes": options.shard_bytes}),
            **({"tokenizer": tokenizer} if (tokenizer := self._tokenizer) else {}),
        }

    @property
    def _tokenizer(self) -> dict[str, str]:
        """The hashes of the tokenizer's files that are not the base's."""
        return {
            name: sha256(folder / name)
            for name, (folder, _) in self.side_files.items()
            if folder != self.source and is_tokenizer_file(name)
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @property
    def files(self) -> Sequence[str]:
        index = [] if self.index is None else [SAFETENSORS_INDEX]
        return [*self.headers, *index, *self.side_files, "config.json"]

    @property
    def required_disk_bytes(self) -> int:
        return self.weights_bytes + sum(size for _, size in self.side_files.values())

    @property
    def weights_bytes(self) -> int:
        """Size of all shards of the output."""
        return sum(header.file_bytes for header in self.headers.values())

    @property
    def changed(self) -> tuple[str, ...]:
        """The tensors that verify cannot compare with the original model's: retrained, added, left out or cast."""
        # The merge of a residual base keeps what is quantised; that of an original model writes it dense.
        base = self.base.stored if self.manifest.method.writes_base else self.base.tensors
        written = {name: info for header in self.headers.values() for name, info in header.tensors.items()}
        unmerged = {name: task for name, task in self.tasks.items() if not task.weights}
        cast = {name for name, task in unmerged.items() if task.new or written[name].dtype != base[name].dtype}
        if self.options.dtype != "auto":
            cast |= {name for name, task in self.tasks.items() if task.weights}
        return tuple(sorted(cast | (base.keys() ^ written.keys())))


def plan_merge(
    pair: Path,
    adapter: Path | None = None,
    *,
    options: MergeOptions = MergeOptions(),
    given: str | None = None,
    original: Checkpoint | None = None,
) -> MergePlan:
    """Read the headers of a base and an adapter, and check that they belong together. Raises as `merge.merge`.

    Args:
        pair: The folder.
        adapter: The trained adapter; None for the initial one.
        options: How the merged model is written.
        given: The pair as the user wrote it.
        original: The original model, where the method writes no base.
    """
    given = given or str(pair)
    manifest = require_pair(pair, given)
    config_name, weights_name = adapter_files(manifest.method)
    require_inside(pair, (*manifest.files, config_name, weights_name))
    checkpoint = open_model(pair) if original is None or manifest.method.writes_base else original
    _require_intact(pair, given, manifest, checkpoint)
    initial = read_lora(adapter_folder(pair, manifest.method), manifest.weights)
    require_initial_adapter(initial, manifest, given)
    lora = read_lora(adapter, manifest.weights) if adapter else initial
    if lora.path.resolve() != initial.path.resolve():
        require_same_modules(initial, lora, manifest)
        require_trained_on(lora, manifest, initial.weights)
    _require_fit(lora, manifest)
    config_bytes = _config(manifest, checkpoint)
    config = json.loads(config_bytes)
    trained = trained_parameters(lora, checkpoint, config, manifest)
    layout = _Layout(checkpoint, manifest, trained, options)
    tokenizer, notices = choose_tokenizer(options.tokenizer, lora.path, checkpoint.folder, trained.vocabulary)
    changed = _changed_config(config, trained, tokenizer, options.dtype)
    return MergePlan(
        base=checkpoint,
        manifest=manifest,
        given=given,
        adapter=lora,
        tasks=layout.tasks,
        headers=layout.headers,
        sources=layout.sources,
        companions=layout.companions,
        side_files=_side_files(pair, manifest, checkpoint, tokenizer),
        config_bytes=config_bytes if changed == config else (json.dumps(changed, indent=2) + "\n").encode(),
        index=layout.index(),
        trained=trained,
        notices=(*notices, *([f"it has a new head: load it with {trained.new_class}"] if trained.new_class else [])),
        untrained=adapter is not None and is_untrained(initial.weights, lora.weights),
        options=options,
    )


def _require_intact(pair: Path, given: str, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Check all files of a pair except the shards, which are hashed when they are read. Raises CheckpointError."""
    own = adapter_files(manifest.method)
    for name, size_bytes in manifest.files.items():
        if name in own:  # the adapter is checked with its manifest
            continue
        intact = (pair / name).is_file() and (pair / name).stat().st_size == size_bytes
        if intact and name not in checkpoint.headers:
            intact = sha256(pair / name) == manifest.hashes.get(name)
        if not intact:
            raise CheckpointError(f"{given}: {name} was changed or removed", hint=f"milora-init verify {given}")
    structure = None
    if any(record.transposed for record in manifest.weights):  # a square shape does not show whether it is transposed
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        with suppress(CheckpointError):  # an unknown class, or one with its own code: then only shapes are compared
            structure = read_structure(checkpoint.folder, checkpoint.config, shapes)
    for fault in check_weight_records(checkpoint, manifest, structure):
        raise CheckpointError(f"{pair / MANIFEST}: {fault.where} {fault.what}", hint=fault.hint)


def _require_fit(adapter: LoraAdapter, manifest: Manifest) -> None:
    """Raise PlanError for an adapter whose factors are not those of the base's weights."""
    expected = expected_tensors(manifest.weights)
    found = {name for factors in adapter.modules.values() for name in (factors.A, factors.B)}
    if differing := expected.keys() ^ found:
        raise PlanError(
            f"{adapter.path} and {manifest.out} differ in {len(differing)} tensors, {min(differing)} first",
            hint=OTHER_OUTPUT_HINT,
        )
    for name, shape in expected.items():
        if adapter.header.tensors[name].shape != shape:
            shapes = f"{list(adapter.header.tensors[name].shape)} in {adapter.path}, {list(shape)} in this output"
            raise PlanError(f"{name} is {shapes}", hint=OTHER_OUTPUT_HINT)
    if bool(adapter.config.get("fan_in_fan_out")) != bool(manifest.adapter["fan_in_fan_out"]):
        raise PlanError(f"{adapter.path}: fan_in_fan_out is not what this output was made with", hint=OTHER_OUTPUT_HINT)


class _Layout:
    """The tensors of the merged model, and the shards that they are written to.

    The tensors that a residual base keeps quantised stay so. Those of a quantised original model become dense.

    Args:
        base: The base.
        manifest: Of the pair.
        trained: What was trained beside the factors.
        options: How the model is written.

    Raises:
        PlanError: A tensor that stays quantised was trained as a whole; or one was adapted, and also trained so.
    """

    def __init__(self, base: Checkpoint, manifest: Manifest, trained: TrainedParameters, options: MergeOptions) -> None:
        self._base, self._trained = base, trained
        self._records: dict[str, list[WeightRecord]] = {}
        for record in manifest.weights:
            self._records.setdefault(record.tensor, []).append(record)
        self._main_dtype = self._find_main_dtype()
        self._dtype = None if options.dtype == "auto" else safetensors_name(options.dtype)
        self._layout, kept = dense_layout(base), QuantisedTensors({}, frozenset())
        if manifest.method.writes_base:
            self._layout, kept = stored_layout(base), base.quantised
        self._kept_parts = kept.part_names
        if name := min(trained.tensors.keys() & kept.tensors.keys(), default=None):
            raise PlanError(
                f"{name} was trained as a whole, and the base has it quantised; merge never quantises",
                hint="make the pair with --base dense to train it",
            )
        removed = trained.removed | {
            part.name for name in trained.removed & kept.tensors.keys() for part in kept.tensors[name].parts.values()
        }
        by_file = {
            file: [
                self._info(TensorInfo(name, dtype, shape, 0, 0))
                for name, dtype, shape in self._layout.entries(header)
                if name not in removed
            ]
            for file, header in base.headers.items()
        }
        files = {info.name: file for file, infos in by_file.items() for info in infos}
        for name, new in trained.tensors.items():
            if name not in base.tensors:
                file = files[new.source] if new.source else list(base.headers)[-1]
                files[name] = file
                like = base.tensors[new.source].dtype if new.source else self._main_dtype
                by_file[file].append(TensorInfo(name, self._cast(like), new.shape, 0, 0))
        self.tasks = self._make_tasks(info for infos in by_file.values() for info in infos)
        shards = self._same_files(by_file) if options.shard_bytes is None else _split(by_file, options.shard_bytes)
        self.headers = {name: self._header(name, infos) for name, infos in shards.items()}
        self.sources = {
            name: tuple(dict.fromkeys(files[info.name] for info in infos)) for name, infos in shards.items()
        }
        self.companions = {name: self._companions(infos, self.sources[name]) for name, infos in shards.items()}

    def _companions(self, infos: Iterable[TensorInfo], sources: Sequence[str]) -> tuple[str, ...]:
        """The files with parts of the tensors that become dense, without those that hold their codes."""
        tensors = (self._base.quantised.tensors[info.name] for info in infos if info.name in self._layout.dense)
        files = {self._base.file_of[part.name] for tensor in tensors for part in tensor.parts.values()}
        return tuple(sorted(files.difference(sources)))

    def _find_main_dtype(self) -> str:
        """The dtype of most bytes of the original model."""
        sizes: Counter[str] = Counter()
        for info in self._base.tensors.values():
            records = self._records.get(info.name)
            sizes[safetensors_name(records[0].source_dtype) if records else info.dtype] += info.size_bytes
        return sizes.most_common(1)[0][0]

    def _cast(self, dtype: str) -> str:
        """The dtype that a tensor is written in: `--dtype` replaces only the dtype of most bytes, if it is a float."""
        return self._dtype if self._dtype and dtype == self._main_dtype and dtype in FLOATS else dtype

    def _info(self, info: TensorInfo) -> TensorInfo:
        """The tensor as it is written."""
        records, new = self._records.get(info.name), self._trained.tensors.get(info.name)
        dtype = safetensors_name(records[0].source_dtype) if records else info.dtype
        cast = dtype if info.name in self._kept_parts else self._cast(dtype)
        return replace(info, dtype=cast, shape=new.shape if new else info.shape)

    def _make_tasks(self, infos: Iterable[TensorInfo]) -> dict[str, TensorTask]:
        found = {}
        for info in infos:
            new, records = self._trained.tensors.get(info.name), self._records.get(info.name, ())
            if new and records:
                raise PlanError(
                    f"{info.name} was adapted and also trained as a whole", hint="merge with PEFT's merge_and_unload"
                )
            if new:
                found[info.name] = TensorTask(new.source, new=new)
            elif records or info.name in self._layout.dense or info.dtype != self._base.stored[info.name].dtype:
                found[info.name] = TensorTask(info.name, tuple(records))
        return found

    def _same_files(self, by_file: Mapping[str, list[TensorInfo]]) -> dict[str, list[TensorInfo]]:
        """A shard for each file of the base, without those that are empty now."""
        return {
            target_name(self._base, file, number): infos
            for number, (file, infos) in enumerate(by_file.items())
            if infos or not self._base.headers[file].tensors
        }

    def _header(self, name: str, infos: Sequence[TensorInfo]) -> Header:
        """The header of a shard. If nothing in it changes, it is the header of the base's file, byte for byte."""
        own = self._base.headers.get(name)
        entries = [(info.name, info.dtype, info.shape) for info in infos]
        if own and entries == [(info.name, info.dtype, info.shape) for info in own.tensors.values()]:
            return own
        metadata = next(iter(self._base.headers.values())).metadata
        return plan_header(entries, metadata=metadata or {"format": "pt"})

    def index(self) -> bytes | None:
        """The content of the index; None for a single file. If nothing changes, it is the base's, byte for byte."""
        if list(self.headers) == [SAFETENSORS_SINGLE]:
            return None
        base = self._base
        if base.index and not base.is_pickle and dict(base.headers) == self.headers and not base.missing_tensors:
            return read_bytes(base.folder / SAFETENSORS_INDEX)
        total = sum(header.data_bytes for header in self.headers.values())
        placed = {name: file for file, header in self.headers.items() for name in header.tensors}
        former = dict(base.index or {})
        metadata = former.get("metadata")
        order = [name for name in former.get("weight_map", {}) if name in placed]
        index = {
            **former,
            "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
            "weight_map": {name: placed[name] for name in dict.fromkeys([*order, *placed])},
        }
        return (json.dumps(index, indent=2) + "\n").encode()


def _split(by_file: Mapping[str, list[TensorInfo]], most_bytes: int) -> dict[str, list[TensorInfo]]:
    """Shards with at most `most_bytes` of tensors, in the base's order; a larger tensor has a shard of its own."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in (info for infos in by_file.values() for info in infos):
        tensor_bytes = SAFETENSORS_DTYPES[info.dtype].itemsize
        for length in info.shape:
            tensor_bytes *= length
        if shards[-1] and size + tensor_bytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += tensor_bytes
    if len(shards) == 1:
        return {SAFETENSORS_SINGLE: shards[0]}
    return {f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors": infos for n, infos in enumerate(shards)}


def _side_files(
    pair: Path, manifest: Manifest, base: Checkpoint, tokenizer: Tokenizer | None
) -> dict[str, tuple[Path, int]]:
    """The files that are copied, with their folders and sizes. Raises CheckpointError."""
    if not manifest.method.writes_base:
        names = {name: stamp(base.folder / name)[0] for name in copied_side_files(base)}
    else:
        written = {*base.headers, SAFETENSORS_INDEX, "config.json", *adapter_files(manifest.method)}
        names = {name: size for name, size in manifest.files.items() if name not in written}
    if foreign := [name for name in names if not travels(Path(name).parts[0])]:
        raise CheckpointError(f"{pair / MANIFEST} names {foreign[0]}, which is no file of an output", hint=_FETCH_AGAIN)
    found = {name: (base.folder, size) for name, size in names.items()}
    if tokenizer:
        found = {name: file for name, file in found.items() if not is_tokenizer_file(name)}
        found |= {name: (tokenizer.folder, stamp(tokenizer.folder / name)[0]) for name in tokenizer.files}
    return found


def _changed_config(
    config: Mapping[str, Any], trained: TrainedParameters, tokenizer: Tokenizer | None, dtype: str
) -> dict[str, Any]:
    """The content of config.json for the merged model."""
    changed = dict(trained.config or config)
    if dtype != "auto":
        changed = with_dtype(changed, dtype)
    padding = tokenizer.padding_id() if tokenizer and trained.vocabulary else None
    if padding is not None and changed.get("pad_token_id") is None:
        changed["pad_token_id"] = padding
    return changed


def _config(manifest: Manifest, base: Checkpoint) -> bytes:
    """The original model's config.json, without what it says of quantisation where the merged model has none."""
    if not manifest.method.writes_base:
        return config_with_dtype(base, plain_config(base), "auto")
    text = manifest.source.get("config.json")
    return base.config_bytes if text is None else str(text).encode()
