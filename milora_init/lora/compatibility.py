"""Decide whether a trained adapter was trained from the initial adapter of a given residual base.

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
from milora_init.lora.folder import CONFIG_FILE, LORA_FOLDER, WEIGHTS_FILE, AdaptedWeight, LoraAdapter, open_factors
from milora_init.lora.tensor_layout import initial_block, lora_key, parse_lora_key
from milora_init.manifest import Manifest, read_manifest

# Limits of `modules_not_trained_from`.
_LEAST_COSINE = 0.5
_LEAST_SHARE, _MOST_SHARE = 0.1, 30
_SAME_DIRECTION, _MOST_SCALED = 0.99, 2.5
_MOST_NAMES = 3  # in one message
OTHER_BASE_HINT = "name the base that it was trained on"


def explain_other_class(own: Set[str], other: Set[str], manifest: Manifest | None) -> tuple[str, str] | None:
    """What is wrong and a hint, if an adapter was trained on another model class than the base was made for; else None.

    In another class the same modules have another prefix. PEFT finds modules by full name: it ignores the base's
    adapter, and trains a new one on a base that lacks its components.

    Args:
        own: The modules of the base's adapter.
        other: The modules of the trained adapter.
        manifest: Of the base, for the names of both classes.
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
    other_class, own_class, auto = source.get("other_class"), source.get("architecture"), "AutoModelForCausalLM"
    if inputs.get("text_only"):
        named = f" ({other_class})" if other_class else ""
        hint = f"with {auto} and train again; or make the pair without --text-only"
    else:
        named = f" ({other_class}, which {auto} builds)" if other_class else ""
        hint = f"as a {own_class} and train again" if own_class else ""
        hint += f"; or make the pair with --text-only, for {auto}" if other_class and own_class else ""
    what = f"was trained on another class{named}: its {module} is {name} here, and PEFT left this base's adapter out"
    return what, f"load the base {hint}" if hint else "load the base with the class it was made for, and train again"


def require_same_modules(initial: LoraAdapter, trained: LoraAdapter, manifest: Manifest | None = None) -> None:
    """Two adapters must have the same modules, shapes and scales.

    The paths in their configs may differ, because a base can be moved or pushed. Whether one was trained from the
    other is checked by `require_trained_from`.

    Raises:
        PlanError: They differ, or are the same folder.
    """
    if initial.path.resolve() == trained.path.resolve():
        raise PlanError(f"{trained.path} is both the initial and the trained adapter", hint="name two folders")
    hint = f"name the adapter that was trained from {initial.path}, saved as it was trained"
    if found := explain_other_class(initial.modules.keys(), trained.modules.keys(), manifest):
        raise PlanError(f"{trained.path} {found[0]}", hint=found[1])
    if differing := initial.modules.keys() ^ trained.modules.keys():
        module = min(differing)
        where = initial.path if module in initial.modules else trained.path
        raise PlanError(
            f"{len(differing)} modules are in one adapter only, {module} first (in {where})",
            hint=hint,
        )
    for module, start in initial.modules.items():
        end = trained.modules[module]
        for what, was, now in (
            ("rank", start.rank, end.rank),
            ("shape", list(start.shape), list(end.shape)),
            ("scale", start.scale, end.scale),
        ):
            if was != now:
                raise PlanError(
                    f"{module} has {what} {was} in {initial.path}, but {now} in {trained.path}",
                    hint=hint,
                )


def require_initial_adapter(lora: LoraAdapter, manifest: Manifest) -> None:
    """An adapter must be the one that the base was made with: the same SHA-256 and the same scales.

    Raises:
        PlanError: It is another one.
    """
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


def other_base_in_config(config: Mapping[str, Any], manifest: Manifest) -> str:
    """The base that an adapter's config names, if that is a folder of another run of milora-init; else empty."""
    path = config.get("base_model_name_or_path")
    other = None
    if isinstance(path, str) and path:
        with suppress(MiloraError, OSError, ValueError):  # not a folder, or not readable: nothing is known
            other = read_manifest(Path(path).expanduser())
    return str(path) if other and other.fingerprint != manifest.fingerprint else ""


