"""The class that loads a pair: for some models AutoModelForCausalLM builds a class with other module names."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from support import architectures
from support.families import FAMILIES
from support.marks import mostly_wide, wide
from support.runs import initialize
from support.tiny_models import edit_json
from support.training import TOKENS, logits
from torch import Tensor

from milora_init.api import convert
from milora_init.errors import PlanError, UsageError
from milora_init.export.merge import merge
from milora_init.lora.compatibility import explain_other_class
from milora_init.manifest import MANIFEST, Manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import Plan, make_plan
from milora_init.report import loading_lines
from milora_init.verification.verify import verify

Built = Callable[..., Path]
Made = Callable[[str, bool], tuple[Path, Path, Manifest]]

_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_QWEN: dict[str, Any] = {
    "text_config": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **_LINEAR,
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "in_channels": 3,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
    },
    "image_token_id": 60, "vision_start_token_id": 61, "vision_end_token_id": 62, "video_token_id": 63,
    "tie_word_embeddings": False,
}  # fmt: skip
# The class of config.json, the one that AutoModelForCausalLM builds, and what is adapted.
MODELS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", ("q_proj", "in_proj_qkv", "down_proj")),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM", ("q_proj", "experts")),
    "llama4": ("Llama4ForConditionalGeneration", "Llama4ForCausalLM", ("q_proj", "down_proj", "experts")),
}


def save(name: str, folder: Path) -> Path:
    if name in FAMILIES:
        return architectures.save(folder, FAMILIES[name], "float32")
    torch.manual_seed(0)
    cls = MODELS[name][0]
    model: Any = getattr(transformers, cls)(getattr(transformers, cls.partition("For")[0] + "Config")(**_QWEN))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter)).mul_(0.3)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(name, text_only) is a model's source, its output and the manifest."""
    sources: dict[str, Path] = {}
    done: dict[tuple[str, bool], tuple[Path, Path, Manifest]] = {}

    def get(name: str, text_only: bool) -> tuple[Path, Path, Manifest]:
        if name not in sources:
            sources[name] = save(name, tmp_path_factory.mktemp(f"{name}-"))
        if (name, text_only) not in done:
            out, source = tmp_path_factory.mktemp(f"{name}-out-") / "out", sources[name]
            options = InitOptions(
                model=str(source), out=str(out), rank=4, target=MODELS[name][2], text_only=text_only, device=("cpu",)
            )
            done[name, text_only] = source, out, initialize(options)
        return done[name, text_only]

    return get


def load(cls: str, base: Path, adapter: Path | None = None) -> Any:
    model: Any = getattr(transformers, cls).from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model if adapter is None else PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def train(cls: str, out: Path, to: Path) -> Any:
    """The pair, loaded as a class and trained for some steps; the adapter is saved."""
    torch.manual_seed(0)
    model = load(cls, out, out / "lora").train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(5):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(to)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def plan(folder: Path, **options: Any) -> Plan:
    return make_plan(InitOptions(model=str(folder), out="out", **{"rank": 4, **options}), folder)


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("name", mostly_wide(MODELS, "qwen3_5_moe"))
def test_the_pair_computes_the_source_in_its_class_and_the_manifest_names_the_class(
    name: str, text_only: bool, made: Made
) -> None:
    source, out, manifest = made(name, text_only)
    own, auto, _ = MODELS[name]
    cls = "AutoModelForCausalLM" if text_only else own
    truth = logits(load(cls, source))
    pair = load(cls, out, out / "lora")
    assert relative(logits(pair), truth) < 100 * torch.finfo(torch.float32).eps
    with pair.disable_adapter():
        assert relative(logits(pair), truth) > 0.01
    assert manifest.source["architecture"] == (auto if text_only else own)
    assert manifest.source["other_class"] == (own if text_only else auto)
    assert f"from transformers import {cls}\n" in loading_lines(manifest)
    (notice,) = (n for n in manifest.notices if "other names" in n)
    assert own in notice
    assert auto in notice
    assert ("--text-only" in notice) is not text_only
    assert notice in plan(source, text_only=text_only, target=MODELS[name][2]).notices  # a dry run shows the notice too
    assert verify(str(out), model=str(source), all_components=True).code == "pair"


