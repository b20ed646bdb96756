"""Adapters of original models on the Hub: what is pushed, its card, and a repository as PAIR."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support.families import FAMILIES
from support.family_training import initialize_family, load, load_on_original, model_output, train_model
from support.hub_server import Command, Hub, fetched
from support.marks import wide

from milora_init.hub.model_card import PICTURE, adapter_card
from milora_init.hub.publication import as_published, publication
from milora_init.manifest import require_manifest

Built = Callable[..., Path]
LLAMA = FAMILIES["llama"]
TARGETS = ",".join(LLAMA.targets)
FILES = {"adapter_config.json", "adapter_model.safetensors", "milora_init.json", "README.md", ".gitattributes"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `source`, the rlmo output `out`, and `trained`, which was trained from it."""
    folder = tmp_path_factory.mktemp("made")
    source, out, _ = initialize_family("llama", folder, "float32", method="rlmo", alpha=8)
    train_model(LLAMA, load_on_original(LLAMA, source, out, trainable=True), folder / "trained")
    return folder


@pytest.mark.parametrize("method", ["rlmo", wide("mica")])
def test_init_pushes_an_adapter_that_names_the_original_and_its_commit(
    method: str, hub: Hub, milora: Command, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    for path in (made / "source").iterdir():
        shutil.copy(path, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: llama2\n---\n# Tiny\n")
    commit = hub.publish("tiny/llama", tmp_path / "source")
    arguments = ("--model", "tiny/llama", "--out", "out", "--rank", "4", "--target", TARGETS, "--method", method)
    done = milora(*arguments, "--device", "cpu", "--push-to-hub", "me/adapter", "--json")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/adapter"]
    assert repository.files.keys() == FILES
    config = json.loads(repository.files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/llama", commit)
    card = ModelCard(repository.files["README.md"].decode())
    data = dict(vars(card.data))
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("tiny/llama", "adapter", "llama2")
    text = str(card)
    loading = [
        f'from_pretrained("tiny/llama", dtype="auto", revision="{commit}")', 'from_pretrained(base, "me/adapter", is_',
    ]  # fmt: skip
    number, trained = {"rlmo": ("2606.31813", "A and B"), "mica": ("2604.01694", "A")}[method]
    for part in (*loading, f"arXiv:{number}", f"PEFT trains {trained}.", "Reported by others", "rank 4", "alpha 4"):
        assert part in text, part
    assert ("low_cpu_mem_usage=True" in text) == (method == "mica")
    assert "residual" not in text
    assert str(tmp_path) not in text
    again = milora("push", "out", "me/adapter", "--json")
    assert json.loads(again.stdout)["status"] == "unchanged"
    there = fetched(hub, "me/adapter", tmp_path / "there")
    expected = model_output(LLAMA, load(LLAMA, made / "source"))
    assert torch.equal(model_output(LLAMA, load_on_original(LLAMA, made / "source", there)), expected)


def test_a_local_model_is_named_without_its_folder(hub: Hub, milora: Command, made: Path) -> None:
    done = milora("push", str(made / "out"), "me/adapter")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/adapter"]
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == "source"
    assert str(made).encode() not in b"".join(repository.files.values())
    card = repository.files["README.md"].decode()
    assert "Replace `source` by the place of that model" in card
    published = as_published(require_manifest(made / "out"), "me/adapter", "tried")
    of_branch = adapter_card(published, "me/adapter", "tried")
    assert 'from_pretrained(base, "me/adapter", revision="tried", is_trainable=True)' in of_branch
    assert published.adapter.get("revision") is None  # PEFT would look for the model at it


def test_a_picture_goes_with_the_card(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILORA_PICTURE")
    pushed = publication(made / "out", require_manifest(made / "out"), "me/adapter", None)
    assert pushed.contents[PICTURE].startswith(b"\x89PNG")
    assert f"![Heat maps by layer and module: energy, and time to solve]({PICTURE})" in pushed.card_text


def test_a_changed_file_is_not_pushed(hub: Hub, milora: Command, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = milora("push", "out", "me/adapter")
    assert done.returncode == 1
    assert "adapter_model.safetensors was changed" in done.stderr
    assert "me/adapter" not in hub.repositories or len(hub.repositories["me/adapter"].commits) == 1


def test_every_command_takes_the_repository_and_fetches_what_it_needs(
    hub: Hub, milora: Command, made: Path, tmp_path: Path
) -> None:
    hub.publish("me/out", made / "out")
    repository = hub.repositories["me/out"]
    repository.commit({**repository.files, "notes.bin": b"somebody's"})
    shutil.copytree(made / "trained", tmp_path / "trained")
    trained, model = ("--adapter", "trained"), ("--model", str(made / "source"))
    commands = {
        ("report", "me/out"): {"milora_init.json"},
        ("convert", "me/out", *trained, "--out", "plain"): {"adapter_config.json", "adapter_model.safetensors"},
        ("verify", "me/out", *trained, *model): set(),
        ("merge", "me/out", *trained, *model, "--out", "merged"): set(),
    }
    for command, names in commands.items():
        hub.served.clear()
        done = milora(*command)
        assert done.returncode == 0, (command, done.stderr)
        served = {name.removeprefix("me/out/") for name, count in hub.served.items() if count}
        assert served == names, command
    assert milora("verify", "me/out", HF_HUB_OFFLINE="1").returncode == 0


def test_merge_fetches_the_original_that_the_output_names(
    hub: Hub, milora: Command, made: Path, tmp_path: Path
) -> None:
    first = hub.publish("tiny/llama", made / "source")
    arguments = ("--model", "tiny/llama", "--out", "out", "--rank", "4", "--target", TARGETS, "--method", "rlmo")
    assert milora(*arguments, "--alpha", "8", "--device", "cpu").returncode == 0
    hub.repositories["tiny/llama"].commit(dict.fromkeys(hub.repositories["tiny/llama"].files, b"moved on"))
    done = milora("merge", "out", "--adapter", str(made / "trained"), "--out", "merged", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == {"model": "tiny/llama", "revision": first}
    together = model_output(LLAMA, load_on_original(LLAMA, made / "source", made / "trained"))
    merged = model_output(LLAMA, load(LLAMA, tmp_path / "merged"))
    torch.testing.assert_close(merged, together, rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    pushed = milora("push", "merged", "me/merged")
    assert pushed.returncode == 0, pushed.stderr
    card = hub.repositories["me/merged"].files["README.md"].decode()
    assert "a LoRA adapter was merged into it" in card
    assert "residual" not in card
