"""Select weights by target names, and make targets for which PEFT adapts exactly these weights.

The user's targets follow PEFT's rules for names and suffixes, with a few limits for experts and for vision and audio
towers. The targets in adapter_config.json are made from the selected weights, not copied from the user. Otherwise PEFT
could also adapt modules that were not split.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from milora_init.errors import PlanError
from milora_init.model.adaptable import EXPERTS, Adaptable, ModelStructure
from milora_init.options import measured_target
from milora_init.untrusted import plain_names

ALL_LINEAR = "all-linear"
REGEX = "re:"
_REGEX_LIMIT_S = 10
_MAX_NAME_PARTS = 100  # a limit for names from untrusted files; the names of real models have about ten parts
# Runs in a child process: a regular expression can take hours, and Python cannot interrupt it in its own process.
_CHILD_CODE = """
import json, re, sys
pattern, names = json.load(sys.stdin)
try:
    print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))
except (re.error, OverflowError, RecursionError) as error:
    print(json.dumps(str(error)))
"""


def select(
    structure: ModelStructure,
    targets: Sequence[str],
    exclude: Sequence[str] = (),
    measured: Mapping[str, Collection[str]] = {},
) -> list[Adaptable]:
    """The adaptable weights that match `targets` and not `exclude`, in the model's order.

    As in PEFT, a target is the full name of a module, a suffix of it that follows a dot, or `all-linear`. A target
    `re:PATTERN` must match the full name. Experts match only a target that contains `experts` (`experts`,
    `experts.down_proj`). Modules of a vision or audio tower match only a target that contains the tower's name.

    Args:
        structure: The modules of the model.
        targets: The targets; a weight needs to match one of them.
        exclude: Names, suffixes and `re:PATTERN` of modules that are not adapted.
        measured: The modules that each target means which chooses by a figure, such as `kappa:0.2`.

    Raises:
        PlanError: A target matches nothing, or only modules that cannot be adapted; an exclusion matches no module; or
            no weight remains.
    """
    selected: set[str] = set()
    names = {*structure.modules, *structure.adaptable, *structure.experts, *structure.refused}
    for target in targets:
        if target in measured:
            selected |= set(measured[target])
            continue
        if measured_target(target):
            hint = "name modules here; `milora-init init` takes this target"
            raise PlanError(f"target {target!r} chooses by a scan, and none was made", hint=hint)
        if target == ALL_LINEAR:
            hits = {name for name in structure.adaptable.keys() - structure.heads if not _tower(structure, name)}
            if not hits:
                raise PlanError(f"{structure.architecture} has no linear layer that can be adapted")
            selected |= hits
            continue
        matches = matching([target], names)
        # Outside the towers `_tower` is empty, and every target contains the empty text.
        hits = {name for name in structure.adaptable if name in matches and _tower(structure, name) in target}
        hits |= {name for name in structure.experts if selects_experts(target, matches, name)}
        if not hits:
            raise _no_match_error(structure, target, matches)
        selected |= hits
    for target in exclude:
        matches = matching([target], names)
        hits = matches & set(structure.modules)
        hits |= {name for name in structure.experts if selects_experts(target, matches, name)}
        if not hits:
            hint = f"the modules are {', '.join(suffixes(structure))}"
            raise PlanError(f"exclude {target!r} matches no module of {structure.architecture}", hint=hint)
        selected -= hits
    if not selected:
        raise PlanError("every target is excluded", hint="remove an --exclude")
    linears = [weight for name, weight in structure.adaptable.items() if name in selected]
    return linears + [weight for name, group in structure.experts.items() if name in selected for weight in group]


def selects_experts(target: str, matches: Collection[str], parameter: str) -> bool:
    """Whether a target selects a fused parameter of experts.

    It does if it contains `experts`, and matches the parameter's name or that of the module that owns the parameter.

    Args:
        target: The target.
        matches: All names that the target matches.
        parameter: The name of the fused parameter.
    """
    return EXPERTS in target and (parameter in matches or parameter.rpartition(".")[0] in matches)


def _no_match_error(structure: ModelStructure, target: str, matches: Collection[str]) -> PlanError:
    """The error for a target that selects no weight, with the reason if one is known."""
    reason = ""
    hint = f"--target all-linear, or some of the modules that can be adapted: {', '.join(suffixes(structure))}"
    refused_matches = (name for name in structure.refused if name in matches or selects_experts(target, matches, name))
    if refused := next(refused_matches, None):
        reason = f" that can be adapted: {refused} is {structure.refused[refused]}"
    elif tower := next((_tower(structure, name) for name in structure.adaptable if name in matches), ""):
        reason, hint = (
            f" outside {tower}; a target must contain this name to adapt its modules",
            f"--target 're:.*\\.{tower}\\..*{target}'",
        )
    elif any(name in matches for name in structure.experts):
        reason = f", only experts; a target must contain `{EXPERTS}` to adapt them"
    elif module := next((name for name in structure.modules if name in matches), None):
        reason = f" that can be adapted: {module} is not a linear layer"
    if "," in target and not target.startswith(REGEX):
        hint = f"give each target its own option: {' '.join(f'--target {part.strip()}' for part in target.split(','))}"
    return PlanError(
        f"target '{target}' matches no module of {structure.architecture}{reason}",
        hint=hint,
    )


def _tower(structure: ModelStructure, module: str) -> str:
    """The last part of the name of the tower that a module is in; empty if it is in none."""
    return next((tower.rpartition(".")[2] for tower in structure.towers if module.startswith(f"{tower}.")), "")


def name_suffixes(name: str) -> list[str]:
    """The targets that match a module: its full name, and every suffix of it that follows a dot."""
    parts = name.split(".")
    return [name, *(".".join(parts[first:]) for first in range(max(1, len(parts) - _MAX_NAME_PARTS), len(parts)))]


def _match_suffixes(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that PEFT matches with a list of names and suffixes."""
    wanted = set(targets)
    return {name for name in names if not wanted.isdisjoint(name_suffixes(name))}


