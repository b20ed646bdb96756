"""The names of an adapter's modules in the other class of a composite model.

For some models with towers AutoModelForCausalLM builds a text-only class, in which the same weights have other names
than in the class of config.json. A weight is the same tensor in both, so it is found by its place on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from milora_init.checkpoint.files import read_json_object
from milora_init.errors import CheckpointError, PlanError
from milora_init.lora.targets import PeftTargets, peft_targets
from milora_init.manifest import Manifest, WeightRecord
from milora_init.model.adaptable import Adaptable, read_structure


@dataclass(frozen=True)
class OtherNames:
    """The names in the other class.

    Attributes:
        architecture: The class.
        keys: By the module's key in the adapter: its key, and its name for rank_pattern and alpha_pattern.
        targets: What adapter_config.json names.
    """

    architecture: str
    keys: Mapping[str, tuple[str, str]]
    targets: PeftTargets


def names_in_other_class(folder: Path, manifest: Manifest, *, text_only: bool) -> OtherNames | None:
    """The names of all adapted modules in the class that is wanted; None if the adapter has these names already.

    Args:
        folder: A folder with the model's config.json.
        manifest: Of the pair.
        text_only: Whether the class that AutoModelForCausalLM builds is wanted, and not that of config.json.

    Raises:
        CheckpointError: There is no config.json, or its class cannot be built.
        PlanError: The model has no text-only class, or a module that was adapted is not in the class.
    """
    if text_only == bool(manifest.inputs.get("text_only")):
        return None
    config = read_json_object(folder / "config.json")
    shapes = {record.tensor: _stored_shape(record) for record in manifest.weights}
    structure = read_structure(folder, config, shapes, text_only=text_only)
    by_place = {_place(w): w for w in chain(structure.adaptable.values(), *structure.experts.values())}
    found = [by_place.get(_place(record)) for record in manifest.weights]
    weights = [weight for weight in found if weight]
    for record, weight in zip(manifest.weights, found, strict=True):
        if weight is None:
            raise PlanError(
                f"{structure.architecture} has no module for {record.tensor}, which {record.module} was adapted in",
                hint="leave --text-only and --no-text-only out",
            )
    targets = peft_targets(weights, structure)
    keys = {
        record.key: (targets.keys[weight.target], targets.names[weight.target])
        for record, weight in zip(manifest.weights, weights, strict=True)
    }
    return OtherNames(structure.architecture, keys, targets)


def _place(weight: Adaptable | WeightRecord) -> tuple[str, int | None, int]:
    """The place of a weight on disk and in a fused parameter."""
    return weight.tensor, weight.row, weight.expert.part if weight.expert else 0


def _stored_shape(record: WeightRecord) -> tuple[int, ...]:
    """The shape of the tensor on disk that holds a weight."""
    m, n = record.shape
    matrix = (n, m) if record.transposed else (m, n)
    if record.row is None:
        return matrix
    if record.expert is None:  # a manifest that was checked has no such weight
        raise CheckpointError(f"{record.module} has a row, but is no expert")
    return (record.expert.count, *matrix)
