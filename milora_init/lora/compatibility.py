"""Decide whether an adapter was trained from the initial adapter of a given residual base.

A trained adapter with the wrong base gives a wrong model and no error. Training starts from the initial adapter in
OUT/lora and keeps a part of it, so the initial factors identify the base. Every module is compared separately.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_init.checkpoint.header import Header, read_header
from milora_init.errors import MiloraError, PlanError
from milora_init.lora.folder import CONFIG_FILE, AdaptedWeight, LoraAdapter, adapter_files, open_factors
from milora_init.lora.tensor_layout import initial_block, lora_key, parse_lora_key
from milora_init.manifest import Manifest, read_manifest
from milora_init.options import local_path

# Limits of `modules_not_trained_from`.
_MIN_COSINE = 0.5
_MIN_SHARE, _MAX_SHARE = 0.1, 30
_PARALLEL_COSINE, _MAX_PARALLEL_SHARE = 0.99, 2.5
_MOST_ROUNDING = 2**-7  # of a frozen factor that was stored in bfloat16
_MOST_SPREAD = 3  # of the shares of the initial directions: up to 1.5 after 20 steps of AdamW at 1e-2, width 32
_MOST_SKEW = 0.05  # of factors that came out of a residual base, after a short training
_MAX_NAMES = 3  # in one message
OTHER_OUTPUT_HINT = "give the output of milora-init that it was trained from (a new LoRA belongs to none)"
UNTRAINED = "holds the initial factors: it was not trained, or saved before its first step"


def explain_other_class(initial: Set[str], trained: Set[str], manifest: Manifest | None) -> tuple[str, str] | None:
    """A problem and a hint, if an adapter was trained on another model class than its base was made for; else None.

    In another class the same modules have names with another prefix. PEFT finds modules by their full names. It does
    not load the base's initial adapter, and trains a new one on a base without the components.

    Args:
        initial: The modules of the base's initial adapter.
        trained: The modules of the trained adapter.
        manifest: The manifest of the base, for the names of both classes.
    """
    renamed = _find_renamed_module(initial, trained)
    if renamed is None:
        return None
    trained_name, initial_name = renamed
    source, inputs = (manifest.source, manifest.inputs) if manifest else ({}, {})
    other_class, own_class, auto = source.get("other_class"), source.get("architecture"), "AutoModelForCausalLM"
    model = "base" if manifest is None or manifest.method.writes_base else "original model"
    if inputs.get("text_only"):
        cls = f" ({other_class})" if other_class else ""
        hint = f"load the {model} with {auto} and train again; or initialise without --text-only"
    else:
        cls = f" ({other_class}, which {auto} builds)" if other_class else ""
        made_for = f"as a {own_class}" if own_class else "with the class it was made for"
        hint = f"load the {model} {made_for} and train again"
        hint += f"; or initialise with --text-only, for {auto}" if other_class and own_class else ""
    problem = (
        f"was trained on another class{cls}: its module {trained_name} is {initial_name} in this output, so PEFT did "
        "not load the initial adapter"
    )
    return problem, hint


def _find_renamed_module(initial: Set[str], trained: Set[str]) -> tuple[str, str] | None:
    """A module's names (in the trained adapter, in the initial adapter), if only a prefix of all names differs.

    Returns None unless replacing one prefix turns every name that is only in the trained adapter into a name that is
    only in the initial one. A prefix with a number does not count: it names a layer, and the modules are others.
    """
    only_trained, only_initial = trained - initial, initial - trained
    if not only_trained:
        return None
    trained_name = min(only_trained)
    parts = trained_name.split(".")
    suffixes = (".".join(parts[start:]) for start in range(len(parts)))  # the longest first
    candidates = (
        (suffix, name) for suffix in suffixes for name in sorted(only_initial) if f".{name}".endswith(f".{suffix}")
    )
    suffix, initial_name = next(candidates, ("", ""))
    if not initial_name:
        return None
    prefix, initial_prefix = trained_name.removesuffix(suffix), initial_name.removesuffix(suffix)
    renamed = {initial_prefix + name.removeprefix(prefix) for name in only_trained if name.startswith(prefix)}
    is_one_prefix = len(renamed) == len(only_trained) and renamed <= only_initial
    return (trained_name, initial_name) if is_one_prefix and not re.search(r"\d", prefix + initial_prefix) else None


def require_same_modules(initial: LoraAdapter, trained: LoraAdapter, manifest: Manifest | None = None) -> None:
    """Check that two adapters have the same modules, shapes and scales.

    The paths in their configs may differ, because a base can be moved or pushed. `require_trained_from` checks whether
    one adapter was trained from the other.

    Args:
        initial: The initial adapter.
        trained: The trained adapter.
        manifest: The manifest of the base, if there is one, for a better error message.

    Raises:
        PlanError: The adapters differ.
    """
    hint = "give the adapter that was trained from this output, with the config and the tensors that PEFT saved"
    if found := explain_other_class(initial.modules.keys(), trained.modules.keys(), manifest):
        raise PlanError(f"{trained.path} {found[0]}", hint=found[1])
    if differing := initial.modules.keys() ^ trained.modules.keys():
        module = min(differing)
        where = initial.path if module in initial.modules else trained.path
        raise PlanError(
            f"{len(differing)} modules are in only one of the two adapters; the first is {module}, in {where}",
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


def require_initial_adapter(lora: LoraAdapter, manifest: Manifest, given: str) -> None:
    """Check that an adapter is the initial adapter of an output: it has the same SHA-256 and the same scales.

    Args:
        lora: The adapter.
        manifest: Of the output.
        given: The output as the user named it.

    Raises:
        PlanError: It is another adapter, or was changed.
    """
    if lora.digest != manifest.hashes.get(adapter_files(manifest.method)[1]):
        raise PlanError(
            f"{lora.weights} is not the adapter that milora-init wrote: it was replaced, or trained in place",
            hint="restore the initial adapter; milora-init with the same options and another --out makes it again",
        )
    for record in manifest.weights:
        scale = lora.modules[record.key].scale
        if abs(scale - record.scale) > 1e-9 * record.scale:
            raise PlanError(
                f"{lora.path / CONFIG_FILE} scales {record.module} by {scale:g}, "
                f"but the output was made with scale {record.scale:g}",
                hint=f"milora-init verify {given} shows the values to set",
            )


def other_base_in_config(config: Mapping[str, Any], manifest: Manifest) -> str:
    """The base that an adapter's config names, if it is the output of another run of milora-init; else empty."""
    path = config.get("base_model_name_or_path")
    other = None
    if isinstance(path, str) and path:
        with suppress(MiloraError, OSError, ValueError):  # the path is not a readable output of milora-init here
            other = read_manifest(local_path(path))
    return str(path) if other and other.fingerprint != manifest.fingerprint else ""