def require_trained_on(lora: LoraAdapter, manifest: Manifest, initial: Path) -> None:
    """An adapter with the initial one's modules, shapes and scales must have been trained on the manifest's base.

    Args:
        lora: The trained adapter.
        manifest: Of the base.
        initial: The file of the initial adapter's weights.

    Raises:
        PlanError: Its config names another residual base, or a module was not trained from the initial one.
        CheckpointError: A file that cannot be read.
    """
    if other := other_base_in_config(lora.config, manifest):
        raise PlanError(f"{lora.path} was trained on {other}, another residual base", hint=OTHER_BASE_HINT)
    require_trained_from(initial, lora.weights, manifest.weights)


def require_trained_from(initial: Path, trained: Path, weights: Sequence[AdaptedWeight] = ()) -> None:
    """Every module of an adapter must have been trained from the initial one; see `modules_not_trained_from`.

    Raises:
        PlanError: One was not, or has entries that are NaN or infinite.
        CheckpointError: A file that cannot be read.
    """
    if found := modules_not_trained_from(initial, trained, weights):
        raise PlanError(f"{trained}: {summarise_modules(found)}", hint=OTHER_BASE_HINT)


def summarise_modules(reasons: Mapping[str, str]) -> str:
    """One line about the result of `modules_not_trained_from`."""
    first = ", ".join(f"{module} ({why})" for module, why in list(reasons.items())[:_MOST_NAMES])
    more = f", and {len(reasons) - _MOST_NAMES} more" if len(reasons) > _MOST_NAMES else ""
    return f"unrelated to the adapter that this base was made with, in {len(reasons)} of its weights: {first}{more}"


def modules_not_trained_from(initial: Path, trained: Path, weights: Sequence[AdaptedWeight] = ()) -> dict[str, str]:
    """The modules of an adapter that cannot have been trained from the initial one, each with the reason.

    Every module (of stacked experts: every matrix) is judged by itself. A and B (rank r) start at A0 (r, n) and
    B0 (m, r), and training adds to them; P = B A and P0 = B0 A0. A module passes if one of these holds:

    - P has the direction of P0: cos(P, P0) > 0.5, and the share of P0 in P, <P, P0> / |P0|^2, is between 0.1 and 30.
      For unrelated factors the cosine is about 1 / sqrt(m n), and 1 / sqrt(m r) if one of the two factors is right.
      Training that makes P larger also turns it: with a cosine above 0.99 the share must be between 0.4 and 2.5.
    - A and B each keep their start. The smallest components are so small that what training adds is soon many times as
      large, and the cosine of the products falls to that of unrelated factors; the cosine of each factor does so later.
      What is added has no reason to cancel A0, so <A, A0> / |A0|^2 stays near 1: at least sqrt(0.1) is required. And
      cos(A, A0) must be at least three times that of unrelated factors, 1 / sqrt(r n). The same for B.

    Measured on models of width 32 to 256, ranks 4 and 8, with AdamW: after 20 steps at a rate of 1e-2 or 200 at 1e-3
    every module passes; |P| was up to 160 times |P0|, and the share of P0 up to 9. After 1000 steps at 3e-3 (|P| up to
    500 times |P0|) 3 of 60 modules fail, all of smallest components at width 64; at rates that make the loss grow,
    most fail. The cosine of unrelated factors falls with the width: at 4096 and rank 64 it is 1 / 512. Noise, another
    layer's factors, and exchanged or permuted ones have that cosine; zeros, and factors multiplied by 1000, are outside
    0.1 to 30.

    A module all of whose directions are `untrainable` has no direction to compare, and passes. Factors that began as
    exact zeros get no gradient, and must still be zeros.

    Args:
        initial, trained: Files of weights with the same names and shapes.
        weights: The weights that were split; whole modules, by the names in the file, if there are none.

    Raises:
        PlanError: An entry that is NaN or infinite.
        CheckpointError: A file that cannot be read.
    """
    found: dict[str, str] = {}
    with open_factors(trained) as after, open_factors(initial) as before:
        for weight in weights or _whole_modules(before.header):
            B, A, B0, A0 = (factor.double() for reader in (after, before) for factor in reader.read(weight))
            if not bool(A.isfinite().all() and B.isfinite().all()):
                hint = "look at the loss of the training, and train again: such an adapter cannot be used"
                raise PlanError(f"{trained}: {weight.module} has entries that are NaN or infinite", hint=hint)
            # The manifest may be somebody's: the factors themselves must be as small as it says.
            s = float((B0.norm(dim=0) * A0.norm(dim=1)).max()) * weight.scale
            if s and weight.untrainable >= weight.rank and s < 2e-6 * weight.s_max:
                continue
            if why := _not_trained_from(B, A, B0, A0, weight):
                found[weight.module] = why
    return found


