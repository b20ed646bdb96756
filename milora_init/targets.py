"""Which weights a request names: targets and exclusions, with PEFT's meaning, against what can be adapted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from milora_init.errors import PlanError
from milora_init.naming import EXPERTS, Adaptable, Naming

ALL_LINEAR = "all-linear"
REGEX = "re:"


def select(naming: Naming, targets: Sequence[str], exclude: Sequence[str] = ()) -> list[Adaptable]:
    """The adaptable weights that `targets` names and `exclude` does not, in the model's order.

    PEFT's meaning: a target is a module's full name or its end after a dot, or `all-linear`; `re:PATTERN` matches a
    full name from end to end. What most people do not mean has to be named: experts by a target with `experts` in it
    (`experts`, `experts.down_proj`), a vision or audio tower by one with the tower's name in it.

    Raises:
        PlanError: A target or an exclusion that names nothing, or only what cannot be adapted.
    """
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            hits = {name for name in naming.adaptable.keys() - naming.heads if not _tower(naming, name)}
            if not hits:
                raise PlanError(f"{naming.architecture} has no linear layer that can be adapted")
            chosen |= hits
            continue
        matches = matcher([target])
        hits = {name for name in naming.adaptable if matches(name) and _tower(naming, name) in target}
        hits |= set(filter(names_fused(target), naming.experts))
        if not hits:
            raise _no_hit(naming, target, matches)
        chosen |= hits
    for target in exclude:
        matches = matcher([target])
        hits = {name for name in naming.modules if matches(name)}
        hits |= set(filter(names_fused(target), naming.experts))
        if not hits:
            hint = f"modules: {', '.join(suffixes(naming))}"
            raise PlanError(f"exclude {target!r} matches no module of {naming.architecture}", hint=hint)
        chosen -= hits
    if not chosen:
        raise PlanError("every target is excluded", hint="drop an --exclude")
    linears = [weight for name, weight in naming.adaptable.items() if name in chosen]
    return linears + [weight for name, group in naming.experts.items() if name in chosen for weight in group]


def names_fused(target: str) -> Callable[[str], bool]:
    """Whether a target names a fused parameter of experts, by its own name or its owner's."""
    matches = matcher([target])
    return lambda parameter: EXPERTS in target and (matches(parameter) or matches(parameter.rpartition(".")[0]))


def _no_hit(naming: Naming, target: str, matches: Callable[[str], bool]) -> PlanError:
    reason, fused = "", names_fused(target)
    hint = f"modules that can be adapted: {', '.join(suffixes(naming))}"
    if refused := next((name for name in naming.refused if matches(name) or fused(name)), None):
        reason = f" that can be adapted: {refused} is {naming.refused[refused]}"
    elif tower := next((_tower(naming, name) for name in naming.adaptable if matches(name)), ""):
        reason, hint = f" outside {tower}, which has to be named", f"--target 're:.*\\.{tower}\\..*{target}'"
    elif any(matches(name) for name in naming.experts):
        reason = ", only experts, which have to be named"
    elif module := next(filter(matches, naming.modules), None):
        reason = f" that can be adapted: {module} is no linear layer"
    if "," in target and not target.startswith(REGEX):
        hint = f"give each its own option: {' '.join(f'--target {part.strip()}' for part in target.split(','))}"
    return PlanError(
        f"target {target!r} matches no module of {naming.architecture}{reason}",
        hint=hint,
    )


def _tower(naming: Naming, module: str) -> str:
    """The last part of the name of the tower that a module stands in, empty outside of all."""
    return next((tower.rpartition(".")[2] for tower in naming.towers if module.startswith(f"{tower}.")), "")


def matcher(targets: Iterable[str]) -> Callable[[str], bool]:
    """PEFT's test of a module name against a list of targets, with `re:PATTERN` beside it."""
    names = {target for target in targets if not target.startswith(REGEX)}
    patterns = []
    for target in targets:
        if target.startswith(REGEX):
            try:
                patterns.append(re.compile(target.removeprefix(REGEX)))
            except re.error as error:
                hint = "write it as Python's re does, in quotes: --target 're:.*\\.(q|v)_proj'"
                raise PlanError(f"target {target!r} is not a regular expression: {error}", hint=hint) from None

    def matches(module: str) -> bool:
        return (
            module in names
            or any(module.endswith(f".{name}") for name in names)
            or any(pattern.fullmatch(module) for pattern in patterns)
        )

    return matches


def suffixes(naming: Naming) -> list[str]:
    """Last parts of the adaptable names, in the model's order: what a person would pass as targets."""
    linears = (name.rpartition(".")[2] for name in naming.adaptable if not _tower(naming, name))
    fused = (group[0].suffix for group in naming.experts.values())
    return list(dict.fromkeys([*linears, *fused]))
