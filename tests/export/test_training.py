"""The training examples of docs/trainers.md, run on a tiny model: train, save, resume, merge and convert."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from support.marks import wide
from support.runs import initialize
from support.training import load, logits
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig

from milora_init.api import convert
from milora_init.export.merge import merge
from milora_init.options import InitOptions
from milora_init.report import loading_lines
from milora_init.verification.verify import verify

Built = Callable[..., Path]
PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
BLOCKS = dict(
    re.findall(r"<!-- run by tests/export/test_training\.py: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL)
)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(57))]
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def working_folder(own: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the original model and its tokenizer in ./own, and its pair in ./svd_init."""
    source = own("llama")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    tokenizer(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(source)
    monkeypatch.chdir(tmp_path)
    initialize(InitOptions(model="own", out="./svd_init", rank=4, device=("cpu",)))
    return tmp_path


def sentence(number: int, length: int = 8) -> str:
    return " ".join(WORDS[4 + (number * 7 + place * (number + 3)) % 57] for place in range(length))


def tokens(count: int = 16) -> Dataset:
    rows = [[WORDS.index(word) for word in sentence(number).split()] for number in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def short_run(config: Any, **more: Any) -> Callable[..., Any]:
    """A config class of a trainer with the page's arguments, shortened to six steps on the CPU."""

    def make(folder: str, **given: Any) -> Any:
        quick = {"max_steps": 6, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
        on_cpu = {"use_cpu": True, "bf16": False}
        return config(folder, **{**given, **quick, **on_cpu, "per_device_train_batch_size": 4, **more})

    return make


def run(block: str, names: dict[str, Any], **replaced: Any) -> dict[str, Any]:
    """Run a code block of the page in `names`. `replaced` overrides names that the block imports."""
    code = BLOCKS[block].replace("meta-llama/Llama-2-7b-hf", "own")
    lines = code.splitlines()
    at = max((i for i, line in enumerate(lines) if line.startswith("from ")), default=-1) + 1
    exec("\n".join(lines[:at]), names)
    names |= replaced
    exec("\n".join(lines[at:]), names)
    return names


def require_merge_and_convert_to_agree(folder: Path) -> None:
    """The trained pair, merge and convert compute one function, which differs from the original model's."""
    pair = logits(load(folder / "svd_init", folder / "trained"))
    assert float((pair - logits(load(folder / "own"))).norm() / pair.norm()) > 0.01, "the training changed nothing"
    assert verify("svd_init", adapter="trained").code == "trained_pair"
    merge("svd_init", "merged", adapter="trained")
    convert(Path("svd_init/lora"), Path("trained"), Path("plain"))
    torch.testing.assert_close(logits(load(folder / "merged")), pair, **NEAR)
    torch.testing.assert_close(logits(load(folder / "own", folder / "plain")), pair, **NEAR)


def test_trainer_trains_saves_and_resumes(working_folder: Path) -> None:
    arguments = short_run(transformers.TrainingArguments, save_steps=3, seed=5)
    run("trainer", run("pair", {"dataset": tokens()}), TrainingArguments=arguments)
    uninterrupted = load_file("trained/adapter_model.safetensors")
    require_merge_and_convert_to_agree(working_folder)

    # Resume from the checkpoint of step 3, as after an interruption.
    shutil.rmtree("trained")
    shutil.rmtree("run/checkpoint-6")
    BLOCKS["resumed"] = BLOCKS["trainer"].replace("train()", "train(resume_from_checkpoint=True)")
    names = run("resumed", run("pair", {"dataset": tokens()}), TrainingArguments=arguments)
    assert names["trainer"].state.global_step == 6
    resumed = load_file("trained/adapter_model.safetensors")
    initial = load_file("svd_init/lora/adapter_model.safetensors")
    for key, value in uninterrupted.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, initial[key])


def test_sft_trains_the_pair(working_folder: Path) -> None:
    dataset = Dataset.from_dict({"text": [sentence(number) for number in range(16)]})
    run("sft", run("pair", {"dataset": dataset}), SFTConfig=short_run(SFTConfig))
    require_merge_and_convert_to_agree(working_folder)


def preferences() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [sentence(number, 4) for number in range(8)],
            "chosen": [" " + sentence(number + 20, 4) for number in range(8)],
            "rejected": [" " + sentence(number + 40, 4) for number in range(8)],
        }
    )


