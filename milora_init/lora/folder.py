"""Read a LoRA folder that PEFT saved: the factors and the scale of every module, and what was trained beside them.

`lora.other_tensors` says what the other tensors are. `read_lora` refuses settings that neither merge nor convert knows,
because without them the result would be another model. The adapter's files do not say how many experts a parameter
has, nor which rows and columns belong to which expert. This information is in the manifest of the base.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import FLOATS, Header, TensorInfo, read_header
from milora_init.checkpoint.tensor_file import SafetensorsShard
from milora_init.errors import CheckpointError, PlanError
from milora_init.expert_slot import ExpertSlot
from milora_init.lora.config import lora_scale, match_pattern
from milora_init.lora.other_tensors import OtherTensor, other_tensors
from milora_init.lora.tensor_layout import (
    factor_shapes,
    lora_key,
    parse_lora_key,
    parse_magnitude_key,
    weight_factors,
)
from milora_init.manifest import WeightRecord
from milora_init.methods import Method
from milora_init.untrusted import read_text

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
# Paths in the output folder, which contains the base and its initial adapter.
LORA_FOLDER = "lora"
LORA_CONFIG = f"{LORA_FOLDER}/{CONFIG_FILE}"
LORA_WEIGHTS = f"{LORA_FOLDER}/{WEIGHTS_FILE}"
# Keys of adapter_config.json that add something to the factors. None, False and empty values switch a key off.
EXTRA_WEIGHT_KEYS = ("modules_to_save", "trainable_token_indices", "use_dora")
UNSUPPORTED_KEYS = (
    "lora_bias", "layer_replication", "exclude_modules", "layers_to_transform", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "megatron_config",
)  # fmt: skip
_RANK_AND_ALPHA_LIMIT = 1e9


def adapter_files(method: Method) -> tuple[str, str]:
    """The adapter's config and weights in an output of a method, by the path relative to the output."""
    return (LORA_CONFIG, LORA_WEIGHTS) if method.writes_base else (CONFIG_FILE, WEIGHTS_FILE)


def adapter_folder(output: Path, method: Method) -> Path:
    """The folder of the initial adapter in an output of a method, which is the output itself if it has no base."""
    return output / LORA_FOLDER if method.writes_base else output


