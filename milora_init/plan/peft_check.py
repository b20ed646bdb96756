"""Check that PEFT will load the planned adapter completely, before the solver runs.

PEFT does not report unused keys when it loads an adapter from a folder. An adapter with wrong names would train from
zero without any warning. So the names, shapes and scales that PEFT expects are compared with the plan.

If PEFT is installed, it adapts a copy of the model on the meta device, and loads an adapter without values. If PEFT is
not installed, or is too old for experts, our own implementation of its rules is used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import metadata
from typing import Any

import torch
from torch import nn

from milora_init.errors import PlanError
from milora_init.lora.config import lora_scale, match_pattern
from milora_init.lora.peft_versions import PEFT_FOR_EXPERTS, TESTED_WITH_MICA
from milora_init.lora.targets import resolve_target_modules
from milora_init.lora.tensor_layout import lora_key, stacked_shapes
from milora_init.methods import Method
from milora_init.model import meta_model
from milora_init.plan.plan import Plan

Shapes = Mapping[str, tuple[int, ...]]


def require_loadable(plan: Plan) -> str:
    """Check that PEFT loads every tensor of the planned adapter, in its shape and with its scale.

    Returns:
        What the plan was compared with: `PEFT 0.21.2`, or `the rules of PEFT 0.19`.

    Raises:
        PlanError: PEFT would ignore a tensor, miss one, expect another shape, or apply another scale.
    """
    _require_peft_knows(plan.options.effective_method, plan.adapter_config)
    options = plan.options
    model = meta_model.build_meta_model(
        plan.source,
        plan.checkpoint.config,
        trust_remote_code=options.trust_remote_code,
        text_only=options.text_only,
    )
    planned = {name: info.shape for name, info in plan.adapter_header.tensors.items()}
    version = _usable_peft_version(needs_experts=bool(plan.adapter_config.get("target_parameters")))
    if version:
        reference = f"PEFT {version}"
        expected, scales = expected_by_peft(model, plan.adapter_config, planned)
    else:
        reference = f"the rules of PEFT {PEFT_FOR_EXPERTS}"
        expected, scales = expected_by_rules(model, plan.adapter_config)
    differences = [
        *_shape_differences(planned, expected),
        *(
            f"{key} would be scaled by {scales[key]}, not {scale}"
            for key, scale in {w.key: w.scale for w in plan.weights}.items()
            if key in scales and abs(scales[key] - scale) > 1e-9 * scale
        ),
    ]
    if differences:
        raise PlanError(
            f"according to {reference}, this adapter does not fit the model; {len(differences)} differences, such as: "
            f"{min(differences)}",
            hint="--exclude that module, and please report this with the model's config.json",
        )
    return reference


def _require_peft_knows(method: Method, config: Mapping[str, Any]) -> None:
    """Raise PlanError if the installed PEFT cannot train an adapter of this method."""
    if method.init_lora_weights is True:
        return
    if config.get("target_parameters"):
        raise PlanError(
            f"method {method.name} freezes B, which PEFT does not do for experts", hint="use rlmo, or --exclude experts"
        )
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        return
    with _quiet_import():
        from peft.tuners.lora import variants

    if not hasattr(variants, "MiCALinearVariant"):
        raise PlanError(
            f"PEFT {version} does not know init_lora_weights={method.init_lora_weights!r}, which method {method.name} "
            f"needs; tested with PEFT {TESTED_WITH_MICA}",
            hint="upgrade peft",
        )


def _shape_differences(planned: Shapes, expected: Shapes) -> list[str]:
    """Describe each tensor that only one side has, or that has another shape."""
    differences = [f"{name} is not in the adapter" for name in expected.keys() - planned.keys()]
    differences += [f"{name} would not be loaded" for name in planned.keys() - expected.keys()]
    differences += [
        f"{name} is {list(planned[name])} and should be {list(expected[name])}"
        for name in planned.keys() & expected.keys()
        if planned[name] != expected[name]
    ]
    return differences


def expected_by_rules(model: nn.Module, config: Mapping[str, Any]) -> tuple[Shapes, Mapping[str, float]]:
    """Apply PEFT's rules to a model without PEFT.

    Args:
        model: The model on the meta device.
        config: Content of adapter_config.json.

    Returns:
        The shape of each tensor that PEFT would expect, by its name in the adapter's file; and the scale of each pair
        of factors, by its key (see `lora_key`).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    scales: dict[str, float] = {}
    rank_of, alpha_of = match_pattern(config["rank_pattern"]), match_pattern(config["alpha_pattern"])

    def add(key: str, name: str, out_in: tuple[int, int], experts: int) -> None:
        rank = int(rank_of(name) or config["r"])
        alpha = alpha_of(name) or config["lora_alpha"]
        for factor, shape in zip("AB", stacked_shapes(rank, out_in, experts), strict=True):
            shapes[lora_key(key, factor)] = shape
        scales[key] = lora_scale(rank, alpha, rslora=config["use_rslora"])

    modules = dict(model.named_modules())
    for name in resolve_target_modules(config["target_modules"], [name for name in modules if name]):
        rows, columns = modules[name].weight.shape
        transposed = type(modules[name]).__name__ == "Conv1D"
        add(name, name, (columns, rows) if transposed else (rows, columns), 1)
    targets = config.get("target_parameters", [])
    for owner, module in modules.items():
        parameters = [(f"{owner}.{name}", p) for name, p in module.named_parameters(recurse=False)]
        adapted = [(n, p) for n, p in parameters if any(n == target or n.endswith(f".{target}") for target in targets)]
        for position, (name, parameter) in enumerate(adapted):
            # PEFT wraps the module once for each parameter; the first parameter's wrapper is the innermost one.
            key = owner + ".base_layer" * (len(adapted) - 1 - position)
            *experts, rows, columns = parameter.shape
            transposed = bool(experts) and getattr(module, "is_transposed", False)
            add(key, name, (columns, rows) if transposed else (rows, columns), experts[0] if experts else 1)
    return shapes, scales


