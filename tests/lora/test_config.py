"""config: target_modules and keys as PEFT reads them, and an adapter_config.json that every PEFT since 0.13 reads."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from support import tiny_models
from torch import nn

from milora_init.errors import PlanError
from milora_init.lora.config import lora_scale, make_adapter_config, stacked_alpha
from milora_init.lora.folder import LORA_CONFIG, LORA_WEIGHTS
from milora_init.lora.targets import PeftTargets, shortest_target_modules
from milora_init.lora.tensor_layout import adapter_header, lora_key
from milora_init.model.adaptable import Adaptable

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"

# The keys that both PEFT 0.13 and the installed PEFT accept.
SAFE_KEYS = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias", "target_modules",
    "init_lora_weights", "inference_mode", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern",
}  # fmt: skip


class Nested(nn.Module):
    """A model in which the full name of one layer is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.dotted = nn.ModuleDict({"inner": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})})
        self.inner = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def adapted_by_peft(model: nn.Module, targets: list[str] | str) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    return {n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


@pytest.mark.parametrize(
    ("build", "adapted", "expected"),
    [
        pytest.param(lambda: tiny_models.on_meta("llama"), [Q0, Q1], ["q_proj"], id="a suffix"),
        pytest.param(lambda: tiny_models.on_meta("llama"), [Q1], [Q1], id="a suffix that matches too much"),
        pytest.param(
            lambda: tiny_models.on_meta("bert"),
            ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"],
            ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"],
            id="a suffix that other layers share",
        ),
        pytest.param(Nested, ["q_proj"], r"q_proj", id="a full name that is the end of another"),
        pytest.param(Nested, ["q_proj", "inner.q_proj"], r"inner\.q_proj|q_proj", id="two such names"),
        pytest.param(Nested, ["dotted.inner.k_proj"], ["k_proj"], id="a suffix that only one layer has"),
    ],
)
def test_target_modules_is_the_shortest_that_peft_reads_as_the_adapted_set(
    build: Callable[[], nn.Module], adapted: Sequence[str], expected: list[str] | str
) -> None:
    found = shortest_target_modules(adapted, names(build()))
    assert found == expected
    assert adapted_by_peft(build(), found) == set(adapted)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_peft_adapts_exactly_any_given_set_of_layers(kind: str) -> None:
    """All linears, every second one, the first one, the last three."""
    model: Any = tiny_models.on_meta(kind)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    linears += [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    for adapted in (linears, linears[::2], linears[1::2], linears[:1], linears[-3:]):
        targets = shortest_target_modules(adapted, names(model))
        assert adapted_by_peft(tiny_models.on_meta(kind), targets) == set(adapted)


def test_the_keys_and_shapes_are_those_that_peft_saves() -> None:
    model = get_peft_model(tiny_models.on_meta("llama"), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    saved = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    planned = adapter_header(
        (name, 3, Adaptable(name, f"{name}.weight", (module.out_features, module.in_features), transposed=False))
        for name, module in tiny_models.on_meta("llama").named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "down_proj"))
    )
    assert {name: info.shape for name, info in planned.tensors.items()} == saved
    assert {info.dtype for info in planned.tensors.values()} == {"F32"}
    assert planned.metadata == {"format": "pt"}
    assert lora_key(Q0, "A") in saved


def config(**values: Any) -> dict[str, Any]:
    given = {"base": "./out", "rank": 8, "alpha": 16, "rslora": False, "dropout": 0.05, "task_type": "CAUSAL_LM"}
    targets = PeftTargets(values.pop("targets", ["q_proj"]), values.pop("parameters", []), {}, {})
    own: dict[str, Any] = {"ranks": {}, "alphas": {}}
    return make_adapter_config(**{**given, **own, "targets": targets, "fan_in_fan_out": False, **values})


def test_the_config_holds_only_keys_that_every_peft_knows() -> None:
    assert config().keys() == SAFE_KEYS


@pytest.mark.parametrize(
    "values",
    [{}, {"rslora": True}, {"fan_in_fan_out": True}, {"task_type": None}, {"targets": "q_proj|k_proj"}, {"alpha": 3}],
)
def test_peft_reads_back_what_the_config_says(values: dict[str, Any], tmp_path: Path) -> None:
    written = config(**values)
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, LoraConfig)
    for key, value in written.items():
        found = getattr(read, key)
        assert (sorted(found) if isinstance(found, set) else found) == value, key
    assert read.init_lora_weights is True  # "pissa" would make PEFT run another SVD and change the base


def test_the_adapter_paths_are_those_of_the_reference_implementation() -> None:
    assert (LORA_CONFIG, LORA_WEIGHTS) == ("lora/adapter_config.json", "lora/adapter_model.safetensors")


@pytest.mark.parametrize(("rank", "alpha"), [(8, 16), (64, 16), (3, 7)])
def test_the_scale_follows_the_peft_formula(rank: int, alpha: int) -> None:
    assert lora_scale(rank, alpha, rslora=False) == alpha / rank
    assert lora_scale(rank, alpha, rslora=True) == alpha / math.sqrt(rank)


@pytest.mark.parametrize("rslora", [False, True])
def test_stacked_matrices_keep_the_scale_that_each_has_by_itself(rslora: bool) -> None:
    stacked = lora_scale(2 * 8, stacked_alpha(16, 2, rslora=rslora), rslora=rslora)
    assert stacked == pytest.approx(lora_scale(8, 16, rslora=rslora), rel=4e-16)


def test_target_parameters_set_the_dropout_to_zero() -> None:
    written = config(parameters=["model.layers.0.mlp.experts.down_proj"])
    assert written["target_parameters"] == ["model.layers.0.mlp.experts.down_proj"]
    assert (written["lora_dropout"], written["fan_in_fan_out"]) == (0.0, False)


def test_patterns_use_full_names_and_list_only_modules_that_differ() -> None:
    ranks, alphas = {Q0: 8, Q1: 4, "model.layers.0.mlp.up_proj": 8}, {Q0: 16, Q1: 16, "model.layers.0.mlp.up_proj": 2}
    written = config(ranks=ranks, alphas=alphas)
    assert written["rank_pattern"] == {Q1: 4, "model.layers.0.mlp.up_proj": 8}
    assert written["alpha_pattern"] == {Q1: 16, "model.layers.0.mlp.up_proj": 2}


def test_a_pattern_that_peft_would_also_apply_to_another_module_is_refused() -> None:
    with pytest.raises(PlanError, match=r"PEFT would give dotted\.inner\.q_proj the rank and alpha of another"):
        config(
            ranks={"inner.q_proj": 4, "dotted.inner.q_proj": 8}, alphas={"inner.q_proj": 4, "dotted.inner.q_proj": 16}
        )
