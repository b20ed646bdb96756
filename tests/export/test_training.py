"""The README's lines for trainers, run as they stand there on a tiny model: trained, saved, resumed, and taken back."""

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
from support.training import load, logits
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig

from milora_init.export.convert import convert
from milora_init.export.merge import merge
from milora_init.options import InitOptions
from milora_init.run.initialize import initialize
from milora_init.verify.verify import verify

Built = Callable[..., Path]
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(
    re.findall(r"<!-- run by tests/export/test_training\.py: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL)
)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(57))]
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def workplace(own: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the original model, which has a tokenizer, and its pair in ./svd_init; the current one."""
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


def short(config: Any, **more: Any) -> Callable[..., Any]:
    """A trainer's arguments as the README gives them, for a run of seconds."""

    def make(folder: str, **given: Any) -> Any:
        quick = {"max_steps": 6, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
        on_cpu = {"use_cpu": True, "bf16": False}
        return config(folder, **{**given, **quick, **on_cpu, "per_device_train_batch_size": 4, **more})

    return make


def run(block: str, names: dict[str, Any], **replaced: Any) -> dict[str, Any]:
    """Run a block of the README; names that it imports and that are in `replaced` are those."""
    code = BLOCKS[block].replace("meta-llama/Llama-2-7b-hf", "own")
    lines = code.splitlines()
    at = max((i for i, line in enumerate(lines) if line.startswith("from ")), default=-1) + 1
    exec("\n".join(lines[:at]), names)
    names |= replaced
    exec("\n".join(lines[at:]), names)
    return names


def take_back(folder: Path) -> None:
    """Trained pair, merge, and conversion on the original model compute one function, and not the old one."""
    pair = logits(load(folder / "svd_init", folder / "trained"))
    assert float((pair - logits(load(folder / "own"))).norm() / pair.norm()) > 0.01, "the training moved nothing"
    assert verify("svd_init", adapter="trained").code == "trained_pair"
    merge("svd_init", "merged", adapter="trained")
    convert(Path("svd_init/lora"), Path("trained"), Path("plain"))
    torch.testing.assert_close(logits(load(folder / "merged")), pair, **NEAR)
    torch.testing.assert_close(logits(load(folder / "own", folder / "plain")), pair, **NEAR)


def test_trainer_trains_saves_and_resumes(workplace: Path) -> None:
    arguments = short(transformers.TrainingArguments, save_steps=3, seed=5)
    run("trainer", run("pair", {"dataset": tokens()}), TrainingArguments=arguments)
    straight = load_file("trained/adapter_model.safetensors")
    take_back(workplace)

    # The same again, as if it had been cut off after the checkpoint of the third step.
    shutil.rmtree("trained")
    shutil.rmtree("run/checkpoint-6")
    BLOCKS["resumed"] = BLOCKS["trainer"].replace("train()", "train(resume_from_checkpoint=True)")
    names = run("resumed", run("pair", {"dataset": tokens()}), TrainingArguments=arguments)
    assert names["trainer"].state.global_step == 6
    resumed = load_file("trained/adapter_model.safetensors")
    initial = load_file("svd_init/lora/adapter_model.safetensors")
    for key, value in straight.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, initial[key])


def test_sft_trains_the_pair(workplace: Path) -> None:
    dataset = Dataset.from_dict({"text": [sentence(number) for number in range(16)]})
    run("sft", run("pair", {"dataset": dataset}), SFTConfig=short(SFTConfig))
    take_back(workplace)


def preferences() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [sentence(number, 4) for number in range(8)],
            "chosen": [" " + sentence(number + 20, 4) for number in range(8)],
            "rejected": [" " + sentence(number + 40, 4) for number in range(8)],
        }
    )


def test_the_dpo_reference_is_the_original_model_whether_given_or_not(workplace: Path) -> None:
    given = run("dpo", run("pair", {"preferences": preferences()}), DPOConfig=short(DPOConfig))
    take_back(workplace)
    names = run("pair", {})
    alone: Any = DPOTrainer(
        names["model"],
        args=short(DPOConfig)("run"),
        train_dataset=preferences(),
        processing_class=names["tokenizer"],
    )
    batch = next(iter(alone.get_train_dataloader()))

    def said(trainer: Any) -> tuple[torch.Tensor, ...]:
        return tuple(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))

    original = said(given["trainer"])
    torch.testing.assert_close(said(alone), original, **NEAR)
    alone.train()
    torch.testing.assert_close(said(alone), original, **NEAR)  # its reference does not move with the training


def test_the_grpo_reference_is_the_original_model(workplace: Path) -> None:
    prompts = Dataset.from_dict({"prompt": [sentence(number, 4) for number in range(8)]})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    arguments = short(GRPOConfig, num_generations=2, max_completion_length=4, max_steps=2)
    names = run("grpo", run("pair", {"prompts": prompts, "reward": reward}), GRPOConfig=arguments)
    model = names["model"]
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), logits(load(workplace / "own")), **NEAR)
    assert verify("svd_init", adapter="trained").code == "trained_pair"


def test_the_readme_has_a_block_for_each_trainer() -> None:
    assert {"pair", "trainer", "sft", "dpo", "grpo"} <= BLOCKS.keys()