def expected_by_peft(
    model: nn.Module, config: Mapping[str, Any], planned: Shapes
) -> tuple[Shapes, Mapping[str, float]]:
    """Let PEFT adapt a model and load the planned adapter without values. PEFT changes the model.

    Args:
        model: The model on the meta device.
        config: Content of adapter_config.json.
        planned: The shape of each planned tensor, by its name in the adapter's file.

    Returns:
        The same as `expected_by_rules`, without the planned tensors that PEFT reports as unexpected.

    Raises:
        PlanError: PEFT raises an exception.
    """
    with _quiet_import():
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    arguments = {key: value for key, value in deepcopy(dict(config)).items() if key != "peft_type"}
    arguments["init_lora_weights"] = True  # "mica" would run an SVD; names, shapes and scales are the same
    state = {name: torch.empty(shape, device="meta") for name, shape in planned.items()}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            peft_model = get_peft_model(model, LoraConfig(**arguments))
            tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
            expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            if expected == planned:
                unexpected = set_peft_model_state_dict(peft_model, state).unexpected_keys
                expected = {name: shape for name, shape in expected.items() if name not in unexpected}
        except Exception as error:  # PEFT has no common exception class, and its layers may raise any
            raise PlanError(
                f"PEFT {metadata.version('peft')} refuses this adapter: {' '.join(str(error).split())[:300]}",
                hint="upgrade peft and transformers together; if that does not help, --exclude what it names",
            ) from error
    scales = {
        name.removeprefix("base_model.model."): float(module.scaling["default"])
        for name, module in peft_model.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "lora_A")
    }
    return expected, scales


@contextmanager
def _quiet_import() -> Iterator[None]:
    """PEFT imports bitsandbytes where it is installed, which warns about kernels that are not needed here."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _usable_peft_version(*, needs_experts: bool) -> str:
    """Return the version of the installed PEFT; empty if PEFT is missing, or too old for experts that are needed."""
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        return ""
    return "" if needs_experts and _version_numbers(version) < _version_numbers(PEFT_FOR_EXPERTS) else version


def _version_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]
