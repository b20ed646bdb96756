"""The tensors of an adapter's file that are no factors: retrained modules, embeddings, tokens and biases.

PEFT stores them under these names, after `base_model.model.`:

| name | what it is |
|---|---|
| `X.weight`, `X.bias` | all of a parameter: `modules_to_save`, or a copy of embeddings and head after a resize |
| `X.modules_to_save.weight`, `X.original_module.weight` | both, of a module in `modules_to_save` that was resized too |
| `X.token_adapter.trainable_tokens_delta` | rows of X.weight, whose numbers are in `trainable_token_indices` |
| `X.token_adapter.base_layer.weight` | all of X.weight before those rows |
| `X.base_layer.bias`, `X.bias` | biases, with `bias: all` or `lora_only` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from milora_init.checkpoint.header import TensorInfo
from milora_init.errors import CheckpointError, PlanError
from milora_init.lora.targets import name_suffixes

Kind = Literal["module", "copy", "tokens", "bias"]
PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"
# What PEFT's wrappers add to the name of a parameter.
_WRAPPED = re.compile(r"(?P<module>.+?)(?:\.token_adapter\.base_layer|\.modules_to_save|\.base_layer)?\.(?P<name>\w+)")
_ORIGINAL = ".original_module."


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor of an adapter's file that is no factor.

    Attributes:
        key: Its name in the file.
        parameter: The parameter of the model that it replaces.
        shape: Its shape.
        kind: `module` for modules_to_save; `copy` for a parameter that no setting names, which PEFT stored because the
            vocabulary was resized; `tokens` for rows of a parameter; `bias`.
        rows: The rows that it replaces, for `tokens`; else empty.
    """

    key: str
    parameter: str
    shape: tuple[int, ...]
    kind: Kind
    rows: tuple[int, ...] = ()


def other_tensors(path: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[OtherTensor, ...]:
    """What the tensors of an adapter are that are no factors.

    Args:
        path: The adapter's file, for messages.
        tensors: The tensors.
        config: The content of adapter_config.json.

    Raises:
        CheckpointError: A setting that is not well formed, or that the tensors do not fit.
        PlanError: A tensor that is none of these.
    """
    saved = _names(path, config, "modules_to_save")
    found: dict[tuple[str, bool], OtherTensor] = {}
    for key, info in tensors.items():
        name = key.removeprefix(PREFIX)
        if _ORIGINAL in name:  # the value before the training, which the trained one replaces
            continue
        if name == key:
            raise _unknown(path, key)
        if name.endswith(_TOKENS):
            module = name.removesuffix(_TOKENS)
            rows = _rows(path, config, module, info)
            found[module, True] = OtherTensor(key, f"{module}.weight", info.shape, "tokens", rows)
            continue
        match = _WRAPPED.fullmatch(name)
        if match is None:
            raise _unknown(path, key)
        module, parameter = match["module"], f"{match['module']}.{match['name']}"
        kind: Kind = "copy"
        if ".modules_to_save." in name or any(_is_inside(module, target) for target in saved):
            kind = "module"
        elif match["name"] == "bias" and config.get("bias", "none") != "none":
            kind = "bias"
        if (parameter, False) not in found or ".modules_to_save." in name:
            found[parameter, False] = OtherTensor(key, parameter, info.shape, kind)
    kinds = {other.kind for other in found.values()}
    for setting, kind_of in (("modules_to_save", "module"), ("trainable_token_indices", "tokens")):
        if config.get(setting) and kind_of not in kinds:
            raise CheckpointError(
                f"{path} has no tensor of {setting} = {str(config[setting])[:80]}",
                hint="save the adapter and its config again, together",
            )
    return tuple(found.values())


def _is_inside(module: str, target: str) -> bool:
    """Whether a module is one that modules_to_save names, or inside one. PEFT compares the ends of names."""
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(target) for end in range(1, len(parts) + 1))


def _names(path: Path, config: Mapping[str, Any], key: str) -> list[str]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path.parent}: {key} is {str(names)[:80]}, not a list", hint="save the adapter again")
    return names


def _rows(path: Path, config: Mapping[str, Any], module: str, info: TensorInfo) -> tuple[int, ...]:
    """The rows that a tensor of trained tokens replaces. Raises CheckpointError."""
    given = config.get("trainable_token_indices")
    rows: Any = given
    if isinstance(given, dict):
        rows = next((value for target, value in given.items() if target in name_suffixes(module)), None)
        if rows is None and len(given) == 1:  # a tied head follows the embeddings
            rows = next(iter(given.values()))
    is_list = isinstance(rows, list) and all(type(row) is int and 0 <= row < 2**31 for row in rows)
    if not is_list or len(info.shape) != 2 or len(rows) != info.shape[0] or len(set(rows)) != len(rows):
        raise CheckpointError(
            f"{path}: {info.name} has {info.shape[:1]} rows, and trainable_token_indices is {str(given)[:80]}",
            hint="save the adapter and its config again, together",
        )
    return tuple(rows)


def _unknown(path: Path, key: str) -> PlanError:
    return PlanError(
        f"{path}: {key} is none of the tensors that PEFT stores beside factors, and would be lost",
        hint="merge with PEFT's merge_and_unload",
    )