@pytest.mark.parametrize("text_only", [False, True])
def test_an_adapter_trained_on_the_other_class_is_refused_with_that_reason(
    text_only: bool, made: Made, tmp_path: Path
) -> None:
    _, out, _ = made("qwen3_5", text_only)
    own, auto, _ = MODELS["qwen3_5"]
    train(own if text_only else "AutoModelForCausalLM", out, tmp_path / "trained")
    reason = rf"trained on another class \({own if text_only else auto}"
    repair = "load the base with AutoModelForCausalLM" if text_only else f"load the base as a {own}"
    verdict = verify(str(out), adapter=str(tmp_path / "trained"))
    assert verdict.code == "adapter_misfit"
    (difference,) = verdict.differences
    assert reason.replace("\\", "") in difference.what
    assert repair in difference.hint
    for export in (
        lambda: merge(str(out), str(tmp_path / "merged"), adapter=str(tmp_path / "trained")),
        lambda: convert(out / "lora", tmp_path / "trained", tmp_path / "plain"),
    ):
        with pytest.raises(PlanError, match=reason) as caught:
            export()
        assert repair in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"trained"}


@pytest.mark.parametrize("name", ["qwen3_5", wide("llama4")])
def test_a_text_only_pair_can_be_trained_merged_and_converted(name: str, made: Made, tmp_path: Path) -> None:
    source, out, _ = made(name, True)
    pair = logits(train("AutoModelForCausalLM", out, tmp_path / "trained"))
    assert relative(pair, logits(load("AutoModelForCausalLM", source))) > 0.001, "the training changed nothing"
    assert verify(str(out), adapter=str(tmp_path / "trained")).code == "trained_pair"
    merge(str(out), str(tmp_path / "merged"), adapter=str(tmp_path / "trained"))
    convert(out / "lora", tmp_path / "trained", tmp_path / "plain")
    assert relative(logits(load("AutoModelForCausalLM", tmp_path / "merged")), pair) < 1e-4
    assert relative(logits(load("AutoModelForCausalLM", source, tmp_path / "plain")), pair) < 1e-4
    load(MODELS[name][0], tmp_path / "merged")  # the weights of the vision tower are still there


def test_verify_recognizes_a_text_only_pair_without_its_manifest(made: Made, tmp_path: Path) -> None:
    _, out, _ = made("qwen3_5", True)
    for path in out.rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            to = tmp_path / path.relative_to(out)
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(path.read_bytes())
    assert verify(str(tmp_path)).code == "no_manifest"


def test_text_only_changes_the_fingerprint(made: Made) -> None:
    assert made("qwen3_5", True)[2].fingerprint != made("qwen3_5", False)[2].fingerprint


@pytest.mark.parametrize(
    ("name", "why"),
    [("llama", "builds a LlamaForCausalLM"), ("gemma3", "builds a Gemma3ForCond"), ("qwen2_vl", "has no class for")],
)
def test_text_only_is_refused_if_there_is_no_text_class(name: str, why: str, tmp_path: Path) -> None:
    architectures.save(tmp_path, FAMILIES[name], "float32")
    with pytest.raises(PlanError, match=why) as caught:
        plan(tmp_path, text_only=True)
    assert caught.value.hint == "remove --text-only"


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "bart", "whisper", "bert", "bert with a head", "mixtral", "qwen2_vl"]
)
def test_there_is_no_notice_if_only_one_set_of_names_is_in_use(name: str, tmp_path: Path) -> None:
    architectures.save(tmp_path, FAMILIES[name], "float32")
    assert not any("other names" in n for n in plan(tmp_path, target=FAMILIES[name].targets).notices)


