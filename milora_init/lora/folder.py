"""Read a LoRA folder as PEFT saves it: which module has which factors, at which scale.

An adapter that holds more than factors (DoRA, biases, retrained modules, ...) is refused with the name of what it
holds: merging or converting without it would give another model. Which experts the factors of a fused parameter belong
to is not in the adapter's files; the manifest of the base says it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import Header, read_header
from milora_init.checkpoint.tensor_file import SafetensorsShard
from milora_init.errors import CheckpointError, PlanError
from milora_init.experts import ExpertSlot
from milora_init.lora.config import match_pattern
from milora_init.lora.tensor_layout import factor_shapes, lora_key, parse_lora_key, weight_factors
from milora_init.manifest import WeightRecord
from milora_init.untrusted import plain_file

LORA_FOLDER = "lora"
LORA_CONFIG = f"{LORA_FOLDER}/adapter_config.json"
LORA_WEIGHTS = f"{LORA_FOLDER}/adapter_model.safetensors"


class Placed(Protocol):
    """A weight and where its factors are: a WeightRecord, or what is known of one without a manifest."""

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


class FactorReader:
    """An adapter's file, open. The tensors read last are kept: the experts of a layer share theirs."""

    def __init__(self, path: Path) -> None:
        self._shard = SafetensorsShard(path)
        self.header = self._shard.header
        self._key = ""
        self._tensors: tuple[Tensor, Tensor] | None = None

    def read(self, record: Placed) -> tuple[Tensor, Tensor]:
        """B (m, R) and A (R, n) of a weight (m, n), as `layout.cut` gives them. Raises CheckpointError."""
        if self._tensors is None or self._key != record.key:
            A, B = (self._shard.read(lora_key(record.key, factor)) for factor in "AB")
            self._key, self._tensors = record.key, (A, B)
        return weight_factors(*self._tensors, record.shape[0], record.expert)

    def close(self) -> None:
        self._shard.close()


@contextmanager
def open_factors(path: Path) -> Iterator[FactorReader]:
    """Open an adapter's file for a while. Raises CheckpointError."""
    reader = FactorReader(path)
    try:
        yield reader
    finally:
        reader.close()


