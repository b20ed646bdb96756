"""meta_model: tensors map to parameters as in `from_pretrained`; modules that must not be adapted are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import architectures
from support.families import FAMILIES, UNLIKE
from support.marks import mostly_wide
from support.tiny_models import edit_json, tensors
from torch import nn

from milora_init.checkpoint.folder import open_checkpoint
from milora_init.errors import CheckpointError, PlanError
from milora_init.lora.targets import select
from milora_init.model import meta_model
from milora_init.model.adaptable import ModelStructure, read_structure

Built = Callable[..., Path]


def structure_of(folder: Path, **options: Any) -> ModelStructure:
    opened = open_checkpoint(folder)
    return read_structure(folder, opened.config, {name: info.shape for name, info in opened.tensors.items()}, **options)


def saved(cls: str, folder: Path, **sizes: Any) -> Path:
    """A tiny checkpoint of a class that has no row in `families`."""
    config = getattr(transformers, cls.partition("For")[0].removesuffix("Model") + "Config")(**sizes)
    getattr(transformers, cls)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", mostly_wide(FAMILIES, *UNLIKE))
def test_from_pretrained_maps_every_tensor_as_parameter_sources_does(name: str, tmp_path: Path) -> None:
    """`from_pretrained` on meta tensors reports unexpected and missing keys."""
    family = FAMILIES[name]
    opened = open_checkpoint(architectures.save(tmp_path, family, "float32"))
    model = meta_model.build_meta_model(tmp_path, opened.config)
    sources = meta_model.parameter_sources(model, opened.tensors)
    given = {name: torch.empty(info.shape, device="meta") for name, info in opened.tensors.items()}
    loaded, info = getattr(transformers, family.architecture).from_pretrained(
        None, config=architectures.config_of(family), state_dict=given, device_map={"": "meta"},
        output_loading_info=True, dtype=torch.float32,
    )  # fmt: skip
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert {tensor for source in sources.values() for tensor in source.tensors} == given.keys()
    parameters = dict(loaded.named_parameters(remove_duplicate=False)) | dict(loaded.named_buffers())
    for name, source in sources.items():
        if source.operations:
            assert parameters[name].numel() == sum(given[tensor].numel() for tensor in source.tensors)
        else:
            (tensor,) = source.tensors
            assert parameters[name].shape == given[tensor].shape


def test_a_linear_whose_weight_its_parent_reads_is_refused(tmp_path: Path) -> None:
    """Jamba never calls the module dt_proj, so an adapter on it would have no effect."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    }
    structure = structure_of(
        saved("JambaForCausalLM", tmp_path, **sizes, **heads, attn_layer_period=2, attn_layer_offset=1)
    )
    reasons = {name: reason for name, reason in structure.refused.items() if name.endswith("dt_proj")}
    assert reasons
    assert all("never called" in reason for reason in reasons.values())
    assert not any(weight.module.endswith("dt_proj") for weight in select(structure, ["all-linear"]))
    with pytest.raises(PlanError, match="dt_proj is never called: its parent, a JambaMambaMixer"):
        select(structure, ["dt_proj"])