@pytest.mark.wide
def test_the_dpo_reference_is_the_original_model_whether_given_or_not(working_folder: Path) -> None:
    given = run("dpo", run("pair", {"preferences": preferences()}), DPOConfig=short_run(DPOConfig))
    require_merge_and_convert_to_agree(working_folder)
    names = run("pair", {})
    alone: Any = DPOTrainer(
        names["model"],
        args=short_run(DPOConfig)("run"),
        train_dataset=preferences(),
        processing_class=names["tokenizer"],
    )
    batch = next(iter(alone.get_train_dataloader()))

    def reference_log_probs(trainer: Any) -> tuple[torch.Tensor, ...]:
        return tuple(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))

    original = reference_log_probs(given["trainer"])
    torch.testing.assert_close(reference_log_probs(alone), original, **NEAR)
    alone.train()
    torch.testing.assert_close(
        reference_log_probs(alone), original, **NEAR
    )  # the training does not change the reference


def test_the_grpo_reference_is_the_original_model(working_folder: Path) -> None:
    prompts = Dataset.from_dict({"prompt": [sentence(number, 4) for number in range(8)]})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    arguments = short_run(GRPOConfig, num_generations=2, max_completion_length=4, max_steps=2)
    names = run("grpo", run("pair", {"prompts": prompts, "reward": reward}), GRPOConfig=arguments)
    model = names["model"]
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), logits(load(working_folder / "own")), **NEAR)
    assert verify("svd_init", adapter="trained").code == "trained_pair"


def rl_output(method: str) -> tuple[Any, Any]:
    """A trainable model of an output that is made now, and its tokenizer."""
    out = f"./{method}"
    manifest = initialize(InitOptions(model="own", out=out, rank=4, device=("cpu",), method=method, alpha=8))
    names: dict[str, Any] = {}
    exec(loading_lines(manifest), names)
    tokenizer: Any = transformers.AutoTokenizer
    return names["model"], tokenizer.from_pretrained("own")


def require_a_training_of(method: str, folder: Path, model: Any) -> None:
    """The adapter was trained, fits its output, and what the base or the original holds has not moved."""
    model.set_adapter("default")
    model.save_pretrained(folder / "trained", selected_adapters=["default"])
    verdict = verify(method, adapter="trained")
    assert verdict.code == ("trained_adapter" if method == "rlmo" else "trained_pair"), verdict.findings
    initial = Path(method) / ("" if method == "rlmo" else "lora") / "adapter_model.safetensors"
    before, after = load_file(initial), load_file(folder / "trained" / "adapter_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), logits(load(folder / "own")), **NEAR)


@pytest.mark.parametrize("method", [wide("rlmo"), "olora-tail"])
def test_dpo_compares_with_the_original(method: str, working_folder: Path) -> None:
    model, tokenizer = rl_output(method)
    arguments = short_run(DPOConfig, max_steps=2)
    trainer: Any = DPOTrainer(model, args=arguments("run"), train_dataset=preferences(), processing_class=tokenizer)
    plain: Any = DPOTrainer(
        load(working_folder / "own"), load(working_folder / "own"), arguments("plain"), train_dataset=preferences(),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    expected = plain.compute_ref_log_probs(plain.ref_model, batch)
    for _ in ("before", "after"):  # the training does not change the reference
        found = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
        torch.testing.assert_close(found, expected, **NEAR)
        trainer.train()
    require_a_training_of(method, working_folder, model)


@pytest.mark.parametrize("method", ["rlmo", wide("olora-tail")])
def test_grpo_compares_with_the_original(method: str, working_folder: Path) -> None:
    prompts = Dataset.from_dict({"prompt": [sentence(number, 4) for number in range(8)]})
    model, tokenizer = rl_output(method)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    arguments = short_run(GRPOConfig, num_generations=2, max_completion_length=4, max_steps=2, beta=0.04)
    trainer: Any = GRPOTrainer(
        model, reward_funcs=reward, args=arguments("run"), train_dataset=prompts, processing_class=tokenizer
    )
    trainer.train()
    require_a_training_of(method, working_folder, model)


def test_the_readme_has_a_block_for_each_trainer() -> None:
    assert {"pair", "trainer", "sft", "dpo", "grpo"} <= BLOCKS.keys()
