"""Check on the meta device that PEFT will load the planned adapter, before the solver runs.

If PEFT is installed, it wraps a model without weights and gets an adapter without values: names, shapes and scales are
compared. This matters because PEFT does not report unused keys when it loads a folder: an adapter with wrong names
would train from zero, unnoticed. Without PEFT, or with a PEFT too old for experts, our own implementation of its rules
is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from importlib import metadata
from typing import Any

import torch
from torch import nn

from milora_init.errors import PlanError
from milora_init.lora.config import lora_scale, match_pattern
from milora_init.lora.peft_versions import PEFT_FOR_EXPERTS
from milora_init.lora.targets import resolve_target_modules
from milora_init.lora.tensor_layout import lora_key, stacked_shapes
from milora_init.model import meta_model
from milora_init.plan.plan import Plan

Shapes = Mapping[str, tuple[int, ...]]


def require_loadable(plan: Plan) -> str:
    """See that PEFT takes the planned adapter whole, every tensor into its place and at its scale.

    Returns:
        Who was asked: `PEFT 0.21.2`, or `the rules of PEFT 0.19`.

    Raises:
        PlanError: PEFT would leave a tensor out, miss one, or scale one otherwise.
    """
    options = plan.options
    model = meta_model.build_meta_model(
        plan.source,
        plan.checkpoint.config,
        trust_remote_code=options.trust_remote_code,
        text_only=options.text_only,
    )
    planned = {name: info.shape for name, info in plan.adapter_header.tensors.items()}
    scales = {w.key: w.scale for w in plan.weights}
    version = _peft_version(needs_experts=bool(plan.adapter_config.get("target_parameters")))
    who = f"PEFT {version}" if version else f"the rules of PEFT {PEFT_FOR_EXPERTS}"
    wanted, found = (
        wanted_by_peft(model, plan.adapter_config, planned) if version else wanted_by_rules(model, plan.adapter_config)
    )
    differences = [f"{name} is not in the adapter" for name in wanted.keys() - planned.keys()]
    differences += [f"{name} would not be loaded" for name in planned.keys() - wanted.keys()]
    differences += [
        f"{name} is {list(planned[name])} and should be {list(wanted[name])}"
        for name in planned.keys() & wanted.keys()
        if planned[name] != wanted[name]
    ]
    differences += [
        f"{key} would be scaled by {found[key]}, not {scale}"
        for key, scale in scales.items()
        if key in found and abs(found[key] - scale) > 1e-9 * scale
    ]
    if differences:
        raise PlanError(
            f"by {who} this adapter does not fit the model, in {len(differences)} places: {min(differences)}",
            hint="--exclude that module; and please report it, with config.json",
        )
    return who


def wanted_by_rules(model: nn.Module, config: Mapping[str, Any]) -> tuple[Shapes, Mapping[str, float]]:
    """The tensors that PEFT's rules make of adapter_config.json, by name, and the scale of each pair, by its key."""
    shapes: dict[str, tuple[int, ...]] = {}
    scales: dict[str, float] = {}
    rank_of, alpha_of = match_pattern(config["rank_pattern"]), match_pattern(config["alpha_pattern"])

    def add(key: str, name: str, columns: int, rows: int, experts: int) -> None:
        rank = int(rank_of(name) or config["r"])
        alpha = alpha_of(name) or config["lora_alpha"]
        for factor, shape in zip("AB", stacked_shapes(rank, (rows, columns), experts), strict=True):
            shapes[lora_key(key, factor)] = shape
        scales[key] = lora_scale(rank, alpha, rslora=config["use_rslora"])

    modules = dict(model.named_modules())
    for name in resolve_target_modules(config["target_modules"], [name for name in modules if name]):
        rows, columns = modules[name].weight.shape
        transposed = type(modules[name]).__name__ == "Conv1D"
        add(name, name, *((rows, columns) if transposed else (columns, rows)), 1)
    targets = config.get("target_parameters", [])
    for owner, module in modules.items():
        own = [(f"{owner}.{name}", p) for name, p in module.named_parameters(recurse=False)]
        hits = [(n, p) for n, p in own if any(n == target or n.endswith(f".{target}") for target in targets)]
        for place, (name, parameter) in enumerate(hits):
            key = owner + ".base_layer" * (len(hits) - 1 - place)
            *stack, rows, columns = parameter.shape
            if stack and getattr(module, "is_transposed", False):
                rows, columns = columns, rows
            add(key, name, columns, rows, stack[0] if stack else 1)
    return shapes, scales


def wanted_by_peft(model: nn.Module, config: Mapping[str, Any], planned: Shapes) -> tuple[Shapes, Mapping[str, float]]:
    """The same, asked of PEFT itself; without those of the planned tensors for which it has no use.

    Raises:
        PlanError: PEFT raises an exception of its own.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    values = {key: value for key, value in deepcopy(dict(config)).items() if key != "peft_type"}
    state = {name: torch.empty(shape, device="meta") for name, shape in planned.items()}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(model, LoraConfig(**values))
            own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
            if wanted == planned:
                left = set_peft_model_state_dict(wrapped, state).unexpected_keys
                wanted = {name: shape for name, shape in wanted.items() if name not in left}
        except Exception as error:  # PEFT refuses by whatever exception its layers happen to raise
            raise PlanError(
                f"PEFT {metadata.version('peft')} refuses this adapter: {' '.join(str(error).split())[:300]}",
                hint="upgrade peft and transformers together; if that does not help, --exclude what it names",
            ) from error
    scales = {
        name.removeprefix("base_model.model."): float(module.scaling["default"])
        for name, module in wrapped.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "lora_A")
    }
    return wanted, scales


def _peft_version(*, needs_experts: bool) -> str:
    """The PEFT that is installed and can be asked, empty where there is none."""
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        return ""
    return "" if needs_experts and _numbers(version) < _numbers(PEFT_FOR_EXPERTS) else version


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]
