"""Select weights by target names, and write `target_modules` that PEFT resolves to exactly these weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from milora_init.errors import PlanError
from milora_init.model.adaptable import EXPERTS, Adaptable, ModelStructure
from milora_init.untrusted import plain_names

ALL_LINEAR = "all-linear"
REGEX = "re:"
_LIMIT_S = 10
_DEPTH = 100  # parts of a name, from a file that may be hostile; models have about ten
# A regular expression can take hours, and Python cannot interrupt it in its own process.
_CHILD = """
import json, re, sys
pattern, names = json.load(sys.stdin)
try:
    print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))
except (re.error, OverflowError, RecursionError) as error:
    print(json.dumps(str(error)))
"""


def select(structure: ModelStructure, targets: Sequence[str], exclude: Sequence[str] = ()) -> list[Adaptable]:
    """The adaptable weights that match `targets` and not `exclude`, in the model's order.

    As in PEFT, a target is a module's full name or a suffix of it after a dot, or `all-linear`; `re:PATTERN` must match
    the full name. Experts match only a target that contains `experts` (`experts`, `experts.down_proj`), and modules of
    a vision or audio tower only one that contains the tower's name.

    Raises:
        PlanError: A target or an exclusion that matches nothing, or only modules that cannot be adapted.
    """
    chosen: set[str] = set()
    names = {*structure.modules, *structure.adaptable, *structure.experts, *structure.refused}
    for target in targets:
        if target == ALL_LINEAR:
            hits = {name for name in structure.adaptable.keys() - structure.heads if not _tower(structure, name)}
            if not hits:
                raise PlanError(f"{structure.architecture} has no linear layer that can be adapted")
            chosen |= hits
            continue
        matches = matching([target], names)
        hits = {name for name in structure.adaptable if name in matches and _tower(structure, name) in target}
        hits |= set(filter(names_fused(target, matches), structure.experts))
        if not hits:
            raise _no_hit(structure, target, matches)
        chosen |= hits
    for target in exclude:
        matches = matching([target], names)
        hits = matches & set(structure.modules)
        hits |= set(filter(names_fused(target, matches), structure.experts))
        if not hits:
            hint = f"modules: {', '.join(suffixes(structure))}"
            raise PlanError(f"exclude {target!r} matches no module of {structure.architecture}", hint=hint)
        chosen -= hits
    if not chosen:
        raise PlanError("every target is excluded", hint="drop an --exclude")
    linears = [weight for name, weight in structure.adaptable.items() if name in chosen]
    return linears + [weight for name, group in structure.experts.items() if name in chosen for weight in group]


def names_fused(target: str, matches: Collection[str]) -> Callable[[str], bool]:
    """A function that says whether a target with these matches selects a fused parameter of experts.

    It does if it contains `experts` and matches the parameter's name or that of the module that owns it.
    """
    return lambda parameter: EXPERTS in target and (parameter in matches or parameter.rpartition(".")[0] in matches)


def _no_hit(structure: ModelStructure, target: str, matches: Collection[str]) -> PlanError:
    """The error for a target that selects no weight, with the reason if one is known."""
    reason, fused = "", names_fused(target, matches)
    hint = f"modules that can be adapted: {', '.join(suffixes(structure))}"
    if refused := next((name for name in structure.refused if name in matches or fused(name)), None):
        reason = f" that can be adapted: {refused} is {structure.refused[refused]}"
    elif tower := next((_tower(structure, name) for name in structure.adaptable if name in matches), ""):
        reason, hint = f" outside {tower}, which a target must name", f"--target 're:.*\\.{tower}\\..*{target}'"
    elif any(name in matches for name in structure.experts):
        reason = ", only experts, which a target must name"
    elif module := next((name for name in structure.modules if name in matches), None):
        reason = f" that can be adapted: {module} is not a linear layer"
    if "," in target and not target.startswith(REGEX):
        hint = f"give each its own option: {' '.join(f'--target {part.strip()}' for part in target.split(','))}"
    return PlanError(
        f"target {target!r} matches no module of {structure.architecture}{reason}",
        hint=hint,
    )


def _tower(structure: ModelStructure, module: str) -> str:
    """The last part of the name of the tower that a module is in; empty if it is in none."""
    return next((tower.rpartition(".")[2] for tower in structure.towers if module.startswith(f"{tower}.")), "")


def name_suffixes(name: str) -> list[str]:
    """The targets that match a module: its full name, and the suffixes of it after a dot."""
    parts = name.split(".")
    return [name, *(".".join(parts[first:]) for first in range(max(1, len(parts) - _DEPTH), len(parts)))]


def _match_suffixes(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that a list of names and suffixes matches in PEFT."""
    wanted = set(targets)
    return {name for name in names if not wanted.isdisjoint(name_suffixes(name))}