def test_the_notice_for_a_decoder_without_a_head_does_not_suggest_text_only(own: Built, tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(own("llama")).save_pretrained(tmp_path / "headless")
    (notice,) = plan(tmp_path / "headless").notices
    assert "load the base as a LlamaModel: AutoModelForCausalLM builds a LlamaForCausalLM" in notice
    assert "--text-only" not in notice


def test_the_task_type_does_not_change_the_class_in_the_loading_lines(made: Made) -> None:
    source, _, manifest = made("qwen3_5", False)
    config = plan(source, task_type="CAUSAL_LM", target=("q_proj",)).adapter_config
    assert config["task_type"] == "CAUSAL_LM"
    changed = replace(manifest, adapter=config)
    assert f"from transformers import {MODELS['qwen3_5'][0]}\n" in loading_lines(changed)


OWN = {"model.language_model.layers.0.q_proj", "model.language_model.layers.1.q_proj", "lm_head"}


@pytest.mark.parametrize(
    ("other", "is_so"),
    [
        ({"model.layers.0.q_proj", "model.layers.1.q_proj"}, True),
        ({"language_model.model.layers.0.q_proj"}, True),
        ({"layers.0.q_proj", "layers.1.q_proj", "lm_head"}, True),
        (OWN, False),
        (set(), False),
        ({"model.layers.0.q_proj", "model.layers.0.k_proj"}, False),
        ({"model.layers.2.q_proj"}, False),
        ({"model.language_model.layers.2.q_proj"}, False),
        ({"model.layers.0.q_proj", "layers.1.q_proj"}, False),
    ],
)
def test_only_a_different_prefix_means_another_class(other: set[str], is_so: bool) -> None:
    assert (explain_other_class(OWN, other, None) is not None) is is_so


def test_a_manifest_without_text_only_is_still_read(made: Made, tmp_path: Path) -> None:
    """Older manifests have no `text_only` input; the class is then the one that config.json names."""
    _, out, manifest = made("qwen3_5", False)
    for path in out.rglob("*"):
        if path.is_file():
            to = tmp_path / path.relative_to(out)
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(path.read_bytes())
    inputs = {key: value for key, value in manifest.inputs.items() if key != "text_only"}
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    edit_json(tmp_path / MANIFEST, inputs=inputs, fingerprint=fingerprint)
    verdict = verify(str(tmp_path))
    assert (verdict.code, verdict.differences) == ("pair", ())


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5_moe", wide("llama4")])
def test_an_adapter_is_converted_to_the_names_of_the_other_class(
    name: str, text_only: bool, made: Made, tmp_path: Path
) -> None:
    """Trained with one class, loaded with the other, on the text input that both have."""
    source, out, _ = made(name, text_only)
    own = MODELS[name][0]
    classes = (own, "AutoModelForCausalLM")
    trained = tmp_path / "trained"
    train(classes[text_only], out, trained)
    convert(out, trained, tmp_path / "plain", text_only=not text_only)
    expected = logits(PeftModel.from_pretrained(load(classes[text_only], out), str(trained)))
    model = PeftModel.from_pretrained(load(classes[not text_only], source), str(tmp_path / "plain"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    convert(out, trained, tmp_path / "same", text_only=text_only)
    convert(out, trained, tmp_path / "kept")
    same, kept = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("same", "kept"))
    assert same == kept


def test_the_other_class_needs_a_pair_that_has_one(made: Made, tmp_path: Path, start: Any, checkpoint: Built) -> None:
    start(checkpoint("llama"))
    trained = tmp_path / "trained"
    train("AutoModelForCausalLM", tmp_path / "out", trained)
    with pytest.raises(PlanError, match="not a text-only class"):
        convert(tmp_path / "out", trained, tmp_path / "plain", text_only=True)
    (tmp_path / "out" / "lora").rename(tmp_path / "lora")
    with pytest.raises(UsageError, match="--text-only needs a residual base"):
        convert(tmp_path / "lora", trained, tmp_path / "plain", model="me/model", text_only=True)
    assert not (tmp_path / "plain").exists()
