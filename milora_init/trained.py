"""A LoRA folder as PEFT saves it, read for the ways back: which module has which factors, at which scale.

What the factors alone do not say (DoRA, biases, retrained modules, ...) is refused by name: a way back that dropped it
would give another model without a word. Which experts an adapter of fused parameters speaks of, its files do not say
either: the manifest of the base does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from milora_init.adapter import FOLDER, pattern_of
from milora_init.digest import sha256
from milora_init.errors import CheckpointError, MiloraError, PlanError
from milora_init.factors import Placed, reading_factors
from milora_init.layout import key_and_factor, lora_key, own_block
from milora_init.manifest import Manifest, WeightRecord, read_manifest
from milora_init.safetensors_format import Header, read_header
from milora_init.untrusted import plain_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_SAME_WAY, _LEAST, _MOST = 0.5, 0.1, 30  # see `unrelated`
_NAMED = 3
_HUGE = 1e9  # no rank and no alpha
OTHER_BASE = "name the base that it was trained on"

_FLOATS = ("F64", "F32", "F16", "BF16")
# Keys of adapter_config.json that change what the factors mean, or add to them. Off is None, False or empty.
BESIDE_FACTORS = ("modules_to_save", "trainable_token_indices")  # which mean what they meant
BEYOND_FACTORS = (
    *BESIDE_FACTORS, "use_dora", "lora_bias", "layer_replication",
    "exclude_modules", "layers_to_transform", "alora_invocation_tokens", "use_qalora", "use_bdlora", "megatron_config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factors:
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
class LoraFolder:
    """A LoRA adapter on disk, its header read: config and every module's factors by the key of its tensors."""

    path: Path
    config: Mapping[str, Any]
    header: Header
    modules: Mapping[str, Factors]

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights. Raises CheckpointError."""
        return sha256(self.weights)


def open_lora(path: Path, records: Iterable[WeightRecord] = ()) -> LoraFolder:
    """Read a LoRA folder's config and header.

    Args:
        path: The folder.
        records: The weights of the base that it belongs to, from the manifest.

    Raises:
        CheckpointError: A file is missing or damaged, a factor has no partner, or shapes contradict the config.
        PlanError: The adapter holds more than factors of Linears.
    """
    config = _lora_config(path)
    if not (path / WEIGHTS).is_file():
        pickled = f", only {PICKLED}" if (path / PICKLED).is_file() else ""
        hint = "save it as safetensors: model.save_pretrained(FOLDER)"
        raise CheckpointError(f"{path} has no {WEIGHTS}{pickled}", hint=hint)
    header = read_header(path / WEIGHTS)
    keys: dict[str, dict[str, str]] = {}
    for key, info in header.tensors.items():
        found = key_and_factor(key)
        if not found:
            raise PlanError(
                f"{path / WEIGHTS}: {key} is not a factor of a Linear, and would be lost",
                hint="train without it (no modules_to_save, bias or embeddings), or merge with PEFT",
            )
        if info.dtype not in _FLOATS or len(info.shape) != 2:
            raise PlanError(f"{path / WEIGHTS}: {key} is {info.dtype} {list(info.shape)}, not a floating matrix")
        keys.setdefault(found[0], {})[found[1]] = key
    if not keys:
        raise CheckpointError(f"{path / WEIGHTS} holds no factors", hint="save the adapter again")
    experts = {record.key: record.expert for record in records if record.expert}
    wrapped = {name.removesuffix(".weight"): name for name in config.get("target_parameters") or ()}
    unknown = [name for module, name in wrapped.items() if module not in keys]
    if len(unknown) != len({expert.parameter for expert in experts.values()}):
        raise PlanError(
            f"{path / CONFIG}: {unknown[0] if unknown else min(experts)} is of experts, and which these factors belong "
            f"to stands in the manifest of their base",
            hint="keep the adapter in the folder that milora-init wrote, beside milora_init.json",
        )
    rank_of = _of_modules(config, "rank_pattern", "r", path)
    alpha_of = _of_modules(config, "alpha_pattern", "lora_alpha", path)
    modules = {
        m: _pair(path, config, header, experts[m].parameter if m in experts else wrapped.get(m, m), pair,
                 experts=experts[m].count if m in experts else 1, rank_of=rank_of, alpha_of=alpha_of)
        for m, pair in keys.items()
    }  # fmt: skip
    return LoraFolder(path, config, header, modules)


def of_another_class(own: Set[str], other: Set[str], manifest: Manifest | None) -> tuple[str, str] | None:
    """What to say of an adapter whose modules are the base's own under another prefix, and what repairs it; else None.

    PEFT goes by full names: loaded into a class in which the modules have others, it leaves the base's adapter out,
    and trains a new one on a base that lacks its components.
    """
    odd, free = other - own, own - other
    parts = min(odd, default="").split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts)))
    found = next(((tail, name) for tail in tails for name in sorted(free) if f".{name}".endswith(f".{tail}")), None)
    if not odd or found is None:
        return None
    (tail, name), module = found, min(odd)
    prefix, own_prefix = module.removesuffix(tail), name.removesuffix(tail)
    renamed = {own_prefix + other_name.removeprefix(prefix) for other_name in odd if other_name.startswith(prefix)}
    if len(renamed) < len(odd) or not renamed <= free or re.search(r"\d", prefix + own_prefix):
        return None
    source, inputs = (manifest.source, manifest.inputs) if manifest else ({}, {})
    cls, known, auto = source.get("other_class"), source.get("architecture"), "AutoModelForCausalLM"
    if inputs.get("text_only"):
        told, hint = f" ({cls})" if cls else "", f"with {auto} and train again; or make the pair without --text-only"
    else:
        told, hint = f" ({cls}, which {auto} builds)" if cls else "", f"as a {known} and train again" if known else ""
        hint += f"; or make the pair with --text-only, for {auto}" if cls and known else ""
    what = f"was trained on another class{told}: its {module} is {name} here, and PEFT left this base's adapter out"
    return what, f"load the base {hint}" if hint else "load the base with the class it was made for, and train again"


def require_pair(before: LoraFolder, after: LoraFolder, manifest: Manifest | None = None) -> None:
    """Raise PlanError unless `after` can be `before`, trained: the same modules, shapes and scales.

    Whether it *is*, the factors themselves say: `require_related`. The paths in the configs do not: a base that
    was moved or pushed is still the same one.
    """
    if before.path.resolve() == after.path.resolve():
        raise PlanError(f"{after.path} is both the initial and the trained adapter", hint="name two folders")
    hint = f"name the adapter that was trained from {before.path}, saved as it was trained"
    if told := of_another_class(before.modules.keys(), after.modules.keys(), manifest):
        raise PlanError(f"{after.path} {told[0]}", hint=told[1])
    if odd := before.modules.keys() ^ after.modules.keys():
        module = min(odd)
        where = before.path if module in before.modules else after.path
        raise PlanError(
            f"{len(odd)} modules are in one adapter only, {module} first (in {where})",
            hint=hint,
        )
    for module, start in before.modules.items():
        end = after.modules[module]
        for what, was, now in (
            ("rank", start.rank, end.rank),
            ("shape", list(start.shape), list(end.shape)),
            ("scale", start.scale, end.scale),
        ):
            if was != now:
                raise PlanError(
                    f"{module} has {what} {was} in {before.path}, but {now} in {after.path}",
                    hint=hint,
                )


def require_made_with(lora: LoraFolder, manifest: Manifest) -> None:
    """Raise PlanError unless `lora` is the adapter of the manifest's base as it was made, to the byte and the scale."""
    if lora.digest != manifest.hashes.get(f"{FOLDER}/{WEIGHTS}"):
        raise PlanError(
            f"{lora.weights} is not the adapter that its base was made with: it was replaced, or trained in place",
            hint="put the initial one back; milora-init with the same options makes it again, in another --out",
        )
    for record in manifest.weights:
        scale = lora.modules[record.key].scale
        if abs(scale - record.scale) > 1e-9 * record.scale:
            raise PlanError(
                f"{lora.path / CONFIG} scales {record.module} by {scale:g}, its base was made with {record.scale:g}",
                hint=f"milora-init verify {lora.path.parent} tells what to set",
            )


