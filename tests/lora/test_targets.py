"""targets: selected as in PEFT; experts and vision towers only by a target that names them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from support import architectures, tiny_models
from support.families import FAMILIES

from milora_init.checkpoint.folder import open_checkpoint
from milora_init.errors import PlanError
from milora_init.lora.config import match_pattern
from milora_init.lora.targets import select, suffixes
from milora_init.model.adaptable import ModelStructure, read_structure
from milora_init.options import InitOptions
from milora_init.plan.plan import make_plan
from milora_init.untrusted import plain_names

Built = Callable[..., Path]


def structure_of(folder: Path) -> ModelStructure:
    opened = open_checkpoint(folder)
    return read_structure(folder, opened.config, {name: info.shape for name, info in opened.tensors.items()})


def chosen(structure: ModelStructure, targets: list[str], exclude: list[str] | None = None) -> list[str]:
    return [weight.module for weight in select(structure, targets, exclude or [])]


@pytest.mark.parametrize("kind", ["qwen2", "bert", "gpt2"])
def test_a_target_never_selects_a_bias(kind: str, checkpoint: Built) -> None:
    folder = checkpoint(kind)
    assert any(name.endswith(".bias") for name in tiny_models.tensors(folder))
    for weight in select(structure_of(folder), tiny_models.TARGETS[kind]):
        assert len(weight.shape) == 2
        assert not weight.tensor.endswith(".bias")


def test_a_suffix_selects_its_module_in_every_layer_in_model_order(checkpoint: Built) -> None:
    structure = structure_of(checkpoint("llama"))
    assert chosen(structure, ["v_proj", "q_proj"]) == [
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")
    ]


def test_a_longer_suffix_or_a_full_name_selects_one_module(checkpoint: Built) -> None:
    structure = structure_of(checkpoint("llama"))
    assert chosen(structure, ["1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    assert chosen(structure, ["model.layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj"]


def test_a_suffix_matches_only_whole_parts_of_a_name(checkpoint: Built) -> None:
    with pytest.raises(PlanError, match="'proj' matches no module"):
        select(structure_of(checkpoint("llama")), ["proj"])


def test_all_linear_selects_everything_except_the_heads(checkpoint: Built) -> None:
    llama = structure_of(checkpoint("llama"))
    assert chosen(llama, ["all-linear"]) == list(llama.adaptable)
    classifier = structure_of(checkpoint("bert classifier"))
    assert classifier.heads == {"classifier"}
    assert set(chosen(classifier, ["all-linear"])) == set(classifier.adaptable) - {"classifier"}


def test_a_regular_expression_must_match_the_full_name(checkpoint: Built) -> None:
    structure = structure_of(checkpoint("llama"))
    assert chosen(structure, [r"re:.*\.0\..*(q|k)_proj"]) == [f"model.layers.0.self_attn.{name}_proj" for name in "qk"]
    with pytest.raises(PlanError, match="matches no module"):
        select(structure, ["re:q_proj"])
    with pytest.raises(PlanError, match="not a regular expression"):
        select(structure, ["re:("])


SLOW = "re:([a-z_.0-9]+)*!"


@pytest.mark.parametrize("pattern", [SLOW, "re:(a|a)*(.*)*#" + "(.*.*)*" * 20, "re:" + "(.*)*" * 30 + "!"])
def test_matching_a_regular_expression_has_a_time_limit(
    pattern: str, checkpoint: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora_init.lora.targets._REGEX_LIMIT_S", 0.2)
    structure = structure_of(checkpoint("llama"))
    for asked in ([pattern], []), (["q_proj"], [pattern]):
        with pytest.raises(PlanError, match=r"takes more than 0\.2 s to match") as caught:
            select(structure, *asked)
        assert "give module names" in caught.value.hint


def test_rank_and_alpha_patterns_have_the_same_time_limit(
    checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora_init.lora.targets._REGEX_LIMIT_S", 0.2)
    for option in ("rank_pattern", "alpha_pattern"):
        given: dict[str, Any] = {option: {SLOW: 2}}
        options = InitOptions(model=str(checkpoint("llama")), out=str(tmp_path / "out"), **given)
        with pytest.raises(PlanError, match=r"takes more than 0\.2 s to match"):
            make_plan(options, checkpoint("llama"))


@pytest.mark.parametrize(
    "pattern", ["re:" + "(" * 5000 + "a" + ")" * 5000, "re:a{99999999999999999999}", "re:[", "re:*"]
)
def test_an_invalid_regular_expression_is_refused(pattern: str, checkpoint: Built) -> None:
    with pytest.raises(PlanError, match=r"is not a regular expression|cannot be matched"):
        select(structure_of(checkpoint("llama")), [pattern])


def test_plain_names_are_accepted_and_other_patterns_are_refused() -> None:
    odd = ["a.b", "model.layers.0.q-proj", "en_XX", "é.weight", "a b", "x+y"]
    assert plain_names("|".join(map(re.escape, odd))) == odd
    for pattern in (
        "(a+)+b",
        "a*",
        ".*q_proj",
        r"\d",
        r"\w+",
        "a|",
        "|",
        "",
        "a b",
        "[ab]",
        "re:q_proj",
        "a\nb",
        "\\",
        3,
    ):
        with pytest.raises(ValueError, match="patterns from a file are not run"):
            plain_names(pattern)


def test_the_first_pattern_key_that_matches_the_end_of_a_name_is_used() -> None:
    find = match_pattern({"0.q_proj": 1, "q_proj": 2, r"layers\.1\.v_proj|k_proj": 3, "layers.1.v_proj": 4})
    assert [find(name) for name in ("m.layers.0.q_proj", "layers.1.q_proj", "m.layers.1.v_proj", "k_proj")] == [
        1,
        2,
        3,
        3,
    ]
    assert find("layers.0.xq_proj") is None
    assert find("v_proj") is None


def test_exclude_accepts_the_same_forms_as_target(checkpoint: Built) -> None:
    structure = structure_of(checkpoint("llama"))
    both = ["q_proj", "v_proj"]
    assert chosen(structure, both, ["v_proj"]) == chosen(structure, ["q_proj"])
    assert chosen(structure, both, [r"re:.*layers\.1\..*"]) == [f"model.layers.0.self_attn.{n}" for n in both]
    assert chosen(structure, both, ["model.layers.0.self_attn.q_proj"]) == chosen(structure, both)[1:]
    with pytest.raises(PlanError, match="exclude 'absent' matches no module"):
        select(structure, both, ["absent"])
    with pytest.raises(PlanError, match="every target is excluded"):
        select(structure, both, both)


def test_the_hint_separates_targets_that_were_joined_by_a_comma(checkpoint: Built) -> None:
    with pytest.raises(PlanError) as caught:
        chosen(structure_of(checkpoint("llama")), ["q_proj,v_proj"])
    assert caught.value.hint.endswith("--target q_proj --target v_proj")


@pytest.mark.parametrize("targets", [["w_proj"], ["q_proj", "w_proj"]])
def test_a_target_that_matches_nothing_lists_the_valid_suffixes(targets: list[str], checkpoint: Built) -> None:
    structure = structure_of(checkpoint("llama"))
    with pytest.raises(PlanError, match="target 'w_proj' matches no module of LlamaForCausalLM") as caught:
        select(structure, targets)
    assert caught.value.hint.endswith(", ".join(suffixes(structure)))
    assert set(suffixes(structure)) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted_by_peft(kind: str, targets: list[str] | str, exclude: list[str] | str | None = None) -> set[str]:
    """What get_peft_model wraps, on the meta device."""
    config = LoraConfig(r=2, target_modules=targets, exclude_modules=exclude, fan_in_fan_out=kind == "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_models.on_meta(kind), config)
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    ("kind", "targets", "exclude"),
    [
        *((kind, list(targets), []) for kind, targets in tiny_models.TARGETS.items()),
        ("llama", ["q_proj", "model.layers.1.mlp.up_proj", "0.mlp.gate_proj"], []),
        ("llama", ["model.layers.0.self_attn.q_proj"], []),
        ("llama", ["q_proj", "v_proj", "up_proj"], ["v_proj", "model.layers.1.mlp.up_proj"]),
        ("bert", ["dense"], []),
        ("bert", ["output.dense"], ["attention.output.dense"]),
        ("gpt2", ["c_fc", "attn.c_proj"], []),
    ],
)
def test_peft_adapts_exactly_what_is_selected(
    kind: str, targets: list[str], exclude: list[str], checkpoint: Built
) -> None:
    ours = chosen(structure_of(checkpoint(kind)), targets, exclude)
    assert set(ours) == adapted_by_peft(kind, targets, exclude or None)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_all_linear_selects_what_peft_adapts(kind: str, checkpoint: Built) -> None:
    heads = {"classifier", "score"}  # we never select heads; PEFT excludes them only if the task type is given
    assert set(chosen(structure_of(checkpoint(kind)), ["all-linear"])) == adapted_by_peft(kind, "all-linear") - heads


@pytest.mark.parametrize("pattern", [r".*\.layers\.1\..*proj", r".*(q|v)_proj", r"model\.layers\.0\.mlp\.up_proj"])
def test_a_regular_expression_selects_what_peft_adapts(pattern: str, checkpoint: Built) -> None:
    assert set(chosen(structure_of(checkpoint("llama")), [f"re:{pattern}"])) == adapted_by_peft("llama", pattern)


def family(name: str, folder: Path) -> ModelStructure:
    return structure_of(architectures.save(folder, FAMILIES[name], "bfloat16"))


def test_experts_are_adapted_only_if_a_target_names_them(tmp_path: Path) -> None:
    """Otherwise `down_proj` of the default recipe would factor every expert too, at a much higher cost."""
    structure = family("qwen3_moe", tmp_path)
    for targets in (["down_proj"], ["all-linear"], [r"re:.*down_proj"]):
        assert all(weight.expert is None for weight in select(structure, targets))
    assert len(select(structure, ["experts"])) == 4 * 3
    assert len(select(structure, ["experts.down_proj"])) == 4
    assert len(select(structure, [r"re:.*\.experts\.gate_up_proj"])) == 4 * 2
    assert len(select(structure, ["model.layers.1.mlp.experts.down_proj", "q_proj"])) == 4 + 2
    assert len(select(structure, ["experts"], ["experts.gate_up_proj"])) == 4
    assert "experts.down_proj" in suffixes(structure)


def test_a_name_that_only_experts_have_is_refused_with_the_name_to_use(tmp_path: Path) -> None:
    structure = family("mixtral", tmp_path)
    with pytest.raises(PlanError, match="only experts; a target must contain `experts`") as caught:
        select(structure, ["down_proj"])
    assert "experts.down_proj" in caught.value.hint


def test_a_router_is_never_adapted(tmp_path: Path) -> None:
    for name in ("mixtral", "deepseek_v3", "gpt_oss", "llama4"):
        structure = family(name, tmp_path / name)
        gates = [m for m in structure.modules if m.rpartition(".")[2] in ("gate", "router")]
        assert gates
        assert not set(gates) & structure.adaptable.keys()
        with pytest.raises(PlanError, match=r"[Rr]outer|[Gg]ate"):
            select(structure, [gates[0]])


@pytest.mark.parametrize(
    ("name", "tower"),
    [("llava", "vision_tower"), ("gemma3", "vision_tower"), ("qwen2_5_vl", "visual"), ("llama4", "vision_model")],
)
def test_a_vision_tower_is_adapted_only_if_a_target_names_it(name: str, tower: str, tmp_path: Path) -> None:
    structure = family(name, tmp_path)
    inside = {m for m in structure.adaptable if f".{tower}." in f".{m}"}
    assert inside
    for targets in (["all-linear"], ["q_proj", "v_proj"], [r"re:.*q_proj"]):
        assert not {w.module for w in select(structure, targets)} & inside
    last = sorted(inside)[0].rpartition(".")[2]
    named = {w.module for w in select(structure, [rf"re:.*{tower}\..*{last}"])}
    assert named
    assert named <= inside
    only = sorted(
        {m.rpartition(".")[2] for m in inside} - {m.rpartition(".")[2] for m in structure.adaptable.keys() - inside}
    )
    if only:
        with pytest.raises(PlanError, match=f"outside {tower}; a target must contain this name"):
            select(structure, [only[0]])


@pytest.mark.parametrize("name", ["llava", "gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl"])
def test_the_visual_instruction_recipe_selects_the_seven_linears_of_the_text_tower(name: str, tmp_path: Path) -> None:
    structure = family(name, tmp_path)
    target = InitOptions.from_recipe("visual-instruction", model="m", out="o").target
    assert target is not None
    chosen = {weight.module for weight in select(structure, target)}
    assert {m.rpartition(".")[2] for m in chosen} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert len(chosen) == 7 * 2
    assert all(".language_model." in f".{m}" for m in chosen)