def matching(targets: Sequence[str], names: Collection[str]) -> set[str]:
    """The names that a list of targets matches: names, suffixes and `re:PATTERN`.

    Raises:
        PlanError: A pattern that is not a regular expression, or that takes too long.
    """
    found = _match_suffixes((target for target in targets if not target.startswith(REGEX)), names)
    for target in targets:
        if target.startswith(REGEX):
            found |= _match_pattern(target, names)
    return found


def _match_pattern(target: str, names: Collection[str]) -> set[str]:
    """The names that a regular expression matches completely, found in another process, which can be stopped."""
    request = json.dumps([target.removeprefix(REGEX), list(names)])
    command = [sys.executable or "python3", "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        hint = "write it without a repetition inside a repetition, such as (a+)*, or name the modules"
        raise PlanError(f"target {target!r} takes more than {_LIMIT_S} s to match", hint=hint) from None
    except (OSError, ValueError) as error:  # it did not start, or printed no JSON
        raise PlanError(f"target {target!r} cannot be matched: {error}", hint="name the modules") from None
    if isinstance(found, str):
        hint = "write it as Python's re does, in quotes: --target 're:.*\\.(q|v)_proj'"
        raise PlanError(f"target {target!r} is not a regular expression: {found}", hint=hint)
    return set(found)


def suffixes(structure: ModelStructure) -> list[str]:
    """The last parts of the adaptable modules' names, in the model's order, to show to the user."""
    linears = (name.rpartition(".")[2] for name in structure.adaptable if not _tower(structure, name))
    fused = (group[0].suffix for group in structure.experts.values())
    return list(dict.fromkeys([*linears, *fused]))


@dataclass(frozen=True, slots=True)
class PeftTargets:
    """The targets in PEFT's terms.

    Attributes:
        modules: `target_modules`: a list of names and suffixes, or one regular expression.
        parameters: `target_parameters`, full names.
        keys: By target, the `key` of `lora_key`: its part of the names of the adapter's tensors.
        names: By target, the name that PEFT looks up in rank_pattern and alpha_pattern.
    """

    modules: list[str] | str
    parameters: list[str]
    keys: Mapping[str, str]
    names: Mapping[str, str]


def peft_targets(weights: Iterable[Adaptable], structure: ModelStructure) -> PeftTargets:
    """The targets for which PEFT adapts exactly these weights, in the model's order.

    Raises:
        PlanError: There are none.
    """
    modules: list[str] = []
    wrapped: list[str] = []
    fused: list[str] = []
    for weight in {weight.target: weight for weight in weights}.values():
        as_parameter = weight.target.rpartition(".")[2] in structure.as_parameters
        (fused if weight.expert else wrapped if as_parameter else modules).append(weight.target)
    names = {module: module for module in modules} | {module: f"{module}.weight" for module in wrapped}
    keys = {module: module for module in (*modules, *wrapped)}
    # PEFT wraps the owner once for each of its parameters; the first wrapper is the innermost.
    owners = [parameter.rpartition(".")[0] for parameter in fused]
    for place, parameter in enumerate(fused):
        names[parameter] = parameter
        keys[parameter] = owners[place] + ".base_layer" * owners[place + 1 :].count(owners[place])
    targets = shortest_target_modules(modules, structure.modules) if modules else []
    if structure.as_parameters and isinstance(targets, str):
        raise PlanError(
            "no target_modules of PEFT selects exactly these modules of a model with experts",
            hint="--target the modules of one kind only",
        )
    return PeftTargets(targets, sorted(names[target] for target in (*wrapped, *fused)), keys, names)


def resolve_target_modules(targets: object, modules: Collection[str]) -> set[str]:
    """The modules that `target_modules` selects in PEFT: a list of names and suffixes, or full names joined by `|`.

    Raises:
        ValueError: Any other regular expression. It comes from a file, so it is not run.
    """
    if isinstance(targets, str):
        return set(plain_names(targets)).intersection(modules)
    return _match_suffixes(map(str, targets), modules) if isinstance(targets, (list, tuple)) else set()


def shortest_target_modules(adapted: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """The shortest `target_modules` that selects exactly the adapted modules in PEFT.

    Suffixes like `q_proj` if they match no other module, else full names. If even a full name is a suffix of another
    module's, one regular expression, which PEFT compares with the whole name.
    """
    wanted = set(adapted)
    for names in (sorted({module.rpartition(".")[2] for module in adapted}), sorted(adapted)):
        if _match_suffixes(names, modules) == wanted:
            return names
    return "|".join(re.escape(module) for module in sorted(adapted))