def matching(targets: Sequence[str], names: Collection[str]) -> set[str]:
    """The names that a list of targets matches: names, suffixes and `re:PATTERN`.

    Raises:
        PlanError: A pattern is not a regular expression, or takes too long.
    """
    found = _match_suffixes((target for target in targets if not target.startswith(REGEX)), names)
    for target in targets:
        if target.startswith(REGEX):
            found |= _match_pattern(target, names)
    return found


def _match_pattern(target: str, names: Collection[str]) -> set[str]:
    """The names that a regular expression matches completely. A child process does it, because it can be stopped."""
    request = json.dumps([target.removeprefix(REGEX), list(names)])
    command = [sys.executable or "python3", "-I", "-S", "-c", _CHILD_CODE]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=_REGEX_LIMIT_S, check=False
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        hint = "remove repetitions inside repetitions, such as (a+)*, or give module names"
        raise PlanError(f"target {target!r} takes more than {_REGEX_LIMIT_S} s to match", hint=hint) from None
    except (OSError, ValueError) as error:  # the process did not start, or printed no JSON
        raise PlanError(f"target {target!r} cannot be matched: {error}", hint="give module names") from None
    if isinstance(found, str):
        hint = "write a regular expression of Python's re module, in quotes: --target 're:.*\\.(q|v)_proj'"
        raise PlanError(f"target {target!r} is not a regular expression: {found}", hint=hint)
    return set(found)


def suffixes(structure: ModelStructure) -> list[str]:
    """The last parts of the names of adaptable modules outside towers, in the model's order, for messages."""
    linears = (name.rpartition(".")[2] for name in structure.adaptable if not _tower(structure, name))
    fused = (group[0].suffix for group in structure.experts.values())
    return list(dict.fromkeys([*linears, *fused]))


@dataclass(frozen=True, slots=True)
class PeftTargets:
    """The targets in the form of adapter_config.json.

    Attributes:
        modules: The content of `target_modules`: a list of names and suffixes, or one regular expression.
        parameters: The content of `target_parameters`: full names.
        keys: The `key` of `lora_key` by target, which is a part of the names of the adapter's tensors.
        names: The name that PEFT looks up in rank_pattern and alpha_pattern, by target.
    """

    modules: list[str] | str
    parameters: list[str]
    keys: Mapping[str, str]
    names: Mapping[str, str]


def peft_targets(weights: Iterable[Adaptable], structure: ModelStructure) -> PeftTargets:
    """The targets for which PEFT adapts exactly these weights, in the model's order.

    Raises:
        PlanError: No targets select exactly these weights in PEFT.
    """
    modules: list[str] = []
    as_parameters: list[str] = []  # modules that must be listed in target_parameters, as `<module>.weight`
    fused: list[str] = []
    for weight in {weight.target: weight for weight in weights}.values():  # one for all experts of a parameter
        if weight.expert:
            fused.append(weight.target)
        elif weight.target.rpartition(".")[2] in structure.legacy_expert_names:
            as_parameters.append(weight.target)
        else:
            modules.append(weight.target)
    names = {module: module for module in modules} | {module: f"{module}.weight" for module in as_parameters}
    keys = {module: module for module in (*modules, *as_parameters)}
    # PEFT wraps a module once for each of its fused parameters. The wrapper of the first parameter is the innermost: of
    # three parameters of `experts` its tensors are named `experts.base_layer.base_layer`.
    owners = [parameter.rpartition(".")[0] for parameter in fused]
    for index, parameter in enumerate(fused):
        names[parameter] = parameter
        keys[parameter] = owners[index] + ".base_layer" * owners[index + 1 :].count(owners[index])
    targets = shortest_target_modules(modules, structure.modules) if modules else []
    # Where PEFT translates the old names of fused experts, not all its versions read a regular expression.
    if structure.legacy_expert_names and isinstance(targets, str):
        raise PlanError(
            "PEFT has no target_modules that select exactly these modules of a model with experts",
            hint="give a --target that selects only modules whose names have the same last part",
        )
    return PeftTargets(targets, sorted(names[target] for target in (*as_parameters, *fused)), keys, names)


def resolve_target_modules(targets: object, modules: Collection[str]) -> set[str]:
    """The modules that PEFT selects with `target_modules`.

    Args:
        targets: A list of names and suffixes, or full names joined by `|`.
        modules: All module names of the model.

    Raises:
        ValueError: `targets` is another regular expression. It is not run, because it comes from a file.
    """
    if isinstance(targets, str):
        return set(plain_names(targets)).intersection(modules)
    return _match_suffixes(map(str, targets), modules) if isinstance(targets, (list, tuple)) else set()


def shortest_target_modules(adapted: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """The shortest `target_modules` with which PEFT selects exactly the adapted modules.

    These are the last parts of the names, such as `q_proj`, if they match no other module; else the full names. If a
    full name is a suffix of another module's name, the result is one regular expression, which PEFT compares with the
    full name.

    Args:
        adapted: The names of the adapted modules.
        modules: All module names of the model.
    """
    wanted = set(adapted)
    last_parts = sorted({module.rpartition(".")[2] for module in adapted})
    for names in (last_parts, sorted(adapted)):
        if _match_suffixes(names, modules) == wanted:
            return names
    return "|".join(re.escape(module) for module in sorted(adapted))
