"""Every architecture of the README's table: the pair loads as its users load it, computes the source, and trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import peft
import pytest
import torch
import transformers
from families import FAMILIES, Family
from safetensors.torch import load_file
from tiny_models import tensors
from torch import Tensor

from milora_init.decompose import initialize
from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from milora_init.verify import verify

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
        # PEFT looks up the patterns of fused parameters, and still says that they match no module.
        warnings.filterwarnings("ignore", "The following .*_pattern keys did not match any targeted module")
        return peft.PeftModel.from_pretrained(load(family, out), str(out), subfolder="lora", is_trainable=True)


def answer(family: Family, model: Any) -> Tensor:
    with torch.no_grad():
        said: Tensor = model.eval()(**architectures.feed(family))[0]
    return said.double()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pair_computes_what_the_source_computes(name: str, made: Made) -> None:
    family = FAMILIES[name]
    source, out, _ = made(name)
    truth = answer(family, load(family, source))
    pair = load_pair(family, out)
    with pair.disable_adapter():
        without = relative(answer(family, pair), truth)
    eps = torch.finfo(torch.float32).eps
    assert relative(answer(family, pair), truth) < 100 * eps
    assert without > 1000 * eps  # else the comparison would say nothing of the adapter


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
    pair(**architectures.feed(family))[0].square().mean().backward()
    optimizer.step()
    moved = {key for key, p in pair.named_parameters() if not torch.equal(p, before[key])}
    assert moved
    assert all("lora_" in key for key in moved)
    resting = {key for key, p in pair.named_parameters() if p.requires_grad} - moved
    assert not resting, "no gradient reaches them"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_that_was_split_is_the_sources_at_that_place(name: str, made: Made) -> None:
    """The module that a record names holds, in the loaded source, the tensor that the record names."""
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
def test_in_the_dtype_it_is_published_in_every_tensor_stands_up_to_the_source(name: str, made: Made) -> None:
    """Residuals within half a unit in the last place, every component solved anew, all else the same bytes."""
    source, out, manifest = made(name, FAMILIES[name].stored)
    assert {record.dtype for record in manifest.weights} == {FAMILIES[name].stored}
    verdict = verify(str(out), model=str(source), every=True)
    assert verdict.ok, verdict.differences
