"""What becomes of the parameters that were trained beside the factors: the tensors and the config of the merged model.

PEFT names parameters of the model, a checkpoint names tensors, and the two differ; `model.meta_model` maps them. Three
things can change more than values:

- The vocabulary was resized: config.json gets the new `vocab_size`.
- Embeddings and head are one tensor in the original model (tied), and are not equal any more: the head becomes a
  tensor of its own, and `tie_word_embeddings` is false.
- A new head was trained on another class (SEQ_CLS, TOKEN_CLS, QUESTION_ANS): config.json names that class and its
  labels, and tensors that the class does not have are left out.

The model is then built once more from the new config.json, on the meta device, and every parameter must be filled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from milora_init.checkpoint.dequantise import locate
from milora_init.checkpoint.folder import Checkpoint
from milora_init.checkpoint.tensor_file import SafetensorsShard
from milora_init.errors import CheckpointError, MiloraError, PlanError
from milora_init.lora.folder import CONFIG_FILE, LoraAdapter
from milora_init.lora.other_tensors import OtherTensor
from milora_init.manifest import Manifest
from milora_init.model import meta_model
from milora_init.model.meta_model import ParameterSource

_PEFT_INSTEAD = "merge with PEFT's merge_and_unload instead"
_SAME_TRAINING = "give the folder that the trainer saved, with the output that it was trained from"
_HEADS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor of the merged model that the adapter's file replaces, in whole or in part.

    Attributes:
        shape: Its shape.
        source: The tensor of the base that it is made from; None if there was none.
        whole: The tensor of the adapter's file that replaces all of it; None to start from `source`.
        rows: The tensor of the adapter's file that then replaces some rows; None for none.
        row_numbers: Those rows.
    """

    shape: tuple[int, ...]
    source: str | None
    whole: str | None
    rows: str | None = None
    row_numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainedParameters:
    """The tensors and the config that differ from the base.

    Attributes:
        tensors: By their name on disk.
        removed: Tensors of the base that the merged model's class does not have.
        config: The new content of config.json; None if it is the original model's.
        vocabulary: The number of rows of the embeddings before and after; None if it did not change.
        new_class: The class of transformers that has a new head; empty if there is none.
    """

    tensors: Mapping[str, NewTensor] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    config: Mapping[str, Any] | None = None
    vocabulary: tuple[int, int] | None = None
    new_class: str = ""


@dataclass(frozen=True, slots=True)
class _Value:
    """The trained value of a parameter, by tensors of the adapter's file; if both are None, that of the base."""

    whole: OtherTensor | None = None
    rows: OtherTensor | None = None

    @property
    def is_shared(self) -> bool:
        """Whether PEFT gives it also to a parameter that is tied to this one and has no value of its own."""
        return self.whole is None or self.whole.kind == "copy"


class _Model:
    """A model on the meta device and the tensors that fill it."""

    def __init__(self, model: nn.Module, tensors: Iterable[str]) -> None:
        self.name = type(model).__name__
        self.parameters = model.state_dict(keep_vars=True)
        self.sources = meta_model.parameter_sources(model, tensors)
        self.modules = {name for name, _ in model.named_modules()}
        self.config_type = type(model.config)
        self._names: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            self._names.setdefault(id(parameter), []).append(name)
        layers = (_embeddings(model, "get_input_embeddings"), _embeddings(model, "get_output_embeddings"))
        ends = {id(layer): layer for layer in layers if layer is not None}
        self.vocabulary = {
            f"{name}.{part}"
            for name, module in model.named_modules(remove_duplicate=False)
            if id(module) in ends
            for part in ("weight", "bias")
        } & self.parameters.keys()

    def tied(self, parameter: str) -> list[str]:
        """All names of a parameter, its own among them."""
        return self._names[id(self.parameters[parameter])]

    def shape(self, parameter: str) -> tuple[int, ...]:
        return tuple(self.parameters[parameter].shape)

    def tensor(self, parameter: str) -> str | None:
        """The tensor that fills a parameter; None if there is none. Raises PlanError if it is not exactly one."""
        source = self.sources.get(parameter, ParameterSource())
        if source.operations or len(source.tensors) > 1:
            raise PlanError(
                f"{parameter} was trained as a whole, and the checkpoint stores it as {len(source.tensors)} tensors, "
                f"{source.tensors[0]} first",
                hint=_PEFT_INSTEAD,
            )
        return source.tensors[0] if source.tensors else None


