"""verify for adapters of original models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.family_training import initialize_family, load_on_original, train_model
from support.tiny_models import TARGETS, edit_inputs, edit_json, zero_rows

from milora_init import api
from milora_init.manifest import MANIFEST, Manifest

Built = Callable[..., Path]
Start = Callable[..., Manifest]
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(("method", "kind"), [("rlmo", "gpt2"), ("rlpo", "llama"), ("mica", "llama"), ("mica", "gpt2")])
def test_an_output_fits_its_model_and_its_files(
    method: str, kind: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    start(checkpoint(kind, "bfloat16"), method=method, target=TARGETS[kind])
    verdict = api.verify(tmp_path / "out", model=checkpoint(kind, "bfloat16"), all_components=True)
    assert verdict.code == "adapter", verdict.findings
    assert verdict.ok
    assert verdict.checked["components"] == "all"


@pytest.mark.parametrize(("method", "name"), [("rlmo", "llama"), ("mica", "gpt2")])
def test_an_adapter_that_was_trained_from_it_fits(method: str, name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, out, _ = initialize_family(name, tmp_path, "float32", method=method)
    trained = train_model(family, load_on_original(family, source, out, trainable=True), tmp_path / "trained")
    verdict = api.verify(out, adapter=trained, model=source)
    assert verdict.code == "trained_adapter", verdict.findings
    config = trained / "adapter_config.json"
    edit_json(config, base_model_name_or_path="/elsewhere/model")  # the model was moved
    moved = api.verify(out, adapter=trained)
    assert moved.ok
    assert any("/elsewhere/model" in text for text in moved.notes)


def damage_shape(out: Path) -> None:
    weights = load_file(out / WEIGHTS)
    name = min(weights)
    weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, out / WEIGHTS)


def change_values(out: Path) -> None:
    """Another space of the same shape, with the hash and the size that the manifest records."""
    weights = load_file(out / WEIGHTS)
    for name in weights:
        if "lora_A" in name:
            weights[name] = torch.linalg.qr(torch.randn(weights[name].T.shape)).Q.T.contiguous()
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})


def train_in_place(out: Path) -> None:
    weights = load_file(out / WEIGHTS)
    save_file({name: value + 0.1 for name, value in weights.items()}, out / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda out: (out / WEIGHTS).unlink(), "damaged"),
        (lambda out: (out / "adapter_config.json").unlink(), "damaged"),
        (lambda out: edit_json(out / "adapter_config.json", lora_alpha=99), "damaged"),
        (lambda out: edit_json(out / "adapter_config.json", init_lora_weights="mica"), "damaged"),
        (lambda out: (out / "model.safetensors").write_bytes(b"x"), "damaged"),
        (damage_shape, "damaged"),
        (change_values, "damaged"),
        (train_in_place, "replaced_adapter"),
    ],
)
def test_what_was_changed_is_found(
    change: Callable[[Path], object], code: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    start(checkpoint("llama"), method="rlmo")
    change(tmp_path / "out")
    verdict = api.verify(tmp_path / "out")
    assert verdict.code == code
    assert not verdict.ok
    assert all(finding.hint for finding in verdict.differences)
    if code == "replaced_adapter":  # it equals what is there, which is not the initial one
        of_itself = api.verify(tmp_path / "out", adapter=tmp_path / "out")
        assert "was not trained" not in " ".join(finding.what for finding in of_itself.findings)
    assert not any(re.search(r"\b(base|pair)\b", f"{found.what} {found.hint}") for found in verdict.findings)


def test_other_directions_with_a_right_record_are_found_with_the_model(
    start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    from milora_init.checkpoint.hashing import sha256

    out = tmp_path / "out"
    start(checkpoint("llama"), method="rlmo")
    change_values(out)
    manifest = json.loads((out / MANIFEST).read_text())
    edit_json(out / MANIFEST, hashes={**manifest["hashes"], WEIGHTS: sha256(out / WEIGHTS)})
    assert api.verify(out).ok
    verdict = api.verify(out, model=checkpoint("llama"), all_components=True)
    assert verdict.code == "damaged"
    assert "off the `min` singular directions" in verdict.differences[0].what


def test_a_manifest_that_claims_another_method_is_found(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama"), method="rlmo")
    edit_inputs(tmp_path / "out" / MANIFEST, method="rlpo", mode="max")
    assert api.verify(tmp_path / "out", model=checkpoint("llama"), all_components=True).code == "damaged"


def test_another_model_is_told_apart(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama"), method="rlmo")
    assert api.verify(tmp_path / "out", model=checkpoint("llama", "bfloat16")).code == "other_model"


def test_the_directions_of_a_singular_weight_are_verified(start: Start, own: Built, tmp_path: Path) -> None:
    source = own("llama")
    zero_rows(source, "q_proj", slice(5, 12))  # seven singular values of 32 are zero
    for method in ("rlmo", "mica"):
        start(source, method=method, target=("q_proj",), out=str(tmp_path / method))
        verdict = api.verify(tmp_path / method, model=source, all_components=True)
        assert verdict.ok, verdict.findings
