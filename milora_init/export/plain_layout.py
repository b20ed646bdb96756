"""The modules of a plain adapter, and their names and ranks in the form that PEFT or a server reads.

PEFT reads the experts of a layer as one fused parameter with stacked factors. vLLM and SGLang read a pair of factors
for each projection of each expert, under the names that the weights have on disk (`experts.3.w1` of Mixtral, where
transformers 5 and PEFT say `experts.gate_up_proj`), and want all three projections: one that was not adapted gets
factors of zero. Models whose experts are stored fused (gpt-oss) keep PEFT's form. Found with vLLM 0.32 on a CPU, see
scripts/check_vllm.sh; SGLang was not run, its rules are from its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from milora_init.errors import PlanError
from milora_init.lora.folder import LoraFactors
from milora_init.manifest import WeightRecord
from milora_init.serving import Form

# The projections of an expert on disk, as gate, up and down.
_EXPERT_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED_PROJECTIONS = ("gate_up_proj", "down_proj")
MERGE_INSTEAD = "serve the merged model: milora-init merge PAIR --adapter TRAINED --out MERGED"


@dataclass(frozen=True, slots=True)
class PlainModule:
    """One pair of factors in the plain adapter's file.

    Attributes:
        key: The argument of `lora_key`.
        name: The name that is looked up in rank_pattern and alpha_pattern, and shown to the user.
        source: The module of the trained adapter, by its key; None for factors of zero.
        shape: (m, n) of the update, of one expert if several are stacked.
        rank: Directions that are kept, of each expert.
        width: The rank in the file, `rank` or more: the rest is zeros.
        experts: How many experts are stacked in the file; 1 for a module.
        expert: The one expert of the source that this is; None for all of them.
        first_row: The first row of the source's update. gate and up of an expert are stacked in one update.
    """

    key: str
    name: str
    source: str | None
    shape: tuple[int, int]
    rank: int
    width: int
    experts: int = 1
    expert: int | None = None
    first_row: int = 0

    @property
    def group(self) -> tuple[str, int] | str:
        """Modules of one group get the same rank: the experts of a projection."""
        return self.key if self.source is None or self.expert is None else (self.source, self.first_row)


def plain_modules(
    adapter: Mapping[str, LoraFactors], records: Sequence[WeightRecord], form: Form, times: int
) -> list[PlainModule]:
    """The modules of the plain adapter at their full rank, in the trained adapter's order.

    Args:
        adapter: The factors of the trained adapter.
        records: The weights that were split; they name the experts on disk.
        form: What reads the plain adapter.
        times: The full rank is so many times the trained one.

    Raises:
        PlanError: Experts that are stored in a way whose form the server's reader is not known for.
    """
    experts: dict[str, list[WeightRecord]] = {}
    for record in records:
        if record.expert:
            experts.setdefault(record.key, []).append(record)
    found: list[PlainModule] = []
    for key, factors in adapter.items():
        rank = times * factors.rank
        stacked = PlainModule(key, factors.name, key, factors.shape, rank, rank, experts=factors.experts)
        if form == "peft" or key not in experts or experts[key][0].row is not None:
            found.append(stacked)
        else:
            found += [_expert_module(record, stacked) for record in experts[key]]
    if form == "peft":
        return found
    return found + _missing_projections(found, [group for key, group in experts.items() if key in adapter], form)


def _expert_module(record: WeightRecord, stacked: PlainModule) -> PlainModule:
    """The module of one projection of one expert."""
    assert record.expert is not None
    first = record.expert.part * record.shape[0]
    return replace(
        stacked, key=record.module, name=record.module, shape=record.shape, experts=1, expert=record.expert.index,
        first_row=first,
    )  # fmt: skip


def _missing_projections(
    modules: Iterable[PlainModule], experts: Iterable[Sequence[WeightRecord]], form: Form
) -> list[PlainModule]:
    """Factors of zero for the projections that were not adapted. Raises PlanError for experts of unknown names."""
    present = {module.name for module in modules}
    found: dict[str, PlainModule] = {}
    for group in experts:
        for record in group:
            assert record.expert is not None
            if record.row is not None:
                if name := _other_fused(record.expert.parameter):
                    if name in present:
                        continue
                    raise PlanError(
                        f"only {record.expert.parameter} was adapted, and {form} reads fused experts only together "
                        f"with {name}",
                        hint=MERGE_INSTEAD,
                    )
                raise _unknown_experts(record.expert.parameter, form)
            prefix, _, last = record.module.rpartition(".")
            projections = next((names for names in _EXPERT_PROJECTIONS if last in names), None)
            if projections is None:
                raise _unknown_experts(record.module, form)
            gate_shape = record.shape if last != projections[2] else (record.shape[1], record.shape[0])
            for projection in projections:
                name = f"{prefix}.{projection}"
                if name not in present:
                    shape = gate_shape if projection != projections[2] else (gate_shape[1], gate_shape[0])
                    found[name] = PlainModule(name, name, None, shape, 1, 1)
    return list(found.values())


def _other_fused(parameter: str) -> str:
    """The name of the other fused parameter of the same experts; empty if the names are not the usual ones."""
    prefix, _, last = parameter.rpartition(".")
    if last not in _FUSED_PROJECTIONS:
        return ""
    return f"{prefix}.{_FUSED_PROJECTIONS[1 - _FUSED_PROJECTIONS.index(last)]}"


def _unknown_experts(name: str, form: Form) -> PlanError:
    return PlanError(f"{name}: it is not known which names {form} reads for the experts of this model",
                     hint=MERGE_INSTEAD)  # fmt: skip


def cut(modules: Sequence[PlainModule], ranks: Mapping[str, int]) -> list[PlainModule]:
    """The modules with these ranks, by key; all modules of a group get the highest of the group."""
    highest: dict[tuple[str, int] | str, int] = {}
    for module in modules:
        highest[module.group] = max(highest.get(module.group, 0), ranks.get(module.key, module.rank))
    return [replace(m, rank=highest[m.group], width=highest[m.group]) for m in modules]


def padded(modules: Sequence[PlainModule]) -> list[PlainModule]:
    """The modules with one rank in the file, for a server that reads one rank for the whole adapter."""
    highest = max(module.rank for module in modules)
    return [replace(module, width=highest) for module in modules]
