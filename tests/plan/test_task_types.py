"""Task types: those that PEFT cannot load are refused, and the lines that add a head to a pair do what they promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from support import tiny_models
from support.runs import initialize
from support.training import TOKENS

from milora_init.errors import PlanError
from milora_init.options import TASK_TYPES, InitOptions
from milora_init.plan.peft_check import require_loadable
from milora_init.plan.plan import Plan, make_plan

Built = Callable[..., Path]

# As they stand in the documentation.
NEW_HEAD = """
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained("./svd_init", num_labels=3)
config = LoraConfig.from_pretrained("./svd_init", subfolder="lora")
config.task_type = "SEQ_CLS"  # PEFT then trains the head too, and saves it with the adapter
model = get_peft_model(base, config)
state = get_peft_model_state_dict(model) | load_peft_weights("./svd_init", subfolder="lora")
left = set_peft_model_state_dict(model, state).unexpected_keys
assert not left, "this class has other names for the modules: give the model its head before milora-init"
"""
WITH_THE_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def plan(folder: Path, kind: str, **options: Any) -> Plan:
    given = {"out": "out", "rank": 4, "target": tiny_models.TARGETS[kind], **options}
    return make_plan(InitOptions(model=str(folder), **given), folder)


FITS = {
    "llama": {"CAUSAL_LM"},
    "gpt2": {"CAUSAL_LM"},
    "bert": {"FEATURE_EXTRACTION"},
    "bert classifier": set(),
    "llama classifier": set(),
}


@pytest.mark.parametrize("task", TASK_TYPES)
@pytest.mark.parametrize("kind", FITS)
def test_a_task_type_fits_or_is_refused_while_planning(kind: str, task: str, checkpoint: Built) -> None:
    folder = checkpoint(kind)
    if task in FITS[kind]:
        made = plan(folder, kind, task_type=task)
        assert made.adapter_config["task_type"] == task
        require_loadable(made)
        return
    with pytest.raises(PlanError, match=f"task type {task}") as caught:
        plan(folder, kind, task_type=task)
    assert caught.value.hint.startswith("leave --task-type out")
    assert ("A new head" in caught.value.hint) is (task in WITH_THE_TASK)
    require_loadable(plan(folder, kind))  # which then is right


def test_the_task_type_is_part_of_the_fingerprint(checkpoint: Built) -> None:
    bert = checkpoint("bert")
    assert plan(bert, "bert", task_type="FEATURE_EXTRACTION").fingerprint != plan(bert, "bert").fingerprint


def run(task: str = "SEQ_CLS") -> Any:
    lines = NEW_HEAD.replace("SEQ_CLS", task).replace("AutoModelForSequenceClassification", WITH_THE_TASK[task])
    if task == "QUESTION_ANS":
        lines = lines.replace(", num_labels=3", "")
    names: dict[str, Any] = {}
    exec(lines, names)
    return names["model"]


def initialised(source: Path, kind: str) -> None:
    targets = tiny_models.TARGETS[kind]
    initialize(InitOptions(model=str(source), out="./svd_init", rank=4, target=targets, device=("cpu",)))


def features(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS)[0]
    return found


@pytest.mark.parametrize(
    ("kind", "task"), [("llama", "SEQ_CLS"), ("llama", "TOKEN_CLS"), ("gpt2", "SEQ_CLS"), ("gpt2", "TOKEN_CLS")]
)
def test_a_new_head_is_trained_on_a_pair_of_a_causal_model(
    kind: str, task: str, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    initialised(checkpoint(kind), kind)
    model = run(task)
    truth = features(transformers.AutoModel.from_pretrained(checkpoint(kind)))
    pair = features(model.base_model.model.base_model)
    assert float((pair - truth).norm() / truth.norm()) < 100 * torch.finfo(torch.float32).eps
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("modules_to_save" in name for name in trained)
    model.save_pretrained("trained")
    assert any("lora_" not in key for key in load_file("trained/adapter_model.safetensors"))


def test_a_pair_with_a_trained_head_is_loaded_again(
    checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    initialised(checkpoint("llama"), "llama")
    model = run().train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    head, before = model.base_model.model.score, model.base_model.model.score.weight.clone()
    for _ in range(3):
        model(input_ids=TOKENS, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    assert not torch.equal(head.weight, before)
    model.save_pretrained("trained")
    again = AutoPeftModelForSequenceClassification.from_pretrained("trained", num_labels=3)
    assert torch.equal(features(again), features(model))


@pytest.mark.parametrize(("kind", "task"), [("bert", "SEQ_CLS"), ("llama", "QUESTION_ANS")])
def test_where_the_names_differ_the_lines_say_so_and_a_head_given_before_is_the_way(
    kind: str, task: str, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    initialised(checkpoint(kind), kind)
    with pytest.raises(AssertionError, match="give the model its head before"):
        run(task)
    more = {} if task == "QUESTION_ANS" else {"num_labels": 3}
    cls = getattr(transformers, WITH_THE_TASK[task])
    cls.from_pretrained(checkpoint(kind), **more).save_pretrained("./with_head")
    options = InitOptions(
        model="./with_head", out="./svd_init", rank=4, target=tiny_models.TARGETS[kind], device=("cpu",), overwrite=True
    )
    initialize(options)
    truth = features(cls.from_pretrained("./with_head"))
    assert float((features(run(task)) - truth).norm() / truth.norm()) < 1e-5
    still = PeftModel.from_pretrained(cls.from_pretrained("./svd_init"), "./svd_init", subfolder="lora")
    assert float((features(still) - truth).norm() / truth.norm()) < 1e-5  # as the run's own lines load it
