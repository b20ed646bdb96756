"""A scan of a model on the Hub, and the picture that is pushed beside a card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.hub_server import Command, Hub

from milora_init import api
from milora_init.hub.model_card import PICTURE
from milora_init.manifest import Manifest

Built = Callable[..., Path]
Start = Callable[..., Manifest]


def test_a_model_on_the_hub_is_scanned_at_one_commit(hub: Hub, milora: Command, checkpoint: Built) -> None:
    source = checkpoint("llama")
    commit = hub.publish("tiny/llama", source)
    done = milora("scan", "tiny/llama", "--rank", "4", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["source"] == {"model": "tiny/llama", "revision": commit}
    here = api.scan(source, rank=4, device="cpu", progress=False)
    assert [weight["s_min"] for weight in found["weights"]] == [weight.s_min for weight in here.weights]


@pytest.mark.wide
def test_a_picture_is_pushed_beside_the_card(
    hub: Hub, milora: Command, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert milora("push", "out", "me/plain").returncode == 0
    assert PICTURE not in hub.repositories["me/plain"].files
    assert PICTURE not in ModelCard(hub.repositories["me/plain"].files["README.md"].decode()).text
    monkeypatch.delenv("MILORA_PICTURE")
    done = milora("push", "out", "me/tiny")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/tiny"]
    assert repository.files[PICTURE].startswith(b"\x89PNG")
    assert f"]({PICTURE})" in ModelCard(repository.files["README.md"].decode()).text
    again = milora("push", "out", "me/tiny", "--json")
    assert json.loads(again.stdout)["status"] == "unchanged"
    assert milora("verify", "me/tiny").returncode == 0
