"""Merge and convert for adapters of original models, against PEFT's own merge and a plain float64 sum."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import architectures, reference
from support.families import FAMILIES, Family
from support.family_training import initialize_family, load, load_on_original, model_output, train, train_model
from support.marks import wide
from support.runs import initialize
from support.tiny_models import contents, edit_json, tensors

from milora_init import api
from milora_init.cli.main import run
from milora_init.errors import CheckpointError, MiloraError, OutputError, PlanError
from milora_init.lora.folder import read_lora
from milora_init.manifest import MANIFEST, Manifest
from milora_init.options import InitOptions
from milora_init.records import read_merged

Built = Callable[..., Path]
Start = Callable[..., Manifest]
TrainedWith = Callable[[str], tuple[Path, Path]]
LLAMA = FAMILIES["llama"]


def trained_output(name: str, folder: Path, method: str, **options: Any) -> tuple[Family, Path, Path, Path]:
    """A family, its original model, an output of the method, and an adapter that was trained from it."""
    family = FAMILIES[name]
    source, out, _ = initialize_family(name, folder, options.pop("dtype", "float32"), method=method, alpha=8, **options)
    trained = train_model(family, load_on_original(family, source, out, trainable=True), folder / "trained")
    return family, source, out, trained


@pytest.fixture(scope="module")
def trained_with(tmp_path_factory: pytest.TempPathFactory) -> TrainedWith:
    """trained_with(method) is an output of one model, and an adapter that was trained from it; tests change neither."""
    folder, made = tmp_path_factory.mktemp("methods"), dict[str, tuple[Path, Path]]()
    source = architectures.save(folder / "source", LLAMA, "float32")

    def get(method: str) -> tuple[Path, Path]:
        if method not in made:
            out, trained = folder / method, folder / f"{method}-trained"
            options = InitOptions(
                model=str(source), out=str(out), method=method, target=LLAMA.targets, rank=4, device=("cpu",)
            )
            if initialize(options).method.writes_base:
                train(LLAMA, out, trained)
            else:
                train_model(LLAMA, load_on_original(LLAMA, source, out, trainable=True), trained)
            made[method] = out, trained
        return made[method]

    return get


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", "rlmo"),
        wide("llama", "mica"),
        ("gpt2", "mica"),
        wide("gpt2", "rlpo"),
        ("mixtral", "rlmo"),
        wide("gemma3", "rlmo"),
    ],
)
def test_merge_and_convert_compute_what_the_trained_adapter_computes(name: str, method: str, tmp_path: Path) -> None:
    family, source, out, trained = trained_output(name, tmp_path, method)
    together = model_output(family, load_on_original(family, source, trained))
    assert float((together - model_output(family, load(family, source))).abs().max()) > 1e-3, "it was not trained"
    merged = api.merge(out, tmp_path / "merged", adapter=trained, progress=False)
    assert not merged.initial
    merged_output, size = model_output(family, load(family, tmp_path / "merged")), float(together.abs().max())
    torch.testing.assert_close(merged_output, together, rtol=1e-4, atol=1e-4 * size)
    converted = api.convert(out, trained, tmp_path / "plain")
    assert {module.rank for module in converted.modules} <= {4, 8}  # not doubled; stacked experts have the sum of two
    plain = PeftModel.from_pretrained(load(family, source), str(tmp_path / "plain"))
    assert torch.equal(model_output(family, plain), together)  # the same factors
    for folder in ("merged", "plain"):
        verdict = api.verify(tmp_path / folder, model=source)
        assert verdict.ok, verdict.findings


def test_a_merged_weight_is_the_float64_sum_rounded_once(tmp_path: Path) -> None:
    _, source, out, trained = trained_output("llama", tmp_path, "rlmo", dtype="bfloat16")
    api.merge(out, tmp_path / "merged", adapter=trained, progress=False)
    before, after, lora = tensors(source), tensors(tmp_path / "merged"), read_lora(trained)
    factors = tensors(trained)
    changed = {f"{module}.weight" for module in lora.modules}
    for name, W in before.items():
        if name not in changed:
            assert torch.equal(after[name], W)
            continue
        module = lora.modules[name.removesuffix(".weight")]
        exact = W.double() + module.scale * factors[module.B].double() @ factors[module.A].double()
        # The product of a 16-bit merge is in float32; its error is 2^-16 of a unit in the last place.
        assert ((exact - after[name].double()).abs() <= 0.501 * reference.ulp(exact, W.dtype)).all(), name


@pytest.mark.parametrize("method", ["rlmo", "mica"])
def test_the_initial_adapter_gives_the_original_again(
    method: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint("llama", "bfloat16")
    start(source, method=method)
    merged = api.merge(tmp_path / "out", tmp_path / "merged", model=source, progress=False)
    assert merged.initial
    assert merged.bit_equal == merged.entries
    assert merged.inputs["base"] == "original model"
    original, again = contents(source), contents(tmp_path / "merged")
    del again["milora_merge.json"], original["README.md"]
    assert again == original
    assert api.merge(tmp_path / "out", tmp_path / "merged", progress=False).unchanged


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_original_is_merged_into_safetensors(
    shards: int, pickled: Built, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    start(pickled(shards), method="rlmo")
    api.merge(tmp_path / "out", tmp_path / "merged", progress=False)
    before, after = tensors(checkpoint("llama")), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model_output(LLAMA, load(LLAMA, tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists() == (shards > 1)


def test_a_rank_cut_is_the_best_one_of_each_module(trained_with: TrainedWith, tmp_path: Path) -> None:
    out, trained = trained_with("rlmo")
    converted = api.convert(out, trained, tmp_path / "plain", rank=2)
    lora, cut = read_lora(trained), read_lora(tmp_path / "plain")
    before, after = tensors(trained), tensors(tmp_path / "plain")
    for module in converted.modules:
        was, now = lora.modules[module.module], cut.modules[module.module]
        update = was.scale * before[was.B].double() @ before[was.A].double()
        s = torch.linalg.svdvals(update)
        lost = float((update - now.scale * after[now.B].double() @ after[now.A].double()).norm())
        assert lost == pytest.approx(float(s[2:].norm()), rel=1e-4, abs=1e-6 * float(s.norm()))
        assert module.lost == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4, abs=1e-6)


def test_a_second_merge_into_one_folder_must_be_the_same_request(trained_with: TrainedWith, tmp_path: Path) -> None:
    out, trained = trained_with("rlmo")
    api.merge(out, tmp_path / "merged", adapter=trained, progress=False)
    with pytest.raises(OutputError, match="another request"):
        api.merge(out, tmp_path / "merged", progress=False)
    record = read_merged(tmp_path / "merged")
    assert record is not None
    assert record.adapter == str(trained)


def test_another_original_model_is_refused(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    source = checkpoint("llama")
    start(source, method="rlmo")
    shutil.copytree(source, tmp_path / "other")
    shard = min((tmp_path / "other").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what this output was made from"):
        api.merge(tmp_path / "out", tmp_path / "merged", model=tmp_path / "other", progress=False)
    assert not (tmp_path / "merged").exists()


def test_an_original_that_was_moved_is_named_with_model(own: Built, start: Start, tmp_path: Path) -> None:
    source = own("llama")
    start(source, method="rlmo")
    source.rename(tmp_path / "moved")
    with pytest.raises(MiloraError, match=r"own: no such folder; the original model was there"):
        api.merge(tmp_path / "out", tmp_path / "merged", progress=False)
    api.merge(tmp_path / "out", tmp_path / "merged", model=tmp_path / "moved", progress=False)


@pytest.mark.parametrize(
    ("made", "other"),
    [
        ("rlmo", "milora"), wide("rlmo", "olora-tail"), wide("rlmo", "pissa"), ("rlmo", "rlpo"), wide("rlmo", "mica"),
        wide("mica", "rlmo"), ("mica", "milora"), ("milora", "rlmo"), ("olora-tail", "rlmo"),
        wide("olora-tail", "mica"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_method_is_refused(
    made: str, other: str, trained_with: TrainedWith, tmp_path: Path
) -> None:
    """Also where its config names a path that is not here, so that only the factors tell."""
    out = trained_with(made)[0]
    trained = shutil.copytree(trained_with(other)[1], tmp_path / "trained")
    for path in ("as saved", "/nowhere/model"):
        if path != "as saved":
            edit_json(trained / "adapter_config.json", base_model_name_or_path=path)
        with pytest.raises(PlanError) as caught:
            api.merge(out, tmp_path / "merged", adapter=trained, progress=False)
        assert "base" not in caught.value.hint
        with pytest.raises(PlanError):
            api.convert(out, trained, tmp_path / "plain")
    assert not api.verify(out, adapter=trained).ok
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("words", [["merge", "--out", "merged"], ["report"]])
def test_a_recorded_folder_that_is_not_there_is_asked_for_and_not_looked_for_on_the_hub(
    words: list[str], trained_with: TrainedWith, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of a model that was given by a relative path, seen from another folder."""
    monkeypatch.chdir(tmp_path)
    made, trained = trained_with("rlmo")
    shutil.copytree(made, "out")
    source = json.loads(Path("out", MANIFEST).read_text())["source"]
    edit_json(Path("out", MANIFEST), source={**source, "model": "models/mine"})
    assert run([words[0], "out", "--adapter", str(trained), *words[1:]]) == 2
    said = capsys.readouterr().err
    assert "models/mine: no such folder; the original model was there" in said
    assert "hint: name the folder that it is in now: --model DIR" in said
    assert run([words[0], "out", "--adapter", str(trained), "--model", source["model"], *words[1:]]) == 0


def test_the_record_names_no_residual(trained_with: TrainedWith, tmp_path: Path) -> None:
    out, trained = trained_with("mica")
    converted = api.convert(out, trained, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True  # PEFT freezes no B of a plain LoRA
    assert converted.inputs["base"] == "original model"
