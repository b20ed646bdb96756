"""train.py: what is trained, on which tokens, from which loss, and how it is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train
import transformers
from safetensors.torch import load_file
from support.training_folders import WORDS, TrainingFolders
from training_methods import METHODS, find_start, make_start

from milora_init.verification.verify import verify

QUICK = ("--total-batch", "4", "--learning-rate", "1e-2", "--warmup-steps", "1")


def arguments(training_folders: TrainingFolders, method: str, run: Path, *more: str) -> list[str]:
    base = training_folders.pair if method == "milora" else training_folders.source
    held = f"held={training_folders.held}"
    return [method, str(base), str(run), "--data", str(training_folders.data), "--eval-data", held, *QUICK, *more]


def record(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "training.json").read_text())
    return content


def losses_of(model: Any, training_folders: TrainingFolders) -> float:
    """The mean loss on the responses and their ends, computed without TRL."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(training_folders.source)
    total, count = 0.0, 0
    for line in training_folders.held.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(train.PROMPT.format(instruction=row["query"]))["input_ids"]
        whole = tokenizer(train.PROMPT.format(instruction=row["query"]) + row["response"] + "</s>")["input_ids"]
        assert whole[: len(prompt)] == prompt
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(whole[len(prompt) :])
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        count += len(target)
    return total / count


def test_at_step_0_every_method_has_the_loss_of_the_source(training_folders: TrainingFolders, tmp_path: Path) -> None:
    source = transformers.AutoModelForCausalLM.from_pretrained(training_folders.source).eval()
    truth = losses_of(source, training_folders)
    alone = transformers.AutoModelForCausalLM.from_pretrained(training_folders.pair).eval()
    assert abs(losses_of(alone, training_folders) - truth) > 1e-3, "the base alone looks like the source: no test"
    for method, more in (("milora", ()), ("lora", ("--rank", "4")), ("full", ())):
        run = tmp_path / method
        assert train.main(arguments(training_folders, method, run, "--max-steps", "2", *more)) == 0
        content = record(run)
        assert content["before"]["held"] == pytest.approx(truth, rel=1e-5), method
        assert content["after"]["held"] != content["before"]["held"]
        assert content["finished"]
        assert content["steps"] == 2
    assert verify(str(training_folders.pair), adapter=str(tmp_path / "milora" / "adapter")).code == "trained_pair"


def test_the_loss_before_the_training_can_be_left_out(
    training_folders: TrainingFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(training_folders, "milora", tmp_path / "run", "--max-steps", "1", "--no-eval-on-start")
    assert train.main(words) == 0
    content = record(tmp_path / "run")
    assert content["before"] == {}
    assert f"loss on held: {content['after']['held']:.4f} after" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["olora-tail", "rlmo", "rlpo", "mica"])
def test_every_method_of_milora_init_starts_from_the_loss_of_the_source(
    method: str, training_folders: TrainingFolders, tmp_path: Path
) -> None:
    source = transformers.AutoModelForCausalLM.from_pretrained(training_folders.source).eval()
    make_start(METHODS[method], str(training_folders.source), tmp_path / "out", rank=4)
    model = train.load_model(find_start(method, str(tmp_path / "out"), dropout=0))
    truth = losses_of(source, training_folders)
    assert losses_of(model.train(), training_folders) == pytest.approx(truth, rel=1e-5)  # in training mode too
    trained = {name.split(".lora_")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"A"} if method == "mica" else {"A", "B"})


def test_an_adapter_of_the_original_is_trained_and_fits_its_output(
    training_folders: TrainingFolders, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    make_start(METHODS["mica"], str(training_folders.source), out, rank=4)
    options = arguments(training_folders, "mica", run, "--max-steps", "2")
    options[1] = str(out)
    assert train.main(options) == 0
    content = record(run)
    assert content["after"]["held"] != content["before"]["held"]
    assert verify(str(out), adapter=str(run / "adapter")).code == "trained_adapter"


def test_only_the_response_and_its_end_have_labels(training_folders: TrainingFolders, tmp_path: Path) -> None:
    args = train.parser().parse_args(arguments(training_folders, "milora", tmp_path / "run"))
    trainer = train.make_trainer(args, find_start("milora", str(training_folders.pair)))
    batch = next(iter(trainer.get_eval_dataloader("held")))
    rows = [json.loads(line) for line in training_folders.held.read_text().splitlines()]
    assert batch["labels"].shape == batch["input_ids"].shape
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        said = [WORDS[token] for token in labels[labels != -100].tolist()]
        assert said == [*row["response"].split(), "</s>"]
        prompt = [WORDS[token] for token in ids[labels == -100].tolist() if WORDS[token] != "<pad>"]
        assert prompt[0] == "<s>"
        assert prompt[-2:] == ["Response", ":"]


def test_a_resumed_training_ends_where_a_straight_one_does(
    training_folders: TrainingFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = arguments(training_folders, "milora", run, "--max-steps", "4", "--save-steps", "2")
    assert train.main(options) == 0
    straight = load_file(run / "adapter" / "adapter_model.safetensors")

    assert train.main(options) == 2  # a second training in one folder
    assert "--resume" in capsys.readouterr().err
    assert train.main([*options, "--resume"]) == 0  # finished: nothing to do

    assert train.main([*options[:-1], "1", "--resume"]) == 2  # other settings than it was started with
    assert "save_steps" in capsys.readouterr().err

    shutil.rmtree(run)
    interrupt(options, after_step=2)
    assert not record(run)["finished"]
    assert train.main([*options, "--resume"]) == 0
    assert record(run)["steps"] == 4
    for key, value in load_file(run / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, straight[key], rtol=1e-4, atol=1e-6)


def interrupt(options: list[str], after_step: int) -> None:
    """Train until the checkpoint of that step is written, and stop there as if the process had been killed."""

    class KilledError(BaseException):
        pass

    class Killer(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == after_step:
                raise KilledError

    make = train.make_trainer

    def make_with_killer(*given: Any) -> Any:
        trainer = make(*given)
        trainer.add_callback(Killer())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_trainer", make_with_killer)
        with pytest.raises(KilledError):
            train.main(options)


def test_a_batch_that_cannot_be_divided_is_an_error(training_folders: TrainingFolders, tmp_path: Path) -> None:
    args = train.parser().parse_args(arguments(training_folders, "milora", tmp_path, "--device-batch", "3"))
    with pytest.raises(ValueError, match="no multiple of 3"):
        train.make_trainer(args, find_start("milora", str(training_folders.pair)))