def expected_tensors(records: tuple[WeightRecord, ...]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the adapter that these weights' factors make up."""
    wanted: dict[str, tuple[int, ...]] = {}
    for record in records:
        for factor, shape in zip("AB", factor_shapes(record.rank, record.shape, record.expert), strict=True):
            wanted[lora_key(record.key, factor)] = shape
    return wanted


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
_HUGE = 1e9  # no rank and no alpha
_FLOATS = ("F64", "F32", "F16", "BF16")
# Keys of adapter_config.json that change what the factors mean, or add to them. Off is None, False or empty.
EXTRA_WEIGHT_KEYS = ("modules_to_save", "trainable_token_indices")  # which mean what they meant
UNSUPPORTED_KEYS = (
    *EXTRA_WEIGHT_KEYS, "use_dora", "lora_bias", "layer_replication",
    "exclude_modules", "layers_to_transform", "alora_invocation_tokens", "use_qalora", "use_bdlora", "megatron_config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """A module's A (rank, n) and B (m, rank); their product is multiplied with `scale`.

    Of `experts` they are stacked as in `layout`; rank and shape are one expert's. `name` is what PEFT looks up in
    rank_pattern and alpha_pattern.
    """

    name: str
    A: str
    B: str
    rank: int
    shape: tuple[int, int]
    scale: float
    experts: int


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter on disk, its header read: config and every module's factors by the key of its tensors."""

    path: Path
    config: Mapping[str, Any]
    header: Header
    modules: Mapping[str, LoraFactors]

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS_FILE

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights. Raises CheckpointError."""
        return sha256(self.weights)


def read_lora(path: Path, records: Iterable[WeightRecord] = ()) -> LoraAdapter:
    """Read a LoRA folder's config and header.

    Args:
        path: The folder.
        records: The weights of the base that it belongs to, from the manifest.

    Raises:
        CheckpointError: A file is missing or damaged, a factor has no partner, or shapes contradict the config.
        PlanError: The adapter holds more than factors of Linears.
    """
    config = _lora_config(path)
    if not (path / WEIGHTS_FILE).is_file():
        pickled = f", only {PICKLED_WEIGHTS_FILE}" if (path / PICKLED_WEIGHTS_FILE).is_file() else ""
        hint = "save it as safetensors: model.save_pretrained(FOLDER)"
        raise CheckpointError(f"{path} has no {WEIGHTS_FILE}{pickled}", hint=hint)
    header = read_header(path / WEIGHTS_FILE)
    keys: dict[str, dict[str, str]] = {}
    for key, info in header.tensors.items():
        found = parse_lora_key(key)
        if not found:
            raise PlanError(
                f"{path / WEIGHTS_FILE}: {key} is not a factor of a Linear, and would be lost",
                hint="train without it (no modules_to_save, bias or embeddings), or merge with PEFT",
            )
        if info.dtype not in _FLOATS or len(info.shape) != 2:
            raise PlanError(f"{path / WEIGHTS_FILE}: {key} is {info.dtype} {list(info.shape)}, not a floating matrix")
        keys.setdefault(found[0], {})[found[1]] = key
    if not keys:
        raise CheckpointError(f"{path / WEIGHTS_FILE} holds no factors", hint="save the adapter again")
    experts = {record.key: record.expert for record in records if record.expert}
    wrapped = {name.removesuffix(".weight"): name for name in config.get("target_parameters") or ()}
    unknown = [name for module, name in wrapped.items() if module not in keys]
    if len(unknown) != len({expert.parameter for expert in experts.values()}):
        raise PlanError(
            f"{path / CONFIG_FILE}: {unknown[0] if unknown else min(experts)} is a parameter of experts; "
            f"only the manifest of the base says which experts these factors belong to",
            hint="keep the adapter in the folder that milora-init wrote, beside milora_init.json",
        )
    rank_of = _of_modules(config, "rank_pattern", "r", path)
    alpha_of = _of_modules(config, "alpha_pattern", "lora_alpha", path)
    modules = {
        m: _pair(path, config, header, experts[m].parameter if m in experts else wrapped.get(m, m), pair,
                 experts=experts[m].count if m in experts else 1, rank_of=rank_of, alpha_of=alpha_of)
        for m, pair in keys.items()
    }  # fmt: skip
    return LoraAdapter(path, config, header, modules)


def read_config(path: Path) -> dict[str, Any]:
    """Content of an adapter_config.json. Raises CheckpointError where it is not a readable JSON object."""
    try:
        config = json.loads(plain_file(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except OSError as error:
        inside = path.parent / LORA_FOLDER
        hint = f"name the adapter in it: {inside}" if (inside / CONFIG_FILE).is_file() else ""
        hint = hint or f"name the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        raise CheckpointError(f"{path}: {error.strerror}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a readable JSON object: {error}", hint="save the adapter again"
        ) from error
    return config


def _lora_config(path: Path) -> dict[str, Any]:
    config = read_config(path / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise PlanError(f"{path / CONFIG_FILE} does not describe a LoRA adapter", hint="name the folder of one")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: target_parameters is {parameters!r}", hint="save the adapter again"
        )
    beyond = [f"{key} = {config[key]!r}" for key in UNSUPPORTED_KEYS if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append(f"bias = {config['bias']!r}")
    if beyond:
        raise PlanError(
            f"{path / CONFIG_FILE}: {', '.join(beyond)}: this is more than two factors a module, and would be lost",
            hint="merge with PEFT's merge_and_unload instead",
        )
    return config


def _pair(
    path: Path,
    config: Mapping[str, Any],
    header: Header,
    module: str,
    keys: Mapping[str, str],
    *,
    experts: int,
    rank_of: Callable[[str], float],
    alpha_of: Callable[[str], float],
) -> LoraFactors:
    if missing := {"A", "B"} - keys.keys():
        raise CheckpointError(
            f"{path / WEIGHTS_FILE}: {module} has no lora_{missing.pop()}: the adapter is incomplete",
            hint="save the adapter again",
        )
    rank, alpha = rank_of(module), alpha_of(module)
    (a_rank, n), (m, b_rank) = header.tensors[keys["A"]].shape, header.tensors[keys["B"]].shape
    if not a_rank == b_rank == rank * experts:
        raise CheckpointError(
            f"{path / WEIGHTS_FILE}: {module} has A {[a_rank, n]} and B {[m, b_rank]}, {CONFIG_FILE} says rank {rank}",
            hint="save the adapter and its config again, together",
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraFactors(module, keys["A"], keys["B"], int(rank), (m, n), scale, experts)


def _of_modules(config: Mapping[str, Any], pattern: str, default: str, path: Path) -> Callable[[str], float]:
    """Every module's rank or alpha, as PEFT looks it up. Raises CheckpointError, here and when it is asked."""
    try:
        found = match_pattern(config.get(pattern) or {})
    except ValueError as error:
        hint = "write the modules' names into it, as milora-init does"
        raise CheckpointError(f"{path / CONFIG_FILE}: {pattern}: {error}", hint=hint) from None
    except AttributeError:
        raise CheckpointError(f"{path / CONFIG_FILE}: {pattern} is no object", hint="save the adapter again") from None

    def find(module: str) -> float:
        value = found(module)
        value = config.get(default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _HUGE:
            what = f"{default} or {pattern} gives {module} {str(value)[:80]}"
            raise CheckpointError(f"{path / CONFIG_FILE}: {what}", hint="save the adapter again")
        return float(value)

    return find