def other_method_in_config(config: Mapping[str, Any], manifest: Manifest) -> str:
    """How an adapter's config shows that it was initialised by another method than a manifest's; else empty.

    PEFT keeps `init_lora_weights` when it saves, and freezes B where it is "mica".
    """
    found, own = config.get("init_lora_weights", True), manifest.method.init_lora_weights
    if own is True and found != "mica":  # a trainer may write another value, which changes nothing after training
        return ""
    return "" if found == own else f"init_lora_weights is {found!r}, but method {manifest.method.name} has {own!r}"


def require_trained_on(lora: LoraAdapter, manifest: Manifest, initial: Path) -> None:
    """Check that an adapter was trained on the base of a manifest.

    Args:
        lora: The trained adapter. It must have the same modules, shapes and scales as the initial adapter.
        manifest: The manifest of the base.
        initial: The weights file of the initial adapter.

    Raises:
        PlanError: The adapter's config names another output, or a module was not trained from the initial one.
        CheckpointError: A file cannot be read.
    """
    if problem := other_method_in_config(lora.config, manifest):
        raise PlanError(f"{lora.path}: {problem}", hint=OTHER_OUTPUT_HINT)
    if other := other_base_in_config(lora.config, manifest):
        raise PlanError(f"{lora.path} was trained on {other}, another output of milora-init", hint=OTHER_OUTPUT_HINT)
    require_trained_from(initial, lora.weights, manifest.weights)


def require_trained_from(initial: Path, trained: Path, weights: Sequence[AdaptedWeight] = ()) -> None:
    """Check that every module of an adapter was trained from the initial one; see `modules_not_trained_from`.

    Raises:
        PlanError: A module was not, or has entries that are NaN or infinite.
        CheckpointError: A file cannot be read.
    """
    if found := modules_not_trained_from(initial, trained, weights):
        raise PlanError(f"{trained}: {summarise_modules(found)}", hint=OTHER_OUTPUT_HINT)