def _not_trained_from(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, weight: AdaptedWeight) -> str:
    """Why A (R, n) and B (m, R) were not trained from A0 and B0; empty if they can have been."""
    for now, start in ((B.norm(dim=0), B0.norm(dim=0)), (A.norm(dim=1), A0.norm(dim=1))):
        # Not of the smallest ones, which a 16-bit dtype may have rounded to zero.
        if bool(((now == 0) & (start > 1e-3 * start.max())).any()):
            return "some of its directions are zero, and were not at the start"
    inner = float(((B0.mT @ B) * (A0 @ A.mT)).sum())
    norm, norm0 = (math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))) for b, a in ((B, A), (B0, A0)))
    if not norm0:
        return "the initial factors are zeros, which get no gradient, and these are not" if norm else ""
    if not norm:
        return "it is zero"
    cosine, share = inner / norm / norm0, inner / norm0**2
    if cosine > _SAME_DIRECTION and not 1 / _MOST_SCALED <= share <= _MOST_SCALED:
        return f"it is the initial component times {share:.2g}"
    if cosine > _LEAST_COSINE or share > _MOST_SHARE:
        return "" if _LEAST_SHARE <= share <= _MOST_SHARE else f"{norm / norm0:.2g} times as large"
    own, own0 = initial_block(B, A, weight.rank, weight.expert), initial_block(B0, A0, weight.rank, weight.expert)
    return "" if all(map(_keeps_start, own, own0)) else f"cosine {cosine:.3f}"


def _keeps_start(X: Tensor, X0: Tensor) -> bool:
    """Whether a factor still has its initial value X0 in it, by more than unrelated factors have."""
    inner, norm, norm0 = float((X * X0).sum()), float(X.norm()), float(X0.norm())
    least_cosine = min(3 / math.sqrt(X.numel()), _LEAST_COSINE)
    is_similar = bool(norm and norm0) and inner > least_cosine * norm * norm0
    return is_similar and inner > math.sqrt(_LEAST_SHARE) * norm0**2


@dataclass(frozen=True, slots=True)
class _WholeModule:
    """A module of which no record is known: an AdaptedWeight with all of the factors' tensors."""

    module: str
    key: str
    shape: tuple[int, int]
    rank: int
    expert: None = None
    untrainable: int = 0
    scale: float = 1.0
    s_max: float = 0.0


def _whole_modules(header: Header) -> list[_WholeModule]:
    keys = sorted({parsed[0] for parsed in map(parse_lora_key, header.tensors) if parsed})
    shapes = [[header.tensors[lora_key(key, factor)].shape for factor in "BA"] for key in keys]
    return [_WholeModule(key, key, (B[0], A[1]), A[0]) for key, (B, A) in zip(keys, shapes, strict=True)]
