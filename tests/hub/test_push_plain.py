"""push of merged models and converted adapters: cards, records without local paths, guards, and no second commit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support.hub_server import Command, Hub, client, fetched
from support.marks import mostly_wide
from support.runs import make_outputs
from support.training import load, logits, train

from milora_init.api import merge, verify
from milora_init.hub.publication import publication
from milora_init.records import MergeResult, read_merged

Built = Callable[..., Path]
NAMES = ("out", "merged", "again", "plain")


@pytest.fixture(scope="module")
def built(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    source = Path(shutil.copytree(checkpoint("llama"), folder / "source"))
    (source / "README.md").write_text("---\nlicense: llama2\nlanguage: [en]\n---\n# Tiny\n")
    make_outputs(source, folder, "out")
    merge(folder / "out", folder / "again", progress=False)
    return folder


@pytest.fixture
def work(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "work"))


@pytest.fixture
def milora(hub: Hub, work: Path) -> Command:
    return client(hub, work)


@pytest.mark.parametrize(("name", "code"), [("merged", "merged"), ("again", "merged"), ("plain", "converted")])
def test_a_pushed_output_is_whole_and_names_no_local_path(
    name: str, code: str, hub: Hub, milora: Command, work: Path, built: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in (work / name).iterdir()}
    done = milora("push", name, f"me/{name}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
    assert {path: path.read_bytes() for path in (work / name).iterdir()} == before
    everything = b"".join(hub.repositories[f"me/{name}"].files.values())
    for path in (built, work, tmp_path):
        assert str(path).encode() not in everything
    assert hub.token.encode() not in everything
    there = fetched(hub, f"me/{name}", tmp_path / "there")
    verdict = verify(there, model=built / "source")
    assert (verdict.ok, verdict.code) == (True, code), verdict.findings
    assert verdict.source is not None
    assert verdict.source["model"] == "source"
    again = milora("verify", f"me/{name}", "--json")
    assert json.loads(again.stdout)["code"] == code
    if name == "plain":
        torch.testing.assert_close(logits(load(built / "source", there)), logits(load(built / "source", work / name)))
    else:
        torch.testing.assert_close(logits(load(there)), logits(load(work / name)))


@pytest.mark.parametrize("name", mostly_wide(NAMES, *NAMES[:2]))
def test_the_same_push_again_makes_no_commit(name: str, hub: Hub, milora: Command) -> None:
    first = json.loads(milora("push", name, "me/x", "--json").stdout)
    repository = hub.repositories["me/x"]
    repository.commit({**repository.files, "README.md": b"edited on the Hub", "notes.txt": b"somebody's"})
    commits = len(repository.commits)
    second = json.loads(milora("push", name, "me/x", "--json").stdout)
    assert (first["status"], second["status"], second["files"]) == ("done", "unchanged", 0)
    assert second["commit"] == repository.commits[-1][0]
    assert len(repository.commits) == commits
    assert "has this output already" in milora("push", name, "me/x").stdout


@pytest.mark.parametrize("name", mostly_wide(NAMES, *NAMES[:2]))
def test_a_file_that_was_changed_in_the_repository_is_pushed_again(name: str, hub: Hub, milora: Command) -> None:
    assert milora("push", name, "me/x").returncode == 0
    repository = hub.repositories["me/x"]
    right = dict(repository.files)
    small = "lora/adapter_config.json" if name == "out" else "adapter_config.json" if name == "plain" else "config.json"
    large = min(file for file in right if file.endswith(".safetensors"))
    for changed, missing in ((small, large), (large, small)):
        repository.commit({n: d + b" " * (n == changed) for n, d in right.items() if n != missing})
        done = milora("push", name, "me/x", "--json")
        assert json.loads(done.stdout)["status"] == "done", done.stdout
        assert {file: repository.files[file] for file in (small, large)} == {n: right[n] for n in (small, large)}


def test_the_cards_name_the_original_and_how_to_load(hub: Hub, milora: Command, work: Path) -> None:
    commit = hub.publish("tiny/llama", work / "source")
    assert milora("tiny/llama", "--out", "pair", "--rank", "4", "--device", "cpu").returncode == 0
    train(work / "pair", work / "tuned", steps=1)
    assert milora("merge", "pair", "--adapter", "tuned", "--out", "whole").returncode == 0
    assert milora("merge", "pair", "--out", "back").returncode == 0
    assert milora("convert", "pair", "--adapter", "tuned", "--out", "lora-only").returncode == 0
    assert json.loads((work / "whole" / "milora_merge.json").read_text())["revision"] == commit
    cards = {}
    for name in ("whole", "back", "lora-only"):
        done = milora("push", name, f"me/{name}")
        assert done.returncode == 0, done.stderr
        cards[name] = ModelCard(hub.repositories[f"me/{name}"].files["README.md"].decode())
        data = dict(vars(cards[name].data))
        assert (data["base_model"], data["license"], data["language"]) == ("tiny/llama", "llama2", ["en"])
        assert commit in cards[name].text
        assert f'from_pretrained("me/{name}"' in cards[name].text.replace("base, ", "")
    relations = {name: vars(card.data)["base_model_relation"] for name, card in cards.items()}
    assert relations == {"whole": "finetune", "back": "finetune", "lora-only": "adapter"}
    assert "It is a plain model" in cards["whole"].text
    assert "again, up to rounding" in cards["back"].text
    assert vars(cards["lora-only"].data)["library_name"] == "peft"
    assert "It is a plain LoRA of the original model" in cards["lora-only"].text
    assert 'from_pretrained("tiny/llama"' in cards["lora-only"].text
    config = json.loads(hub.repositories["me/lora-only"].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny/llama"


def test_a_local_model_is_no_base_model(hub: Hub, milora: Command) -> None:
    for name in ("merged", "plain"):
        assert milora("push", name, f"me/{name}").returncode == 0
        card = ModelCard(hub.repositories[f"me/{name}"].files["README.md"].decode())
        assert "base_model" not in {key for key, value in vars(card.data).items() if value}
        assert "a local model" in card.text.lower()
        assert vars(card.data)["license"] == "llama2"
    config = json.loads(hub.repositories["me/plain"].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "source"


def test_one_kind_of_output_replaces_another_as_a_whole(hub: Hub, milora: Command, tmp_path: Path) -> None:
    for number, (name, code) in enumerate(
        (("out", "pair"), ("plain", "converted"), ("merged", "merged"), ("out", "pair"))
    ):
        if number:
            refused = milora("push", name, "me/x")
            assert refused.returncode == 1
            assert "me/x holds another output of milora-init" in refused.stderr
        assert milora("push", name, "me/x", "--overwrite").returncode == 0
        there = fetched(hub, "me/x", tmp_path / str(number))
        assert verify(there).code == code
        assert len([file for file in hub.repositories["me/x"].files if file.startswith("milora_")]) == 1


@pytest.mark.parametrize("name", ["merged", "plain"])
def test_the_guards_are_those_of_a_pair(name: str, hub: Hub, milora: Command, work: Path) -> None:
    other = work / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"somebody's")
    hub.publish("me/other", other)
    refused = milora("push", name, "me/other")
    assert refused.returncode == 1
    assert "me/other exists and is not an output of milora-init" in refused.stderr
    weights = min((work / name).glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = milora("push", name, "me/x")
    assert changed.returncode == 1
    assert f"{weights.name} was changed" in changed.stderr
    assert "me/x" not in hub.repositories
    weights.unlink()
    weights.symlink_to(work / "source" / "config.json")
    linked = milora("push", name, "me/x")
    assert linked.returncode == 1
    assert "leads out of" in linked.stderr
    small = work / name / ("adapter_config.json" if name == "plain" else "config.json")
    shutil.copy(work / "out" / "config.json", small)
    assert milora("push", name, "me/x").returncode == 1
    assert "me/x" not in hub.repositories


def test_what_is_unfinished_or_foreign_is_refused(hub: Hub, milora: Command, work: Path) -> None:
    (work / "merged" / "milora_merge.json").unlink()
    foreign = milora("push", "merged", "me/x")
    assert foreign.returncode == 1
    assert "merged has no milora_init.json: it is no finished output of milora-init" in foreign.stderr
    (work / "merged" / ".milora-init").mkdir()
    unfinished = milora("push", "merged", "me/x")
    assert unfinished.returncode == 1
    assert "merged is an unfinished output" in unfinished.stderr
    assert not hub.repositories


def test_a_pushed_record_names_a_pair_on_the_hub_and_no_folder(work: Path) -> None:
    merged = read_merged(work / "merged")
    assert merged is not None
    for pair, name in (("me/pair@v2", "me/pair@v2"), ("/home/me/pair", "pair"), ("pair", "pair")):
        published = publication(work / "merged", dataclasses.replace(merged, pair=pair), "me/merged", None)
        assert isinstance(published.output, MergeResult)
        assert published.output.pair == name