def have_equal_factors(one: Path, other: Path) -> bool:
    """Whether two weights files hold the same modules with the same factors.

    PEFT may load a frozen B in bfloat16 and save it so: B counts as the same if only this rounding differs.

    Args:
        one: The weights file with the unrounded factors.
        other: The other file.

    Raises:
        CheckpointError: A file cannot be read.
    """
    with open_factors(one) as of_one, open_factors(other) as of_other:
        modules = _whole_modules(of_one.header)
        return modules == _whole_modules(of_other.header) and all(
            torch.equal(A, A_other) and (torch.equal(B, B_other) or torch.equal(B.bfloat16().float(), B_other.float()))
            for module in modules
            for (B, A), (B_other, A_other) in [(of_one.read(module), of_other.read(module))]
        )


def is_untrained(initial: Path, adapter: Path) -> bool:
    """Whether a weights file holds the initial factors and nothing beside them.

    Args:
        initial: The weights file of the initial adapter.
        adapter: The weights file.

    Raises:
        CheckpointError: A file cannot be read.
    """
    beside = read_header(adapter).tensors.keys() - read_header(initial).tensors.keys()
    return not beside and have_equal_factors(initial, adapter)


def summarise_modules(reasons: Mapping[str, str]) -> str:
    """Describe the result of `modules_not_trained_from` in one line."""
    first = ", ".join(f"{module} ({reason})" for module, reason in list(reasons.items())[:_MAX_NAMES])
    more = f", and {len(reasons) - _MAX_NAMES} more" if len(reasons) > _MAX_NAMES else ""
    return f"unrelated to the initial adapter of this output, in {len(reasons)} of its weights: {first}{more}"


def modules_not_trained_from(initial: Path, trained: Path, weights: Sequence[AdaptedWeight] = ()) -> dict[str, str]:
    """The modules of an adapter that cannot have been trained from the initial one, each with the reason.

    Every module (for stacked experts: every matrix) is compared separately. A and B (rank r) start at A0 (r, n) and
    B0 (m, r), and training changes them. P = B A and P0 = B0 A0. A module passes if one of these conditions is true:

    - P has the direction of P0. The cosine cos(P, P0) is above 0.5, and the share of P0 in P, <P, P0> / |P0|^2, is
      between 0.1 and 30. For unrelated factors the cosine is about 1 / sqrt(m n), and about 1 / sqrt(m r) if one of the
      two factors is the right one. Training that makes P larger also changes its direction. Therefore with a cosine
      above 0.99 the share must be between 0.4 and 2.5.
    - Each of A and B still contains its initial value. The smallest components are so small that training soon adds
      many times as much. Then the cosine of the products falls to that of unrelated factors. The cosine of each factor
      falls later. Training has no reason to remove A0, so <A, A0> / |A0|^2 stays near 1, and must be above sqrt(0.1).
      And cos(A, A0) must be above three times that of unrelated factors, 1 / sqrt(r n). The same holds for B.

    Measured on models of width 32 to 256, with ranks 4 and 8 and AdamW: after 20 steps at a learning rate of 1e-2, or
    200 steps at 1e-3, every module passes; |P| was up to 160 times |P0|, and the share of P0 up to 9. After 1000 steps
    at 3e-3 (|P| up to 500 times |P0|) 3 of 60 modules fail, all of smallest components at width 64. At rates that make
    the loss grow, most modules fail.

    The cosine of unrelated factors falls with the width; at width 4096 and rank 64 it is 1 / 512. Noise, the factors of
    another layer, and exchanged or permuted factors have that cosine. For zeros, and for factors multiplied by 1000,
    the share is outside 0.1 to 30.

    A module passes without a comparison if all of its directions are `untrainable`, because there is no direction to
    compare. If the initial factors are exactly zero, they get no gradient, and the trained ones must be zero too. If
    one of the two is zero, as in an adapter of an original model, see `_reason_not_from_one_factor`.

    Args:
        initial, trained: Weights files with the same tensor names and shapes.
        weights: The weights that were split. Without them, every module in the file is compared as a whole.

    Raises:
        PlanError: An entry is NaN or infinite.
        CheckpointError: A file cannot be read.
    """
    found: dict[str, str] = {}
    with open_factors(trained) as after, open_factors(initial) as before:
        for weight in weights or _whole_modules(before.header):
            B, A, B0, A0 = (factor.double() for reader in (after, before) for factor in reader.read(weight))
            if not bool(A.isfinite().all() and B.isfinite().all()):
                hint = "such an adapter cannot be used: look at the training loss, and train again"
                raise PlanError(f"{trained}: {weight.module} has entries that are NaN or infinite", hint=hint)
            # The manifest is not trusted: the initial factors themselves must be as small as it says.
            largest = float((B0.norm(dim=0) * A0.norm(dim=1)).max()) * weight.scale
            if largest and weight.untrainable >= weight.rank and largest < 2e-6 * weight.s_max:
                continue
            if reason := _reason_not_trained_from(B, A, B0, A0, weight):
                found[weight.module] = reason
    return found