def test_the_out_proj_of_a_mamba_is_refused(tmp_path: Path) -> None:
    structure = structure_of(
        saved("MambaForCausalLM", tmp_path, vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    )
    assert any(weight.module.endswith("in_proj") for weight in select(structure, ["all-linear"]))
    with pytest.raises(PlanError, match="out_proj is the out_proj of a Mamba mixer"):
        select(structure, ["out_proj"])


class Attention(nn.Module):
    """A torch attention, a linear that is never called, and one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused, self.used = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(self.attention(x, x, x)[0])
        return out + x @ self.unused.weight


class Model(nn.Module):
    def __init__(self, *, breaks: bool) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.embedding = nn.Embedding(8, 8)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.other = Attention()
        self._breaks = breaks

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        if self._breaks:
            raise RuntimeError("needs an image")
        return x


@pytest.mark.parametrize("breaks", [False, True])
def test_only_children_of_modules_that_ran_are_reported_as_uncalled(breaks: bool) -> None:
    with torch.device("meta"):
        model = Model(breaks=breaks)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    missed = meta_model.uncalled_modules(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert missed & linears == {f"layers.{n}.{name}" for n in (0, 1) for name in ("unused", "attention.out_proj")}


@pytest.mark.parametrize("name", mostly_wide(FAMILIES, *UNLIKE))
def test_no_linear_of_a_common_architecture_is_reported_as_uncalled(name: str, tmp_path: Path) -> None:
    opened = open_checkpoint(architectures.save(tmp_path, FAMILIES[name], "bfloat16"))
    model = meta_model.build_meta_model(tmp_path, opened.config)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert not meta_model.uncalled_modules(model) & linears


EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
EXPERTS_DAMAGED: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "an expert is missing": lambda t: t.pop(EXPERT.format(2)),
    "an expert has another number": lambda t: t.update({EXPERT.format(7): t.pop(EXPERT.format(2))}),
}


@pytest.mark.parametrize("what", EXPERTS_DAMAGED)
def test_an_incomplete_set_of_experts_is_not_adapted(what: str, tmp_path: Path) -> None:
    source = architectures.save(tmp_path / "source", FAMILIES["mixtral"], "float32")
    content = tensors(source)
    EXPERTS_DAMAGED[what](content)
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    structure = structure_of(folder)
    parameter = "model.layers.0.mlp.experts.down_proj"
    assert parameter not in structure.experts
    assert "does not have all of its 4 experts" in structure.refused[parameter]
    assert "model.layers.0.mlp.experts.gate_up_proj" in structure.experts
    with pytest.raises(PlanError, match="does not have all of its 4 experts"):
        select(structure, [parameter])


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def remote(own: Built) -> Path:
    """A llama whose model classes are Python code in its folder."""
    folder = own("llama")
    (folder / "modeling_own.py").write_text(REMOTE)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_json(folder / "config.json", architectures=["OwnForCausalLM"], model_type="own", auto_map=auto)
    return folder


def test_code_of_the_model_itself_is_not_run_unless_it_is_trusted(remote: Path) -> None:
    with pytest.raises(CheckpointError, match="whose code is in the model's own repository") as caught:
        structure_of(remote)
    assert "--trust-remote-code" in caught.value.hint
    structure = structure_of(remote, trust_remote_code=True)
    assert structure.architecture == "OwnForCausalLM"
    assert len(select(structure, ["q_proj"])) == 2


def test_a_class_that_transformers_has_is_used_instead_of_remote_code(remote: Path) -> None:
    """Falcon, Phi and others still have an auto_map in their config; the class of transformers is used."""
    auto = json.loads((remote / "config.json").read_text())["auto_map"]
    (remote / "modeling_own.py").write_text(REMOTE.replace("OwnForCausalLM", "LlamaForCausalLM_"))
    edit_json(remote / "config.json", architectures=["LlamaForCausalLM"], model_type="llama", auto_map=auto)
    assert structure_of(remote).architecture == "LlamaForCausalLM"


def test_a_transformers_without_its_conversion_mapping_is_one_clear_error(
    checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(import_module("transformers.conversion_mapping"), "get_model_conversion_mapping")
    with pytest.raises(CheckpointError, match=r"transformers .* does not have the weight name mapping") as caught:
        structure_of(checkpoint("llama"))
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize(
    "value", ["flash_attention_2", "somebody/kernel:forward", "nonsense", {"": "flash_attention_3"}, 5], ids=str
)
def test_the_attention_and_experts_implementations_in_the_config_are_ignored(
    key: str, value: object, own: Built
) -> None:
    folder = own("llama")
    edit_json(folder / "config.json", **{key: value})
    before = (folder / "config.json").read_bytes()
    assert len(select(structure_of(folder), ["q_proj"])) == 2
    assert (folder / "config.json").read_bytes() == before


def test_the_attention_implementation_of_a_sub_config_is_ignored(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    folder = architectures.save(tmp_path, family, "float32")
    expected = structure_of(folder)
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["_attn_implementation"] = "flash_attention_2"
    whole = {"text_config": "flash_attention_3", "vision_config": "somebody/kernel", "": "sdpa"}
    (folder / "config.json").write_text(json.dumps({**config, "_attn_implementation": whole}))
    assert structure_of(folder) == expected


def test_building_a_model_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old DETR config names a repository for its backbone. A real access would raise NetworkUsedError instead."""
    config = transformers.DetrConfig(architectures=["DetrForObjectDetection"]).to_dict()
    config |= {"backbone_config": None, "backbone": "somebody/backbone", "use_timm_backbone": False}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="refers to a file on the network") as caught:
        meta_model.build_meta_model(tmp_path, config)
    assert "--trust-remote-code" in caught.value.hint
    assert not import_module("huggingface_hub.constants").HF_HUB_OFFLINE


def test_remote_code_of_a_sub_config_causes_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = architectures.save(tmp_path, FAMILIES["llava"], "float32")
    config = json.loads((folder / "config.json").read_text())
    reference = {"AutoModel": "somebody/code--modeling.Model", "AutoModelForCausalLM": "somebody/code--modeling.Model"}
    config["text_config"] |= {"model_type": "clap_text_model", "auto_map": reference}
    (folder / "config.json").write_text(json.dumps(config))
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(CheckpointError):
        structure_of(folder)
    assert not asked


@pytest.mark.parametrize(
    "name", ["pipeline", "Trainer", "BertTokenizer", "LlamaConfig", "GenerationMixin", "AutoModel", "logging", "os"]
)
def test_only_a_model_class_is_built(name: str, own: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own("llama")
    edit_json(folder / "config.json", architectures=[name])
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained",
        lambda *_, **__: pytest.fail("the config was loaded before the class was checked"),
    )
    with pytest.raises(CheckpointError, match=f"config.json names {name}, which") as caught:
        structure_of(folder)
    assert "under `architectures`" in caught.value.hint