def names_another_base(config: Mapping[str, Any], manifest: Manifest) -> str:
    """The folder of another output of milora-init, where an adapter's config names one as its base; else empty."""
    named = config.get("base_model_name_or_path")
    other = None
    if isinstance(named, str) and named:
        with suppress(MiloraError, OSError, ValueError):  # a base that is not here, or cannot be read, tells nothing
            other = read_manifest(Path(named).expanduser())
    return str(named) if other and other.fingerprint != manifest.fingerprint else ""


def require_trained_on(lora: LoraFolder, manifest: Manifest, initial: Path) -> None:
    """Raise PlanError where an adapter of the initial one's keys, shapes and scales was trained on another base.

    That is so where its config names another output of milora-init, or where a module's factors are unrelated.
    """
    if named := names_another_base(lora.config, manifest):
        raise PlanError(f"{lora.path} was trained on {named}, another residual base", hint=OTHER_BASE)
    require_related(lora.weights, initial, manifest.weights)


def require_related(trained: Path, initial: Path, weights: Sequence[Placed] = ()) -> None:
    """Raise PlanError unless every module of one adapter can be trained from the other's; see `unrelated`."""
    if found := unrelated(trained, initial, weights):
        raise PlanError(f"{trained}: {summary(found)}", hint=OTHER_BASE)