def _reason_not_trained_from(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, weight: AdaptedWeight) -> str:
    """Why B (m, R) and A (R, n) cannot have been trained from B0 and A0; empty if they can."""
    for now, start in ((B.norm(dim=0), B0.norm(dim=0)), (A.norm(dim=1), A0.norm(dim=1))):
        # The smallest directions are not checked, because a 16-bit dtype may have rounded them to zero.
        if bool(((now == 0) & (start > 1e-3 * start.max())).any()):
            return "some of its directions are zero, but were not at the start"
    inner = float(((B0.mT @ B) * (A0 @ A.mT)).sum())
    norm, norm0 = (math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))) for b, a in ((B, A), (B0, A0)))
    block = initial_block(B, A, weight.rank, weight.expert)
    block0 = initial_block(B0, A0, weight.rank, weight.expert)
    if bool(B0.any()) != bool(A0.any()):
        return _reason_not_from_one_factor(block, block0)
    if not norm0:
        return "its initial factors are zero and get no gradient, but its trained factors are not zero" if norm else ""
    if not norm:
        return "it is zero"
    cosine, share = inner / norm / norm0, inner / norm0**2
    if cosine > _PARALLEL_COSINE and not 1 / _MAX_PARALLEL_SHARE <= share <= _MAX_PARALLEL_SHARE:
        return f"it is the initial component times {share:.2g}"
    if cosine > _MIN_COSINE or share > _MAX_SHARE:
        return "" if _MIN_SHARE <= share <= _MAX_SHARE else f"{norm / norm0:.2g} times as large"
    return "" if all(map(_contains_start, block, block0)) else f"cosine {cosine:.3f}"


def _reason_not_from_one_factor(factors: tuple[Tensor, Tensor], initial: tuple[Tensor, Tensor]) -> str:
    """The same for B (m, r) and A (r, n) of which one was zero at the start; see `methods`.

    `left` factors keep B, which PEFT freezes. Of `right` ones A must contain its start, and each row about as much of
    it as the others: training turns rows, while those of a MiLoRA adapter start with lengths that differ like the roots
    of singular values. B must not look as if it had come out of a residual base, whose A may be the same: there the
    columns of B are orthogonal to each other, and as long as the rows of A.
    """
    (B, A), (B0, A0) = factors, initial
    if bool(B0.any()):
        moved = float((B - B0).norm() / B0.norm())
        return "" if moved <= _MOST_ROUNDING else f"its B differs from the frozen one by {moved:.2g} of it"
    if not _contains_start(A, A0):
        return (
            f"its A has the cosine {float((A * A0).sum() / (A.norm() * A0.norm()).clamp_min(1e-300)):.3f} to the start"
        )
    shares = (A * A0).sum(dim=1) / A0.square().sum(dim=1).clamp_min(1e-300)
    if not float(shares.max()) <= _MOST_SPREAD * float(shares.min()):
        return f"its A has {float(shares.min()):.2g} to {float(shares.max()):.2g} of the start, by direction"
    lengths, rows = B.norm(dim=0), A.norm(dim=1)
    gram = B.mT @ B / (lengths[:, None] * lengths).clamp_min(1e-300)
    skew = float((gram - gram.diagonal().diag()).abs().max())
    same_lengths = float((lengths / rows.clamp_min(1e-300) - 1).abs().max()) < _MOST_SKEW
    if len(rows) > 2 and skew < _MOST_SKEW and same_lengths:
        return "its B and A are singular directions, so they were taken out of a residual base"
    return ""


def _contains_start(X: Tensor, X0: Tensor) -> bool:
    """Whether a factor X still contains its initial value X0, more than an unrelated factor does by chance."""
    inner, norm, norm0 = float((X * X0).sum()), float(X.norm()), float(X0.norm())
    min_cosine = min(3 / math.sqrt(X.numel()), _MIN_COSINE)
    is_similar = bool(norm and norm0) and inner > min_cosine * norm * norm0
    return is_similar and inner > math.sqrt(_MIN_SHARE) * norm0**2


@dataclass(frozen=True, slots=True)
class _WholeModule:
    """An AdaptedWeight for a module without a record: its factors are the whole tensors."""

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