class AdaptedWeight(Protocol):
    """A weight and the position of its factors; the attributes are those of `WeightRecord`."""

    @property
    def module(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def rank(self) -> int: ...
    @property
    def expert(self) -> ExpertSlot | None: ...
    @property
    def untrainable(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def s_max(self) -> float: ...


class FactorReader:
    """Reads factors from an adapter's file. It caches the last tensors, because the experts of a layer share them."""

    def __init__(self, path: Path) -> None:
        self._shard = SafetensorsShard(path)
        self.header = self._shard.header
        self._key = ""
        self._tensors: tuple[Tensor, Tensor] | None = None

    def read(self, weight: AdaptedWeight) -> tuple[Tensor, Tensor]:
        """Read B (m, R) and A (R, n) of a weight (m, n), see `weight_factors`. Raises CheckpointError."""
        if self._tensors is None or self._key != weight.key:
            A, B = (self._shard.read(lora_key(weight.key, factor)) for factor in "AB")
            self._key, self._tensors = weight.key, (A, B)
        return weight_factors(*self._tensors, weight.shape[0], weight.expert)

    def read_tensor(self, name: str) -> Tensor:
        """Read a tensor of the file. Raises CheckpointError."""
        return self._shard.read(name)

    def close(self) -> None:
        """Close the file."""
        self._shard.close()


@contextmanager
def open_factors(path: Path) -> Iterator[FactorReader]:
    """Open a FactorReader and close it at the end of the `with` block. Raises CheckpointError."""
    reader = FactorReader(path)
    try:
        yield reader
    finally:
        reader.close()


def expected_tensors(records: Iterable[WeightRecord]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in the adapter for these weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for record in records:
        for factor, shape in zip("AB", factor_shapes(record.rank, record.shape, record.expert), strict=True):
            shapes[lora_key(record.key, factor)] = shape
    return shapes


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The factors of a module or of a fused parameter. PEFT adds scale * B @ A to its weight.

    Attributes:
        name: The name that PEFT looks up in rank_pattern and alpha_pattern.
        A, B: The names of the tensors. The factors of experts are stacked, see `tensor_layout`.
        rank: The rank of the module, or of one expert.
        shape: The shape (m, n) of the module's weight, or of one expert's matrix.
        scale: The factor of B @ A.
        experts: The number of stacked experts; 1 for a module.
        magnitude: The name of DoRA's vector (m,), the row norms of the adapted weight (https://arxiv.org/abs/2402.09353);
            None without DoRA.
    """

    name: str
    A: str
    B: str
    rank: int
    shape: tuple[int, int]
    scale: float
    experts: int
    magnitude: str | None = None


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter on disk.

    Attributes:
        path: The folder.
        config: The content of adapter_config.json.
        header: The header of the weights file.
        modules: The factors by the module's name as the names of the tensors have it (the `key` of `lora_key`).
        others: Every other tensor that was trained or stored beside the factors.
    """

    path: Path
    config: Mapping[str, Any]
    header: Header
    modules: Mapping[str, LoraFactors]
    others: tuple[OtherTensor, ...] = ()

    @property
    def weights(self) -> Path:
        """The path of the weights file."""
        return self.path / WEIGHTS_FILE

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the weights file. Raises CheckpointError."""
        return sha256(self.weights)


def read_lora(path: Path, records: Iterable[WeightRecord] = ()) -> LoraAdapter:
    """Read the config and the header of a LoRA folder.

    Args:
        path: The folder.
        records: The weights of the adapter's base, from the manifest. They are required if the adapter has factors of
            experts.

    Raises:
        CheckpointError: A file is missing or damaged, a module has only one factor, or shapes contradict the config.
        PlanError: The adapter has a tensor or a setting that is not known, or factors of experts without records.
    """
    config = _lora_config(path)
    if not (path / WEIGHTS_FILE).is_file():
        pickled = f", only {PICKLED_WEIGHTS_FILE}" if (path / PICKLED_WEIGHTS_FILE).is_file() else ""
        hint = "save it as safetensors: model.save_pretrained(FOLDER)"
        raise CheckpointError(f"{path} has no {WEIGHTS_FILE}{pickled}", hint=hint)
    header = read_header(path / WEIGHTS_FILE)
    keys, magnitudes, rest = _sort_tensors(path, header, dora=bool(config.get("use_dora")))
    if not keys:
        raise CheckpointError(f"{path / WEIGHTS_FILE} contains no factors", hint="save the adapter again")
    experts = {record.key: record.expert for record in records if record.expert}
    target_parameters = {name.removesuffix(".weight"): name for name in config.get("target_parameters") or ()}
    # target_parameters has two kinds: an ordinary module, listed as `<module>.weight`, whose tensors have the module's
    # name; and a fused parameter of experts, which has no tensors of its own name.
    fused = [name for module, name in target_parameters.items() if module not in keys]
    if len(fused) != len({expert.parameter for expert in experts.values()}):
        raise PlanError(
            f"{path / CONFIG_FILE}: {fused[0] if fused else min(experts)} is a parameter of experts; "
            f"only the manifest says which experts these factors belong to",
            hint="keep the adapter in the folder that milora-init wrote, together with milora_init.json",
        )
    rank_of = _pattern_lookup(config, "rank_pattern", "r", path)
    alpha_of = _pattern_lookup(config, "alpha_pattern", "lora_alpha", path)
    modules = {}
    for key, names in keys.items():
        slot = experts.get(key)
        name = slot.parameter if slot else target_parameters.get(key, key)
        rank, shape = _rank_and_shape(path, header, name, names, rank_of(name), slot.count if slot else 1)
        scale = lora_scale(rank, alpha_of(name), rslora=bool(config.get("use_rslora")))
        magnitude = _magnitude(path, header, key, shape, magnitudes) if config.get("use_dora") else None
        modules[key] = LoraFactors(
            name, names["A"], names["B"], rank, shape, scale, slot.count if slot else 1, magnitude
        )
    return LoraAdapter(path, config, header, modules, other_tensors(path / WEIGHTS_FILE, rest, config))


def _sort_tensors(
    path: Path, header: Header, *, dora: bool
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, TensorInfo]]:
    """The names of the factors by module, those of DoRA's magnitudes by module, and all other tensors.

    Raises:
        PlanError: A tensor of LoRA that is no factor, or a factor that is no matrix of floating-point numbers.
    """
    keys: dict[str, dict[str, str]] = {}
    magnitudes: dict[str, str] = {}
    rest: dict[str, TensorInfo] = {}
    for key, info in header.tensors.items():
        if info.dtype not in FLOATS:
            raise PlanError(f"{path / WEIGHTS_FILE}: {key} is {info.dtype}, not a floating-point tensor")
        if parsed := parse_lora_key(key):
            if len(info.shape) != 2:
                raise PlanError(f"{path / WEIGHTS_FILE}: {key} is {list(info.shape)}, not a matrix")
            keys.setdefault(parsed[0], {})[parsed[1]] = key
        elif dora and (module := parse_magnitude_key(key)):
            magnitudes[module] = key
        elif ".lora_" in key:
            raise PlanError(
                f"{path / WEIGHTS_FILE}: {key} is not a factor of a linear layer, and would be lost",
                hint="merge with PEFT's merge_and_unload",
            )
        else:
            rest[key] = info
    return keys, magnitudes, rest


def _magnitude(path: Path, header: Header, key: str, shape: tuple[int, int], magnitudes: Mapping[str, str]) -> str:
    """The name of a module's magnitude vector. Raises CheckpointError if it is missing or has another length."""
    name = magnitudes.get(key)
    if name is None or header.tensors[name].shape != (shape[0],):
        found = "missing" if name is None else f"{list(header.tensors[name].shape)}, expected {[shape[0]]}"
        raise CheckpointError(
            f"{path / WEIGHTS_FILE}: the lora_magnitude_vector of {key} is {found}", hint="save the adapter again"
        )
    return name


def read_config(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json. Raises CheckpointError if it is not a readable JSON object."""
    try:
        config = json.loads(read_text(path))
        if not isinstance(config, dict):
            raise ValueError(f"it contains a {type(config).__name__}")
    except OSError as error:
        subfolder = path.parent / LORA_FOLDER
        hint = f"give the folder that contains {CONFIG_FILE} and {WEIGHTS_FILE}"
        if (subfolder / CONFIG_FILE).is_file():
            hint = f"give the adapter inside this folder: {subfolder}"
        raise CheckpointError(f"{path}: {error.strerror}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a readable JSON object: {error}", hint="save the adapter again"
        ) from error
    return config


def _lora_config(path: Path) -> dict[str, Any]:
    """The config of a LoRA folder.

    Raises:
        CheckpointError: The config cannot be read.
        PlanError: The adapter is not LoRA, or has a setting that is not known.
    """
    config = read_config(path / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise PlanError(
            f"{path / CONFIG_FILE} does not describe a LoRA adapter", hint="give the folder of a LoRA adapter"
        )
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: target_parameters is {parameters!r}", hint="save the adapter again"
        )
    if unknown := [f"{key} = {config[key]!r}" for key in UNSUPPORTED_KEYS if config.get(key)]:
        raise PlanError(
            f"{path / CONFIG_FILE}: {', '.join(unknown)}: merge and convert do not know this and would lose it",
            hint="merge with PEFT's merge_and_unload instead",
        )
    return config


def _rank_and_shape(
    path: Path, header: Header, module: str, keys: Mapping[str, str], rank: float, experts: int
) -> tuple[int, tuple[int, int]]:
    """The rank of a module and the shape (m, n) of its weight.

    Args:
        path: The folder.
        header: The header of the weights file.
        module: The module's name, for messages.
        keys: The names of its tensors, by `A` and `B`.
        rank: The rank by adapter_config.json.
        experts: The number of stacked experts; 1 for a module.

    Raises:
        CheckpointError: A factor is missing, or the shapes contradict the rank.
    """
    if missing := {"A", "B"} - keys.keys():
        raise CheckpointError(
            f"{path / WEIGHTS_FILE}: {module} has no lora_{missing.pop()}: the adapter is incomplete",
            hint="save the adapter again",
        )
    (a_rank, n), (m, b_rank) = header.tensors[keys["A"]].shape, header.tensors[keys["B"]].shape
    if not a_rank == b_rank == rank * experts:
        raise CheckpointError(
            f"{path / WEIGHTS_FILE}: {module} has A {[a_rank, n]} and B {[m, b_rank]}, {CONFIG_FILE} gives rank {rank}",
            hint="save the adapter and its config again, together",
        )
    return int(rank), (m, n)


def _pattern_lookup(config: Mapping[str, Any], pattern: str, default: str, path: Path) -> Callable[[str], float]:
    """A function that finds the rank or the alpha of a module as PEFT does.

    Args:
        config: The content of adapter_config.json.
        pattern: `rank_pattern` or `alpha_pattern`.
        default: The key of the default value.
        path: The folder, for messages.

    Raises:
        CheckpointError: The pattern cannot be used. The returned function raises it for a value that is no positive
            number.
    """
    try:
        find_in_pattern = match_pattern(config.get(pattern) or {})
    except ValueError as error:
        hint = "use module names as keys, as milora-init does"
        raise CheckpointError(f"{path / CONFIG_FILE}: {pattern}: {error}", hint=hint) from None
    except AttributeError:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: {pattern} is not an object", hint="save the adapter again"
        ) from None

    def find(module: str) -> float:
        value = find_in_pattern(module)
        value = config.get(default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _RANK_AND_ALPHA_LIMIT:
            what = f"{default} or {pattern} gives {module} the value {str(value)[:80]}, not a positive number"
            raise CheckpointError(f"{path / CONFIG_FILE}: {what}", hint="save the adapter again")
        return float(value)

    return find