def _embeddings(model: nn.Module, method: str) -> nn.Module | None:
    """The embeddings or the head of a model; None for a class that has none."""
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def trained_parameters(
    adapter: LoraAdapter, base: Checkpoint, config: Mapping[str, Any], manifest: Manifest
) -> TrainedParameters:
    """The tensors and the config of the merged model that differ from the base, except for merged factors.

    Args:
        adapter: The trained adapter.
        base: The base, its headers read.
        config: The original model's config.json.
        manifest: Of the pair.

    Raises:
        CheckpointError: The model's class cannot be built, or tensors of the adapter do not fit it.
        PlanError: A parameter that the model does not have, or that is stored as several tensors; a vocabulary that was
            resized only in part.
    """
    if not adapter.others:
        return TrainedParameters()
    text_only = bool(manifest.inputs.get("text_only"))
    changed = deepcopy(dict(config))
    model = _Model(_built(changed, text_only=text_only), base.tensors)
    values = _values(adapter.others)
    if unknown := [name for name in values if name not in model.parameters]:
        model, changed = _with_head(model, changed, values, unknown, adapter, base)
    vocabulary = _vocabulary(model, values, adapter)
    if vocabulary:
        _set_vocabulary(changed, *vocabulary)
    tensors, untied = _new_tensors(model, values, adapter)
    if untied:
        _untie(changed)
    removed: frozenset[str] = frozenset()
    if unknown:
        used = {tensor for source in model.sources.values() for tensor in source.tensors}
        removed = frozenset(base.tensors.keys() - used)
    if changed != config:
        shapes = {name: info.shape for name, info in base.tensors.items() if name not in removed}
        shapes |= {name: tensor.shape for name, tensor in tensors.items()}
        _require_loadable(_built(changed, text_only=text_only), shapes, manifest)
    new_class = str(changed["architectures"][0]) if unknown else ""
    return TrainedParameters(tensors, removed, changed if changed != config else None, vocabulary, new_class)


def unchanged_copies(adapter: LoraAdapter, base: Checkpoint, manifest: Manifest) -> set[str]:
    """The tensors of the adapter's file that PEFT stored although nothing of them was trained, by their name in it.

    With `save_embedding_layers` PEFT stores embeddings and head too.

    Raises:
        CheckpointError: The model's class cannot be built, or a tensor cannot be read.
        PlanError: A parameter that is stored as several tensors.
    """
    copies = [other for other in adapter.others if other.kind == "copy"]
    if not copies:
        return set()
    model = _Model(_built(base.config, text_only=bool(manifest.inputs.get("text_only"))), base.tensors)
    found = set()
    with SafetensorsShard(adapter.weights) as stored:
        for other in copies:
            names = model.tied(other.parameter) if other.parameter in model.parameters else []
            tensor = next(filter(None, map(model.tensor, names)), None)
            if tensor is None or base.tensors[tensor].shape != other.shape:
                continue
            if torch.equal(locate(base, tensor).read().double(), stored.read(other.key).double()):
                found.add(other.key)
    return found


def _values(others: Iterable[OtherTensor]) -> dict[str, _Value]:
    """The trained value of each parameter."""
    found: dict[str, _Value] = {}
    for other in others:
        value = found.get(other.parameter, _Value())
        found[other.parameter] = _Value(value.whole, other) if other.kind == "tokens" else _Value(other, value.rows)
    return found


