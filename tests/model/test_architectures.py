"""Every architecture in docs/models.md: the pair loads with its Auto class, computes the source, and trains."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import architectures
from support.families import FAMILIES, Family
from support.runs import initialize
from support.tiny_models import as_pickles, tensors
from torch import Tensor

from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import describe, make_plan
from milora_init.run.shard import ShardWriter
from milora_init.verification.verify import verify

RANK = 4
Made = Callable[..., tuple[Path, Path, Manifest]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(name, dtype="float32") is a family's source, its output and the manifest."""
    done: dict[tuple[str, str], tuple[Path, Path, Manifest]] = {}

    def get(name: str, dtype: str = "float32") -> tuple[Path, Path, Manifest]:
        if (name, dtype) not in done:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            source = architectures.save(folder / "source", FAMILIES[name], dtype)
            out = folder / "out"
            options = InitOptions(
                model=str(source), out=str(out), rank=RANK, target=FAMILIES[name].targets, device=("cpu",)
            )
            done[name, dtype] = source, out, initialize(options)
        return done[name, dtype]

    return get


def load(family: Family, folder: Path) -> Any:
    model: Any = getattr(transformers, family.auto).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def load_pair(family: Family, out: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT uses the patterns of fused parameters, but warns that they match no module.
        warnings.filterwarnings("ignore", "The following .*_pattern keys did not match any targeted module")
        return peft.PeftModel.from_pretrained(load(family, out), str(out), subfolder="lora", is_trainable=True)


def model_output(family: Family, model: Any) -> Tensor:
    with torch.no_grad():
        said: Tensor = model.eval()(**architectures.model_inputs(family))[0]
    return said.double()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pair_computes_what_the_source_computes(name: str, made: Made) -> None:
    family = FAMILIES[name]
    source, out, _ = made(name)
    truth = model_output(family, load(family, source))
    pair = load_pair(family, out)
    with pair.disable_adapter():
        without = relative(model_output(family, pair), truth)
    eps = torch.finfo(torch.float32).eps
    assert relative(model_output(family, pair), truth) < 100 * eps
    assert without > 1000 * eps  # otherwise the comparison would not test the adapter


@pytest.mark.parametrize("name", FAMILIES)
def test_every_adapter_tensor_is_loaded_as_written_and_is_all_that_trains(name: str, made: Made) -> None:
    family = FAMILIES[name]
    _, out, _ = made(name)
    written = load_file(out / "lora" / "adapter_model.safetensors")
    pair = load_pair(family, out)
    loaded = peft.get_peft_model_state_dict(pair)
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[key], written[key]) for key in written)
    trainable = [name for name, p in pair.named_parameters() if p.requires_grad]
    assert len(trainable) == len(written)
    assert all("lora_" in name for name in trainable)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_moves_the_adapter_and_nothing_else(name: str, made: Made) -> None:
    family = FAMILIES[name]
    _, out, _ = made(name)
    pair = load_pair(family, out).train()
    before = {key: p.detach().clone() for key, p in pair.named_parameters()}
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=1.0)
    pair(**architectures.model_inputs(family))[0].square().mean().backward()
    optimizer.step()
    moved = {key for key, p in pair.named_parameters() if not torch.equal(p, before[key])}
    assert moved
    assert all("lora_" in key for key in moved)
    unchanged = {key for key, p in pair.named_parameters() if p.requires_grad} - moved
    assert not unchanged, "these received no gradient"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_manifest_record_names_the_source_tensor_of_its_module(name: str, made: Made) -> None:
    """In the loaded source, the module of a record holds the tensor that the record names."""
    family = FAMILIES[name]
    source, _, manifest = made(name)
    disk = tensors(source)
    parameters = dict(load(family, source).named_parameters())
    for record in manifest.weights:
        stored = disk[record.tensor] if record.row is None else disk[record.tensor][record.row]
        if expert := record.expert:
            held = parameters[expert.parameter][expert.index]
            top = expert.part * record.shape[0]
            held = held if record.transposed else held[top : top + record.shape[0]]
        else:
            held = parameters[f"{record.module}.weight"]
        assert torch.equal(held, stored), record.module


@pytest.mark.parametrize("name", FAMILIES)
def test_in_the_published_dtype_the_output_passes_verify_against_its_source(name: str, made: Made) -> None:
    """verify checks residuals to half a unit in the last place, solves every component again, and compares the rest."""
    source, out, manifest = made(name, FAMILIES[name].stored)
    assert {record.dtype for record in manifest.weights} == {FAMILIES[name].stored}
    verdict = verify(str(out), model=str(source), all_components=True)
    assert verdict.ok, verdict.differences


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_in_pickled_shards_are_initialized_in_another_dtype(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = as_pickles(architectures.save(tmp_path / "plain", family, "bfloat16"), tmp_path / "source", shards=3)
    out = tmp_path / "out"
    initialize(
        InitOptions(model=str(source), out=str(out), rank=RANK, target=family.targets, dtype="float32", device=("cpu",))
    )
    assert verify(str(out), model=str(source), all_components=True).ok
    truth = model_output(family, load(family, source))
    assert relative(model_output(family, load_pair(family, out)), truth) < 100 * torch.finfo(torch.float32).eps


def test_the_experts_of_one_layer_are_in_several_shards(made: Made) -> None:
    source, _, manifest = made("mixtral")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    shards: dict[str, set[str]] = {}
    for record in manifest.weights:
        shards.setdefault(record.key, set()).add(index[record.tensor])
    assert any(len(files) > 1 for files in shards.values())  # the tests above check each expert's values


def test_an_interrupted_run_with_experts_is_resumed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, uninterrupted, _ = made("mixtral")
    real = ShardWriter.finish
    finished: list[Any] = []

    def stop(self: Any, *cancelled: Any) -> Any:
        if len(finished) == 4:
            raise KeyboardInterrupt
        finished.append(self)
        return real(self, *cancelled)

    options = InitOptions(
        model=str(source), out=str(tmp_path / "out"), rank=RANK, target=FAMILIES["mixtral"].targets, device=("cpu",)
    )
    monkeypatch.setattr(ShardWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        initialize(options)
    monkeypatch.setattr(ShardWriter, "finish", real)
    initialize(options)
    for file in ("model-00003-of-*.safetensors", "lora/adapter_model.safetensors"):
        (one,), (other,) = (list(folder.glob(file)) for folder in (uninterrupted, tmp_path / "out"))
        assert one.read_bytes() == other.read_bytes()


def test_the_plan_of_a_model_with_experts_states_its_cost_and_requirements(tmp_path: Path) -> None:
    source = architectures.save(tmp_path, FAMILIES["mixtral"], "bfloat16")
    options: dict[str, Any] = {"model": str(source), "out": "out", "rank": RANK}
    left = describe(make_plan(InitOptions(**options, target=("q_proj",)), source), 1, 0.0)
    assert left["warnings"] == ["the 24 matrices of the experts are left as they are; --target experts adapts them too"]
    taken = describe(make_plan(InitOptions(**options, target=("q_proj", "experts"), dropout=0.05), source), 1, 0.0)
    (notice,) = taken["warnings"]
    assert "training needs PEFT >= 0.19.1, and lora_dropout is 0 instead of 0.05" in notice
    assert len(taken["weights"]) == len(left["weights"]) + 24
    assert taken["solve_flops"] > left["solve_flops"]