def summary(unrelated: Mapping[str, str]) -> str:
    """The modules that `unrelated` found, in one line."""
    first = ", ".join(f"{module} ({why})" for module, why in list(unrelated.items())[:_NAMED])
    more = f", and {len(unrelated) - _NAMED} more" if len(unrelated) > _NAMED else ""
    return f"unrelated to the adapter that this base was made with, in {len(unrelated)} of its weights: {first}{more}"


def unrelated(trained: Path, initial: Path, weights: Sequence[Placed] = ()) -> dict[str, str]:
    """The modules of an adapter that cannot have been trained from the initial one, each with the reason.

    Every module (of stacked experts: every matrix) is judged by itself. A and B (rank r) start at A0 (r, n) and
    B0 (m, r), and training adds to them; P = B A and P0 = B0 A0. A module is related where one of these holds:

    - P points the way of P0: cos(P, P0) > 0.5, and P holds P0 between 0.1 and 30 times, <P, P0> / |P0|^2. Of unrelated
      factors the cosine is about 1 / sqrt(m n), and 1 / sqrt(m r) where one of the two factors is right.
    - A and B each still hold what they began with. The smallest components are so small that what training adds is
      soon many times as large, and the cosine of the products goes down to chance; that of the factors does so later.
      What is added has no reason to undo A0, so <A, A0> / |A0|^2 stays near 1: at least the root of 0.1. And
      cos(A, A0) stays above chance, which is 1 / sqrt(r n): at least three times that. B likewise.

    Measured on models of width 32 to 256, ranks 4 and 8, with AdamW: after 20 steps at a rate of 1e-2 or 200 at 1e-3
    every module passes; |P| was up to 160 times |P0| and P held P0 up to 9 times. After 1000 steps at 3e-3 (|P| up to
    500 times |P0|) 3 of 60 modules fail, all of smallest components at width 64; at rates that make the loss go up,
    most. Chance falls with the width: at 4096 and rank 64 it is 1 / 512. Noise, another layer's factors, exchanged or
    permuted ones are at chance; zeros, and what was multiplied by 1000, are outside 0.1 to 30.

    A module all of whose directions are `untrainable` has no direction to compare, and passes. Factors that began as
    exact zeros get no gradient, and must still be zeros.

    Args:
        trained, initial: Files of weights of the same keys and shapes.
        weights: The weights that were split; whole modules by the file's keys where there are none.

    Raises:
        PlanError: An entry that is NaN or infinite.
        CheckpointError: A file that cannot be read.
    """
    found: dict[str, str] = {}
    with reading_factors(trained) as after, reading_factors(initial) as before:
        for weight in weights or _whole_modules(before.header):
            B, A, B0, A0 = (factor.double() for reader in (after, before) for factor in reader.read(weight))
            if not bool(A.isfinite().all() and B.isfinite().all()):
                hint = "look at the training: such an adapter has learnt nothing"
                raise PlanError(f"{trained}: {weight.module} has entries that are NaN or infinite", hint=hint)
            if A0.any() and B0.any() and weight.untrainable >= weight.rank:
                continue
            if why := _unrelated(B, A, B0, A0, weight):
                found[weight.module] = why
    return found


def _unrelated(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, weight: Placed) -> str:
    """Why a module with A (R, n) and B (m, R) was not trained from A0 and B0; empty if it can have been."""
    inner = float(((B0.mT @ B) * (A0 @ A.mT)).sum())
    norm, norm0 = (math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))) for b, a in ((B, A), (B0, A0)))
    if not norm0:
        return "it began as zeros, which no training moves" if norm else ""
    if not norm:
        return "it is zero"
    cosine, times = inner / norm / norm0, inner / norm0**2
    if cosine > _SAME_WAY or times > _MOST:
        return "" if _LEAST <= times <= _MOST else f"{norm / norm0:.2g} times as large"
    own, own0 = own_block(B, A, weight.rank, weight.expert), own_block(B0, A0, weight.rank, weight.expert)
    return "" if all(map(_leans, own, own0)) else f"cosine {cosine:.3f}"


