"""adaptable: a router is never adapted, whatever its name and position; other gates are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.marks import mostly_wide
from sweep_architectures import LAYERS, model_class, write_checkpoint
from torch import nn

from milora_init.checkpoint.folder import open_checkpoint
from milora_init.errors import PlanError
from milora_init.lora.targets import select
from milora_init.model import meta_model
from milora_init.model.adaptable import ModelStructure, read_structure
from milora_init.options import DEFAULT_TARGET

# Suffixes of the names of routers, or of linear layers in them.
ROUTERS = {
    "afmoe": ("mlp.router.gate",),
    "doge": ("mlp.router_gate",),
    "gemma4_text": ("1.router.proj",),
    "hunyuan_v1_moe": ("mlp.gate.wg",),
    "jetmoe": ("mlp.router.layer", "self_attention.experts.router.layer"),
    "longcat_flash": ("0.mlp.router.classifier", "1.mlp.router.classifier"),
    "nllb-moe": ("encoder.layers.3.ffn.router.classifier", "decoder.layers.3.ffn.router.classifier"),
    "qwen2_moe": ("mlp.shared_expert_gate",),
    "qwen4_exp": ("mlp.shared_expert_gate",),  # its shared_expert.gate_proj has as many outputs as there are experts
    "switch_transformers": ("layer.1.mlp.router.classifier", "layer.2.mlp.router.classifier"),
    "zaya": ("gate.down_proj", "gate.router_mlp.fc1", "gate.router_mlp.fc2", "gate.router_mlp.out_proj"),
}  # fmt: skip


def with_experts(config: Any) -> None:
    """Set what a default config lacks: experts in every layer, and values without which the model cannot be built."""
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    for part in parts:
        held = vars(part)
        if "enable_moe_block" in held:
            part.enable_moe_block, part.num_experts, part.top_k_experts, part.moe_intermediate_size = True, 8, 2, 64
        for key, value in {"first_k_dense_replace": 0, "is_moe": True}.items():
            if key in held:
                setattr(part, key, value)
        if isinstance(held.get("mlp_layer_types"), list):
            part.mlp_layer_types = ["sparse"] * len(part.mlp_layer_types)


SPECIAL: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "nllb-moe": {"encoder_layers": 4, "decoder_layers": 4},
}


def structure_of(model_type: str, folder: Path, layers: int | None = LAYERS) -> ModelStructure:
    def change(config: Any) -> None:
        with_experts(config)
        for key, value in SPECIAL.get(model_type, {}).items():
            setattr(config, key, value)

    write_checkpoint(model_type, folder, layers, change=change)
    opened = open_checkpoint(folder)
    return read_structure(folder, opened.config, {name: info.shape for name, info in opened.tensors.items()})


# All layers of a gemma4_text with its own sizes take six seconds, and an nllb-moe takes three.
@pytest.mark.parametrize(
    "model_type", mostly_wide(ROUTERS, "jetmoe", "longcat_flash", "qwen2_moe", "switch_transformers")
)
def test_a_router_is_left_out_and_refused_by_name(model_type: str, tmp_path: Path) -> None:
    structure = structure_of(model_type, tmp_path, None if model_type == "gemma4_text" else LAYERS)
    chosen = {weight.module for weight in select(structure, ["all-linear"])}
    for end in ROUTERS[model_type]:
        found = [name for name in structure.modules if name.endswith(f".{end}")]
        assert found
        assert not chosen & set(found)
        for name in found:
            with pytest.raises(PlanError, match=r"router|never called"):
                select(structure, [name])
    gates = {name for name in structure.modules if name.endswith("gate_proj") and ".experts." not in name}
    assert gates <= chosen


def attempt(model_type: str, folder: Path, layers: int | None) -> ModelStructure | None:
    """The structure of this type; None if it has no experts or cannot be built from its default config."""
    config = transformers.CONFIG_MAPPING[model_type]
    try:
        known = "expert" in str(config()) and model_class(config) is not None
        return structure_of(model_type, folder, layers) if known else None
    except Exception:
        return None


def test_a_gate_that_is_no_router_stays_adaptable_even_with_one_output_per_expert(tmp_path: Path) -> None:
    """Gemma 4 has a per_layer_input_gate in the same layer as the experts."""
    config: Any = transformers.Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, enable_moe_block=True, num_experts=8, top_k_experts=2,
        moe_intermediate_size=24, layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, per_layer_config={}, num_kv_shared_layers=0,
    )  # fmt: skip
    model: Any = transformers.Gemma4ForCausalLM
    model(config).save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    structure = read_structure(tmp_path, opened.config, {name: info.shape for name, info in opened.tensors.items()})
    assert "model.layers.0.per_layer_input_gate" in structure.adaptable
    assert "model.layers.0.router.proj" in structure.refused


@pytest.mark.slow
def test_no_router_of_any_transformers_model_type_is_adapted(tmp_path: Path) -> None:
    swept = 0
    for number, model_type in enumerate(sorted(transformers.CONFIG_MAPPING)):
        (folder := tmp_path / str(number)).mkdir()
        structure = next(filter(None, (attempt(model_type, folder, layers) for layers in (LAYERS, None))), None)
        if structure is None:
            continue
        if not structure.experts and not any("experts" in name for name in structure.modules):
            continue
        swept += 1
        text = (folder / "config.json").read_text()
        counts = {"1", *re.findall(r'"(?:moe_)?n(?:um)?_(?:local_|routed_)?experts": (\d+)', text)}
        for weight in select(structure, ["all-linear"]):
            assert "router" not in weight.module.lower()
            gate = "gate" in (words := weight.module.rpartition(".")[2].split("_")) and "proj" not in words
            assert not (gate and str(weight.shape[0]) in counts), weight.module
        defaults = DEFAULT_TARGET
        assert not any("router" in name for name in structure.adaptable if name.rpartition(".")[2] in defaults)
    assert swept > 50


HIDDEN, COUNT = 16, 4


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(COUNT, HIDDEN, HIDDEN))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, breaks: bool) -> torch.Tensor:
        if breaks:
            chosen.nonzero().tolist()
        mixed: torch.Tensor = torch.einsum("bsh,eoh->bso", x, self.weight)
        return mixed


class UnnamedRouter(nn.Module):
    """A router that neither its name nor its position identifies."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, COUNT, bias=False)
        self.inner = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.linear(self.inner(x).float(), self.proj.weight.float())
        chosen: torch.Tensor = torch.topk(scores.flatten(0, 1).softmax(-1), 2, dim=-1)[1]
        return chosen


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decider, self.experts = UnnamedRouter(), Experts()
        self.narrow, self.wide = nn.Linear(HIDDEN, COUNT), nn.Linear(COUNT, HIDDEN)

    def forward(self, x: torch.Tensor, breaks: bool) -> torch.Tensor:
        x = x + self.wide(self.narrow(x))
        mixed: torch.Tensor = self.experts(x, self.decider(x), breaks)
        return x + mixed


class Model(nn.Module):
    def __init__(self, *, breaks: bool) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.embedding = nn.Embedding(8, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self._breaks = breaks

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, self._breaks)
        return x


@pytest.mark.parametrize("breaks", [False, True])
def test_a_router_is_found_by_the_use_of_its_outputs(breaks: bool) -> None:
    """Neither a layer before it nor one with as many outputs; in every layer, even if the first forward pass raises."""
    with torch.device("meta"):
        model = Model(breaks=breaks)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    assert meta_model.routing_modules(model) == {"layers.0.decider.proj", "layers.1.decider.proj"}