def _built(config: Mapping[str, Any], *, text_only: bool = False) -> nn.Module:
    """The model of a config.json that is not on the disk. Raises CheckpointError."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            return meta_model.build_meta_model(Path(folder), config, text_only=text_only)
        except MiloraError as error:
            message = error.message.replace(f"{folder}/", "")
            raise CheckpointError(
                f"the parameters that were trained beside the factors cannot be found in the model: {message}",
                hint=_PEFT_INSTEAD,
            ) from error


def _with_head(
    model: _Model,
    config: dict[str, Any],
    values: Mapping[str, _Value],
    unknown: list[str],
    adapter: LoraAdapter,
    base: Checkpoint,
) -> tuple[_Model, dict[str, Any]]:
    """The model of the class that the new head belongs to, and its config. Raises PlanError if there is none."""
    import transformers

    task = adapter.config.get("task_type")
    problem = f"{adapter.path}: {model.name} has no parameter {unknown[0]}"
    mapping = getattr(transformers, _HEADS.get(str(task), ""), {})
    cls = mapping.get(model.config_type, None)
    shapes = [value.whole.shape for name in unknown if (value := values[name]).whole]
    if cls is None or len(shapes) < len(unknown):
        raise PlanError(f"{problem}, and task_type {task!r} names no class that has it", hint=_SAME_TRAINING)
    for labels in dict.fromkeys(shape[0] for shape in reversed(shapes)):
        names = {str(number): f"LABEL_{number}" for number in range(labels)}
        changed = {**config, "architectures": [cls.__name__], "id2label": names,
                   "label2id": {label: int(number) for number, label in names.items()}}  # fmt: skip
        changed.pop("num_labels", None)
        found = _Model(_built(changed), base.tensors)
        if all(
            name in found.parameters and found.shape(name) == shape for name, shape in zip(unknown, shapes, strict=True)
        ):
            return found, changed
    raise PlanError(f"{problem}, and {cls.__name__} has none of this shape", hint=_SAME_TRAINING)


def _vocabulary(model: _Model, values: Mapping[str, _Value], adapter: LoraAdapter) -> tuple[int, int] | None:
    """The number of rows of the embeddings before and after; None if it did not change.

    Raises:
        PlanError: A tensor of another shape than the parameter, for another reason than a resized vocabulary; or
            embeddings and head have different numbers of rows.
    """
    resized: dict[str, tuple[int, int]] = {}
    for name, value in values.items():
        if value.whole is None or value.whole.shape == model.shape(name):
            continue
        before, after = model.shape(name), value.whole.shape
        if name not in model.vocabulary or not after or before[1:] != after[1:]:
            raise PlanError(
                f"{adapter.weights}: {value.whole.key} is {list(after)}, and {name} of this model is {list(before)}",
                hint=_SAME_TRAINING,
            )
        resized[name] = (before[0], after[0])
    if not resized:
        return None
    not_resized = [
        name for name in model.vocabulary - resized.keys() if not resized.keys() & set(model.tied(name))
    ]  # a tied parameter follows
    if len(set(resized.values())) > 1 or not_resized:
        sizes = ", ".join(f"{name} has {after} rows" for name, (_, after) in sorted(resized.items()))
        rest = f", and {min(not_resized)} is not in the adapter" if not_resized else ""
        raise PlanError(
            f"{adapter.weights}: the vocabulary was resized only in part: {sizes}{rest}",
            hint="save with save_embedding_layers=True, so that embeddings and head are both stored",
        )
    return next(iter(resized.values()))


def _set_vocabulary(config: dict[str, Any], before: int, after: int) -> None:
    """Set `vocab_size` where config.json has the old one; if nowhere, in text_config, or at the top without that."""
    text = config.get("text_config")
    sections = [config, *(part for key, part in config.items() if isinstance(part, dict) and "vision" not in key)]
    found = [section for section in sections if section.get("vocab_size") == before]
    for section in found or [text if isinstance(text, dict) else config]:
        section["vocab_size"] = after


def _untie(config: dict[str, Any]) -> None:
    text = config.get("text_config")
    config["tie_word_embeddings"] = False
    if isinstance(text, dict):
        text["tie_word_embeddings"] = False


def _new_tensors(
    model: _Model, values: Mapping[str, _Value], adapter: LoraAdapter
) -> tuple[dict[str, NewTensor], bool]:
    """The tensors with trained values, by their name on disk; and whether a tied parameter is not tied any more.

    Raises:
        PlanError: A parameter that is stored as several tensors, or a row that it does not have.
    """
    found: dict[str, NewTensor] = {}
    untied = False
    keep_tied = bool(adapter.config.get("ensure_weight_tying"))
    with _AdapterTensors(adapter) as tensors:
        for first in values:
            names = model.tied(first)
            own = {name: values[name] for name in names if name in values}
            shared = next((value for value in own.values() if keep_tied or value.is_shared), _Value())
            of = {name: own.get(name, shared) for name in names}
            stored = next((name for name in names if model.tensor(name)), names[0])
            source = model.tensor(stored)
            for name, value in of.items():
                if name != stored and tensors.are_equal(value, of[stored]):
                    continue
                untied = untied or name != stored
                if name != stored or value != _Value():  # else it keeps the base's values
                    disk = source if name == stored and source else name
                    found[disk] = _new_tensor(name, value, source, model.shape(name), adapter)
    return found, untied


def _new_tensor(
    name: str, value: _Value, source: str | None, shape: tuple[int, ...], adapter: LoraAdapter
) -> NewTensor:
    shape = value.whole.shape if value.whole else shape
    rows = value.rows
    if rows and (rows.shape[1:] != shape[1:] or max(rows.rows, default=0) >= shape[0]):
        raise PlanError(
            f"{adapter.path / CONFIG_FILE}: trainable_token_indices has row {max(rows.rows, default=0)} of width "
            f"{rows.shape[1]}, and {name} is {list(shape)}",
            hint=_SAME_TRAINING,
        )
    whole = value.whole.key if value.whole else None
    return NewTensor(shape, source, whole, rows.key if rows else None, rows.rows if rows else ())


class _AdapterTensors:
    """Compares tensors of an adapter's file."""

    def __init__(self, adapter: LoraAdapter) -> None:
        self._path = adapter.weights

    def __enter__(self) -> _AdapterTensors:
        self._shard = SafetensorsShard(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        self._shard.close()

    def are_equal(self, one: _Value, other: _Value) -> bool:
        """Whether two trained values are equal, entry by entry."""
        numbers = [value.rows.rows if value.rows else () for value in (one, other)]
        return self._same(one.whole, other.whole) and numbers[0] == numbers[1] and self._same(one.rows, other.rows)

    def _same(self, one: OtherTensor | None, other: OtherTensor | None) -> bool:
        if one is None or other is None:
            return one is other
        if one.key == other.key:
            return True
        return one.shape == other.shape and torch.equal(self._shard.read(one.key), self._shard.read(other.key))


def _require_loadable(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], manifest: Manifest) -> None:
    """Raise PlanError unless the tensors fill every parameter of the merged model's class, and it has all modules."""
    built = _Model(model, shapes)
    for name, _ in model.named_parameters():
        sources = [built.sources[tied] for tied in built.tied(name) if tied in built.sources]
        if not sources:
            raise PlanError(f"no tensor of the merged model would fill {name} of {built.name}", hint=_PEFT_INSTEAD)
        tensors = sources[0].tensors
        if not sources[0].operations and shapes[tensors[0]] != built.shape(name):
            raise PlanError(
                f"{tensors[0]} would be {list(shapes[tensors[0]])} in the merged model, and {name} of {built.name} is "
                f"{list(built.shape(name))}",
                hint=_PEFT_INSTEAD,
            )
    for record in manifest.weights:
        owner = record.expert.parameter.rpartition(".")[0] if record.expert else record.module
        if owner not in built.modules:
            raise PlanError(f"{built.name} has no module {owner}, which was adapted", hint=_PEFT_INSTEAD)