def _leans(X: Tensor, X0: Tensor) -> bool:
    """Whether a factor holds what it began with, by more than chance."""
    inner, norm, norm0 = float((X * X0).sum()), float(X.norm()), float(X0.norm())
    chance = min(3 / math.sqrt(X.numel()), _SAME_WAY)
    return bool(norm and norm0) and inner > chance * norm * norm0 and inner > math.sqrt(_LEAST) * norm0**2


@dataclass(frozen=True, slots=True)
class _Module:
    """A module whose factors are taken as they lie: see `factors.Placed`."""

    module: str
    key: str
    shape: tuple[int, int]
    rank: int
    expert: None = None
    untrainable: int = 0


def _whole_modules(header: Header) -> list[_Module]:
    keys = sorted({found[0] for found in map(key_and_factor, header.tensors) if found})
    shapes = [[header.tensors[lora_key(key, factor)].shape for factor in "BA"] for key in keys]
    return [_Module(key, key, (B[0], A[1]), A[0]) for key, (B, A) in zip(keys, shapes, strict=True)]


def read_config(path: Path) -> dict[str, Any]:
    """Content of an adapter_config.json. Raises CheckpointError where it is not a readable JSON object."""
    try:
        config = json.loads(plain_file(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except OSError as error:
        inside = path.parent / FOLDER
        hint = f"name the adapter in it: {inside}" if (inside / CONFIG).is_file() else ""
        hint = hint or f"name the folder that holds {CONFIG} and {WEIGHTS}"
        raise CheckpointError(f"{path}: {error.strerror}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a readable JSON object: {error}", hint="save the adapter again"
        ) from error
    return config


def _lora_config(path: Path) -> dict[str, Any]:
    config = read_config(path / CONFIG)
    if config.get("peft_type") != "LORA":
        raise PlanError(f"{path / CONFIG} does not describe a LoRA adapter", hint="name the folder of one")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise CheckpointError(f"{path / CONFIG}: target_parameters is {parameters!r}", hint="save the adapter again")
    beyond = [f"{key} = {config[key]!r}" for key in BEYOND_FACTORS if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append(f"bias = {config['bias']!r}")
    if beyond:
        raise PlanError(
            f"{path / CONFIG}: {', '.join(beyond)}: this is more than two factors a module, and would be lost",
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
) -> Factors:
    if missing := {"A", "B"} - keys.keys():
        raise CheckpointError(
            f"{path / WEIGHTS}: {module} has no lora_{missing.pop()}: the adapter is incomplete",
            hint="save the adapter again",
        )
    rank, alpha = rank_of(module), alpha_of(module)
    (a_rank, n), (m, b_rank) = header.tensors[keys["A"]].shape, header.tensors[keys["B"]].shape
    if not a_rank == b_rank == rank * experts:
        raise CheckpointError(
            f"{path / WEIGHTS}: {module} has A {[a_rank, n]} and B {[m, b_rank]}, {CONFIG} says rank {rank}",
            hint="save the adapter and its config again, together",
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factors(module, keys["A"], keys["B"], int(rank), (m, n), scale, experts)


def _of_modules(config: Mapping[str, Any], pattern: str, default: str, path: Path) -> Callable[[str], float]:
    """Every module's rank or alpha, as PEFT looks it up. Raises CheckpointError, here and when it is asked."""
    try:
        found = pattern_of(config.get(pattern) or {})
    except ValueError as error:
        hint = "write the modules' names into it, as milora-init does"
        raise CheckpointError(f"{path / CONFIG}: {pattern}: {error}", hint=hint) from None
    except AttributeError:
        raise CheckpointError(f"{path / CONFIG}: {pattern} is no object", hint="save the adapter again") from None

    def find(module: str) -> float:
        value = found(module)
        value = config.get(default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _HUGE:
            what = f"{default} or {pattern} gives {module} {str(value)[:80]}"
            raise CheckpointError(f"{path / CONFIG}: {what}", hint="save the adapter again")
        return float(value)

    return find
