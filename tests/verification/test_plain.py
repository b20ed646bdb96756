"""verify on merged models and converted adapters: files against the record, tensors against the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.marks import wide
from support.runs import initialize
from support.tiny_models import TARGETS
from support.training import train

from milora_init.api import convert, merge, verify
from milora_init.checkpoint.hashing import sha256
from milora_init.cli.main import run
from milora_init.errors import UsageError
from milora_init.options import InitOptions
from milora_init.records import MERGED
from milora_init.verification.verdict import Verdict

Built = Callable[..., Path]


def build(folder: Path, source: Path, dtype: str = "auto", target: tuple[str, ...] | None = None) -> Path:
    options = InitOptions(
        model=str(source), out=str(folder / "out"), rank=4, dtype=dtype, device=("cpu",), target=target
    )
    initialize(options)
    train(folder / "out", folder / "trained", steps=1)
    merge(folder / "out", folder / "merged", adapter=folder / "trained", progress=False)
    merge(folder / "out", folder / "again", progress=False)
    convert(folder / "out", folder / "trained", folder / "plain")
    return folder


@pytest.fixture(scope="module")
def outputs(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("outputs"), checkpoint("llama"))


@pytest.fixture
def own_outputs(outputs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(outputs, tmp_path / "outputs"))


def require(verdict: Verdict, code: str, *parts: str) -> None:
    assert verdict.code == code, verdict.findings
    assert verdict.ok == (not parts)
    for part in parts:
        assert [d for d in verdict.differences if part in f"{d.where}: {d.what}"], (part, verdict.differences)


@pytest.mark.parametrize(("name", "code"), [("merged", "merged"), ("again", "merged"), ("plain", "converted")])
def test_an_output_as_it_was_written_is_what_it_is(name: str, code: str, outputs: Path, checkpoint: Built) -> None:
    verdict = verify(outputs / name)
    require(verdict, code)
    assert verdict.compared == f"{verdict.checked['files']} files with the record"
    content = json.loads(json.dumps(verdict.to_json()))
    assert (content["command"], content["status"], content["code"]) == ("verify", "ok", code)
    assert content["source"]["model"] == str(checkpoint("llama"))
    assert content["fingerprint"]
    require(verify(outputs / name, model=checkpoint("llama")), code)


@pytest.mark.parametrize(
    ("kind", "source_dtype", "dtype"),
    [
        ("llama", "bfloat16", "auto"), wide("llama", "float16", "auto"), wide("llama", "float16", "bfloat16"),
        ("gpt2", "float32", "bfloat16"),
    ],
)  # fmt: skip
def test_the_initial_merge_is_the_original_up_to_rounding(
    kind: str, source_dtype: str, dtype: str, checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint(kind, source_dtype)
    build(tmp_path, source, dtype, TARGETS[kind])
    verdict = verify(tmp_path / "again", model=source)
    require(verdict, "merged")
    assert "tensors with " in verdict.compared
    assert not verdict.notes
    # A trained merge that calls itself initial is farther away than rounding explains.
    record = json.loads((tmp_path / "merged" / MERGED).read_text())
    (tmp_path / "merged" / MERGED).write_text(json.dumps(record | {"initial": True}))
    require(verify(tmp_path / "merged", model=source), "damaged_merged", "rounding explains")


def test_the_tensors_of_a_trained_merge_that_were_not_adapted_are_compared(
    own_outputs: Path, checkpoint: Built
) -> None:
    folder = own_outputs / "merged"
    verdict = verify(folder, model=checkpoint("llama"))
    require(verdict, "merged")
    assert "a trained adapter was merged" in verdict.notes[0]
    name = next(path for path in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in load_file(path))
    tensors = load_file(name)
    tensors["model.norm.weight"] = torch.nextafter(tensors["model.norm.weight"], torch.tensor(9.0))
    save_file(tensors, name, metadata={"format": "pt"})
    require(verify(folder), "damaged_merged", f"{name.name}: ")
    record = json.loads((folder / MERGED).read_text())
    record["files"][name.name], record["hashes"][name.name] = name.stat().st_size, sha256(name)
    (folder / MERGED).write_text(json.dumps(record))
    require(verify(folder), "merged")
    require(verify(folder, model=checkpoint("llama")), "damaged_merged", "model.norm.weight: not adapted")


@pytest.mark.parametrize(("name", "code"), [("merged", "damaged_merged"), ("plain", "damaged_converted")])
def test_what_was_changed_is_named(name: str, code: str, own_outputs: Path, checkpoint: Built) -> None:
    folder = own_outputs / name
    weights = min(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    require(verify(folder), code, f"{weights.name}: its SHA-256 is not the one in the record")
    require(verify(folder, model=checkpoint("llama")), code, weights.name)
    weights.write_bytes(content[:-1])
    require(verify(folder), code, f"{weights.name}: {len(content) - 1} bytes, the record says {len(content)}")
    weights.unlink()
    require(verify(folder), code, f"{weights.name}: missing")
    assert run(["verify", str(folder), "--quiet"]) == 1


@pytest.mark.parametrize("name", ["merged", "plain"])
def test_a_link_out_of_the_folder_and_another_file_of_weights_are_named(name: str, own_outputs: Path) -> None:
    folder = own_outputs / name
    code = "damaged_merged" if name == "merged" else "damaged_converted"
    weights = min(folder.glob("*.safetensors"))
    weights.rename(own_outputs / "elsewhere")
    weights.symlink_to(own_outputs / "elsewhere")
    require(verify(folder), code, "leads out of")
    weights.unlink()
    (own_outputs / "elsewhere").rename(weights)
    require(verify(folder), "merged" if name == "merged" else "converted")
    (folder / "pytorch_model.bin").write_bytes(b"")
    require(verify(folder), code, "pytorch_model.bin: not a file of this")


def test_another_model_is_named(outputs: Path, checkpoint: Built) -> None:
    for name in ("merged", "plain"):
        require(verify(outputs / name, model=checkpoint("llama", "bfloat16")), "other_model", "another model")


def test_a_recorded_folder_is_not_looked_for_on_the_hub(own_outputs: Path) -> None:
    record = own_outputs / "merged" / MERGED
    record.write_text(json.dumps({**json.loads(record.read_text()), "model": "models/mine"}))
    with pytest.raises(UsageError, match="models/mine: no such folder; the original model was there"):
        verify(own_outputs / "merged", model="models/mine")


def test_what_makes_no_sense_is_a_usage_error(outputs: Path, checkpoint: Built, tmp_path: Path) -> None:
    for name in ("merged", "plain"):
        with pytest.raises(UsageError, match=r"is a .*: --adapter is for the pair that it was made from"):
            verify(outputs / name, adapter=outputs / "trained")
        with pytest.raises(UsageError, match=r"is a .*: --all is for the pair"):
            verify(outputs / name, model=checkpoint("llama"), all_components=True)
    alone = shutil.copytree(outputs / "out" / "lora", tmp_path / "lora")
    convert(alone, outputs / "trained", tmp_path / "plain", model="me/model")
    require(verify(tmp_path / "plain"), "converted")
    with pytest.raises(UsageError, match="nothing says which original model it is for"):
        verify(tmp_path / "plain", model=checkpoint("llama"))
