"""Decide whether a trained adapter was trained on a given residual base.

Training starts from the initial adapter in OUT/lora and stays near it, so the initial factors identify the base. Every
module is judged on its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from milora_init.checkpoint.header import Header
from milora_init.errors import MiloraError, PlanError
from milora_init.lora.folder import CONFIG_FILE, LORA_FOLDER, WEIGHTS_FILE, LoraAdapter, Placed, open_factors
from milora_init.lora.tensor_layout import initial_block, lora_key, parse_lora_key
from milora_init.manifest import Manifest, read_manifest

_SAME_WAY, _LEAST, _MOST = 0.5, 0.1, 30  # see `unrelated`
_NAMED = 3
OTHER_BASE = "name the base that it was trained on"


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


def require_pair(before: LoraAdapter, after: LoraAdapter, manifest: Manifest | None = None) -> None:
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


def require_made_with(lora: LoraAdapter, manifest: Manifest) -> None:
    """Raise PlanError unless `lora` is the adapter of the manifest's base as it was made, to the byte and the scale."""
    if lora.digest != manifest.hashes.get(f"{LORA_FOLDER}/{WEIGHTS_FILE}"):
        raise PlanError(
            f"{lora.weights} is not the adapter that its base was made with: it was replaced, or trained in place",
            hint="put the initial one back; milora-init with the same options makes it again, in another --out",
        )
    for record in manifest.weights:
        scale = lora.modules[record.key].scale
        if abs(scale - record.scale) > 1e-9 * record.scale:
            raise PlanError(
                f"{lora.path / CONFIG_FILE} scales {record.module} by {scale:g}, "
                f"its base was made with {record.scale:g}",
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


def require_trained_on(lora: LoraAdapter, manifest: Manifest, initial: Path) -> None:
    """Raise PlanError where an adapter of the initial one's keys, shapes and scales was trained on another base.

    That is so where its config names another output of milora-init, or where a module's factors are unrelated.
    """
    if named := names_another_base(lora.config, manifest):
        raise PlanError(f"{lora.path} was trained on {named}, another residual base", hint=OTHER_BASE)
    require_related(lora.weights, initial, manifest.weights)


def require_related(trained: Path, initial: Path, weights: Sequence[Placed] = ()) -> None:
    """Raise PlanError unless every module of one adapter can be trained from the other's; see `unrelated`."""
    if found := unrelated_modules(trained, initial, weights):
        raise PlanError(f"{trained}: {summarise_unrelated(found)}", hint=OTHER_BASE)


def summarise_unrelated(unrelated: Mapping[str, str]) -> str:
    """The modules that `unrelated` found, in one line."""
    first = ", ".join(f"{module} ({why})" for module, why in list(unrelated.items())[:_NAMED])
    more = f", and {len(unrelated) - _NAMED} more" if len(unrelated) > _NAMED else ""
    return f"unrelated to the adapter that this base was made with, in {len(unrelated)} of its weights: {first}{more}"


def unrelated_modules(trained: Path, initial: Path, weights: Sequence[Placed] = ()) -> dict[str, str]:
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
    with open_factors(trained) as after, open_factors(initial) as before:
        for weight in weights or _whole_modules(before.header):
            B, A, B0, A0 = (factor.double() for reader in (after, before) for factor in reader.read(weight))
            if not bool(A.isfinite().all() and B.isfinite().all()):
                hint = "look at the training: such an adapter has learnt nothing"
                raise PlanError(f"{trained}: {weight.module} has entries that are NaN or infinite", hint=hint)
            if A0.any() and B0.any() and weight.untrainable >= weight.rank:
                continue
            if why := _unrelated_module(B, A, B0, A0, weight):
                found[weight.module] = why
    return found


def _unrelated_module(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, weight: Placed) -> str:
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
    own, own0 = initial_block(B, A, weight.rank, weight.expert), initial_block(B0, A0, weight.rank, weight.expert)
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
    keys = sorted({found[0] for found in map(parse_lora_key, header.tensors) if found})
    shapes = [[header.tensors[lora_key(key, factor)].shape for factor in "BA"] for key in keys]
    return [_Module(key, key, (B[0], A[1]), A[0]) for key, (B, A) in zip(keys, shapes, strict=True)]
