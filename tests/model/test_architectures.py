"""Every architecture in docs/models.md: the pair loads with its Auto class, computes the source, and trains."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import architectures
from support.families import FAMILIES, UNLIKE, Family
from support.marks import mostly_wide, wide
from support.runs import initialize
from support.tiny_models import as_pickles, tensors
from torch import Tensor

from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import describe, make_plan
from milora_init.run.shard import ShardWriter
from milora_init.verification.verify import verify

RANK = 4
Made = tuple[Family, Path, Path, Manifest]


def make(name: str, folder: Path, dtype: str) -> Made:
    """A family, its source, its output and the manifest."""
    family, out = FAMILIES[name], folder / "out"
    source = architectures.save(folder / "source", family, dtype)
    options = InitOptions(model=str(source), out=str(out), rank=RANK, target=family.targets, device=("cpu",))
    return family, source, out, initialize(options)


@pytest.fixture(scope="module", params=mostly_wide(FAMILIES, *UNLIKE))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Each family in float32. All tests of a family run one after another, and change neither of the folders."""
    return make(request.param, tmp_path_factory.mktemp("family"), "float32")


@pytest.fixture(scope="module")
def original(made: Made) -> Any:
    """The loaded source; tests do not change it."""
    return load(made[0], made[1])


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


def test_the_pair_computes_what_the_source_computes_with_the_adapter_as_written(made: Made, original: Any) -> None:
    family, _, out, _ = made
    truth = model_output(family, original)
    pair = load_pair(family, out)
    with pair.disable_adapter():
        without = relative(model_output(family, pair), truth)
    eps = torch.finfo(torch.float32).eps
    assert relative(model_output(family, pair), truth) < 100 * eps
    assert without > 1000 * eps  # otherwise the comparison would not test the adapter
    written, loaded = load_file(out / "lora" / "adapter_model.safetensors"), peft.get_peft_model_state_dict(pair)
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[key], written[key]) for key in written)


def test_a_training_step_moves_every_tensor_of_the_adapter_and_nothing_else(made: Made) -> None:
    family, _, out, _ = made
    pair = load_pair(family, out).train()
    before = {key: p.detach().clone() for key, p in pair.named_parameters()}
    trainable = {key for key, p in pair.named_parameters() if p.requires_grad}
    assert len(trainable) == len(load_file(out / "lora" / "adapter_model.safetensors"))
    assert all("lora_" in key for key in trainable)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=1.0)
    pair(**architectures.model_inputs(family))[0].square().mean().backward()
    optimizer.step()
    moved = {key for key, p in pair.named_parameters() if not torch.equal(p, before[key])}
    assert moved == trainable


def test_every_manifest_record_names_the_source_tensor_of_its_module(made: Made, original: Any) -> None:
    """In the loaded source, the module of a record holds the tensor that the record names."""
    _, source, _, manifest = made
    disk = tensors(source)
    parameters = dict(original.named_parameters())
    for record in manifest.weights:
        stored = disk[record.tensor] if record.row is None else disk[record.tensor][record.row]
        if expert := record.expert:
            held = parameters[expert.parameter][expert.index]
            top = expert.part * record.shape[0]
            held = held if record.transposed else held[top : top + record.shape[0]]
        else:
            held = parameters[f"{record.module}.weight"]
        assert torch.equal(held, stored), record.module


@pytest.mark.parametrize("name", mostly_wide(FAMILIES, "llama", "gpt2", "mixtral", "gpt_oss"))
def test_in_the_published_dtype_the_output_passes_verify_against_its_source(name: str, tmp_path: Path) -> None:
    """verify checks residuals to half a unit in the last place, solves every component again, and compares the rest."""
    family, source, out, manifest = make(name, tmp_path, FAMILIES[name].stored)
    assert {record.dtype for record in manifest.weights} == {family.stored}
    verdict = verify(str(out), model=str(source), all_components=True)
    assert verdict.ok, verdict.differences


@pytest.mark.parametrize("name", [wide("mixtral"), "gpt_oss"])
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


def test_an_interrupted_run_with_the_experts_of_a_layer_in_several_shards_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, source, uninterrupted, manifest = make("mixtral", tmp_path / "whole", "float32")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    shards: dict[str, set[str]] = {}
    for record in manifest.weights:
        shards.setdefault(record.key, set()).add(index[record.tensor])
    assert any(len(files) > 1 for files in shards.values())  # the tests above check each expert's values
    real = ShardWriter.finish
    finished: list[Any] = []

    def stop(self: Any, *cancelled: Any) -> Any:
        if len(finished) == 4:
            raise KeyboardInterrupt
        finished.append(self)
        return real(self, *cancelled)

    options = InitOptions(
        model=str(source), out=str(tmp_path / "out"), rank=RANK, target=family.targets, device=("cpu",)
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
