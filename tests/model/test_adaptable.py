"""adaptable: what can be adapted is decided on modules, and is what PEFT would adapt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support import architectures, tiny_models
from support.families import FAMILIES
from torch import nn

from milora_init.checkpoint.folder import open_checkpoint
from milora_init.errors import CheckpointError, PlanError
from milora_init.lora.targets import select
from milora_init.model.adaptable import ModelStructure, read_structure

Built = Callable[..., Path]


def structure_of(folder: Path) -> ModelStructure:
    opened = open_checkpoint(folder)
    return read_structure(folder, opened.config, {name: info.shape for name, info in opened.tensors.items()})


def chosen(structure: ModelStructure, targets: list[str], exclude: list[str] | None = None) -> list[str]:
    return [weight.module for weight in select(structure, targets, exclude or [])]


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_only_weights_of_linear_layers_can_be_adapted(kind: str, checkpoint: Built) -> None:
    """Never biases, norms or embeddings, whatever their names contain. The shape is (out, in)."""
    structure = structure_of(checkpoint(kind))
    modules = dict(tiny_models.on_meta(kind).named_modules())
    assert structure.adaptable
    for name, weight in structure.adaptable.items():
        module = modules[name]
        assert weight.module == name
        assert weight.tensor.endswith(".weight")
        assert isinstance(module, nn.Linear) != weight.transposed
        assert weight.transposed == (kind == "gpt2")
        if isinstance(module, nn.Linear):
            assert weight.shape == (module.out_features, module.in_features)
        else:
            assert weight.shape == tuple(module.weight.T.shape)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "tied llama", "gemma"])
def test_the_output_head_is_never_adapted(kind: str, checkpoint: Built) -> None:
    structure = structure_of(checkpoint(kind))
    assert "lm_head" not in structure.adaptable
    with pytest.raises(PlanError, match="lm_head is the output head"):
        select(structure, ["lm_head"])


@pytest.mark.parametrize(("kind", "embedding"), [("llama", "embed_tokens"), ("gpt2", "wte"), ("gemma", "embed_tokens")])
def test_an_embedding_is_refused_with_the_reason(kind: str, embedding: str, checkpoint: Built) -> None:
    with pytest.raises(PlanError, match=rf"{embedding} is an? \w*Embedding, not a linear layer"):
        select(structure_of(checkpoint(kind)), [embedding])


@pytest.mark.parametrize(
    ("name", "what"), [("conv1", "Conv1d"), ("layer_norm", "LayerNorm"), ("embed_positions", "Embedding")]
)
def test_a_module_that_is_not_linear_is_refused_with_its_class(name: str, what: str, tmp_path: Path) -> None:
    folder = architectures.save(tmp_path, FAMILIES["whisper"], "float32")
    with pytest.raises(PlanError, match=rf"{name} is an? \w*{what}, not a linear layer"):
        select(structure_of(folder), [name])


def test_a_module_without_a_weight_is_refused(checkpoint: Built) -> None:
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn is not a linear layer"):
        select(structure_of(checkpoint("llama")), ["self_attn"])


@pytest.mark.parametrize("kind", ["tied llama", "gemma", "gpt2"])
def test_tied_weights_are_never_adapted(kind: str, checkpoint: Built) -> None:
    model = tiny_models.on_meta(kind)
    model.tie_weights()  # type: ignore[operator]
    parameters = list(model.named_parameters(remove_duplicate=False))
    shared = {name for name, p in parameters if sum(p is other for _, other in parameters) > 1}
    assert shared
    structure = structure_of(checkpoint(kind))
    assert not shared & {f"{weight.module}.weight" for weight in select(structure, ["all-linear"])}
    assert not shared & {weight.tensor for weight in structure.adaptable.values()}


@pytest.mark.parametrize(
    ("kind", "task"),
    [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", None), ("bert classifier", None), ("gemma", "CAUSAL_LM")],
)
def test_the_task_type_follows_from_the_class(kind: str, task: str | None, checkpoint: Built) -> None:
    structure = structure_of(checkpoint(kind))
    assert structure.task_type == task
    assert structure.architecture == tiny_models.KINDS[kind][0]


def test_a_checkpoint_without_a_head_maps_to_the_class_with_a_head(own: Built) -> None:
    """`layers.0...` on disk is `model.layers.0...` in LlamaForCausalLM."""
    folder = own("llama")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tiny_models.tensors(folder).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weight = select(structure_of(folder), ["model.layers.0.self_attn.q_proj"])[0]
    assert weight.tensor == "layers.0.self_attn.q_proj.weight"


def test_a_weight_that_the_checkpoint_lacks_is_refused_with_the_reason(own: Built) -> None:
    folder = own("llama")
    tensors = tiny_models.tensors(folder)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="filled by no tensor of the checkpoint"):
        select(structure_of(folder), ["0.self_attn.q_proj"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no class under `architectures`"),
        ({"architectures": []}, "names no class"),
        ({"architectures": ["NoSuchForCausalLM"]}, "names NoSuchForCausalLM, which transformers"),
        ({"architectures": ["BertModel"]}, "a BertModel cannot be built|no tensor belongs to"),
        ({"model_type": "no_such"}, "a LlamaForCausalLM cannot be built"),
        ({"num_attention_heads": "many"}, "a LlamaForCausalLM cannot be built"),
        ({"intermediate_size": 40}, r"\[48, 32\] on disk, but \[40, 32\] by config.json"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised \(bitsandbytes\)"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, r"quantised \(fp8\)"),
        ({"quantization_config": [4]}, r"quantised \(unknown\)"),
        ({"a": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}}, r"quantised \(fp8\)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"quantised \(compressed-tensors\)"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    changes: dict[str, object], message: str, own: Built
) -> None:
    folder = own("llama")
    tiny_models.edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        structure_of(folder)


def test_code_in_the_folder_is_never_run(own: Built, tmp_path: Path) -> None:
    folder = own("llama")
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
    assert chosen(structure_of(folder), ["q_proj"])
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto, "model_type": "own"}))
    with pytest.raises(CheckpointError):
        structure_of(folder)
    assert not (tmp_path / "ran").exists()
