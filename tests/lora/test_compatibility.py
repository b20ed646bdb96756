"""compatibility: whether an adapter was trained from the initial one, checked for every module."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.family_training import initialize_family
from support.family_training import train as train_family
from support.marks import wide
from support.runs import initialize
from support.tiny_models import edit_json
from support.training import train
from torch import Tensor

from milora_init.api import convert
from milora_init.errors import PlanError
from milora_init.export.merge import merge
from milora_init.lora.compatibility import modules_not_trained_from
from milora_init.manifest import require_manifest
from milora_init.methods import Mode
from milora_init.options import InitOptions
from milora_init.verification.verify import verify

Tensors = dict[str, Tensor]
WEIGHTS = "adapter_model.safetensors"
ONE = "layers.1.mlp.up_proj"  # (48, 32)
SQUARE = "layers.0.self_attn.q_proj"  # (32, 32)


def keys(module: str) -> tuple[str, str]:
    a, b = (f"base_model.model.model.{module}.lora_{factor}.weight" for factor in "AB")
    return a, b


@pytest.fixture(scope="module")
def pair(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out` and `trained`; tests must not write into it."""
    folder = tmp_path_factory.mktemp("related")
    initialize(InitOptions(model=str(checkpoint("llama")), out=str(folder / "out"), rank=4, device=("cpu",)))
    train(folder / "out", folder / "trained")
    return folder


def changed(pair: Path, to: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(pair / "trained", to)
    tensors = load_file(to / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, to / WEIGHTS, metadata={"format": "pt"})
    return to


def rejected_modules(pair: Path, trained: Path) -> dict[str, str]:
    out = pair / "out"
    return modules_not_trained_from(out / "lora" / WEIGHTS, trained / WEIGHTS, require_manifest(out).weights)


def noise(t: Tensors, names: tuple[str, ...]) -> None:
    for name in names:
        t[name] = t[name].std() * torch.randn_like(t[name])


def swap(t: Tensors, one: str, other: str) -> None:
    for a, b in zip(keys(one), keys(other), strict=True):
        t[a], t[b] = t[b], t[a]


def exchange_factors(t: Tensors) -> None:
    a, b = keys(SQUARE)
    t[a], t[b] = t[b].mT, t[a].mT


def permute(t: Tensors, name: str, dim: int) -> None:
    t[name] = t[name].roll(1, dim)


def scale(t: Tensors, names: tuple[str, ...], by: float) -> None:
    t |= {name: t[name] * by for name in names}


def rescale_factors(t: Tensors) -> None:
    scale(t, keys(ONE)[:1], 1e3)
    scale(t, keys(ONE)[1:], 1e-3)


def reorder_directions(t: Tensors) -> None:
    for dim, name in enumerate(keys(ONE)):
        permute(t, name, dim)


WRONG: dict[str, tuple[Callable[[Tensors], object], set[str]]] = {
    "noise": (lambda t: noise(t, keys(ONE)), {ONE}),
    "A is noise": (lambda t: noise(t, keys(ONE)[:1]), {ONE}),
    "B is noise": (lambda t: noise(t, keys(ONE)[1:]), {ONE}),
    "layers swapped": (
        lambda t: swap(t, "layers.0.mlp.up_proj", ONE),
        {"layers.0.mlp.up_proj", ONE},
    ),
    "modules of a layer swapped": (
        lambda t: swap(t, "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
        {"layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"},
    ),
    "exchanged and transposed": (exchange_factors, {SQUARE}),
    "columns of A permuted": (lambda t: permute(t, keys(ONE)[0], 1), {ONE}),
    "rows of B permuted": (lambda t: permute(t, keys(ONE)[1], 0), {ONE}),
    "rows of A permuted": (lambda t: permute(t, keys(ONE)[0], 0), {ONE}),
    "B is zero": (lambda t: scale(t, keys(ONE)[1:], 0), {ONE}),
    "A is zero": (lambda t: scale(t, keys(ONE)[:1], 0), {ONE}),
    "B times 1000": (lambda t: scale(t, keys(ONE)[1:], 1e3), {ONE}),
    "both times 1000": (lambda t: scale(t, keys(ONE), 1e3), {ONE}),
    "B times 0.001": (lambda t: scale(t, keys(ONE)[1:], 1e-3), {ONE}),
    "the sign of B": (lambda t: scale(t, keys(ONE)[1:], -1), {ONE}),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_module_not_trained_from_the_initial_adapter_is_named(name: str, pair: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    change, modules = WRONG[name]
    found = rejected_modules(pair, changed(pair, tmp_path / "changed", change))
    assert set(found) == {f"model.{module}" for module in modules}
    if "1000" in name:
        assert "times as large" in found[f"model.{ONE}"]


def test_noise_is_accepted_in_at_most_one_of_200_modules(pair: Path, tmp_path: Path) -> None:
    """A, B or both are noise in all ten modules. At widths of 16 to 48 a chance match is most likely."""
    passed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        for which in (slice(0, 1), slice(1, 2), slice(0, 2)):

            def replace_by_noise(t: Tensors, which: slice = which) -> None:
                for name in [name for name in t if ".lora_A." in name]:
                    both = [name, name.replace("lora_A", "lora_B")]
                    noise(t, tuple(both[which]))

            passed += 10 - len(rejected_modules(pair, changed(pair, tmp_path / f"{seed} {which}", replace_by_noise)))
    assert passed <= 3


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        rescale_factors,
        lambda t: scale(t, keys(ONE), -1),
        reorder_directions,
    ],
)
def test_factors_with_the_same_product_are_accepted(
    change: Callable[[Tensors], object], pair: Path, tmp_path: Path
) -> None:
    assert rejected_modules(pair, changed(pair, tmp_path / "changed", change)) == {}


@pytest.mark.parametrize("mode", ["min", wide("max")])
def test_an_adapter_after_long_training_is_accepted(
    mode: Mode, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    initialize(InitOptions(model=str(checkpoint("llama")), out=str(out), rank=4, mode=mode, device=("cpu",)))
    assert rejected_modules(tmp_path, train(out, tmp_path / "trained", steps=150)) == {}


def test_verify_merge_and_convert_reject_the_same_adapter(pair: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    damaged = changed(pair, tmp_path / "damaged", WRONG["noise"][0])
    verdict = verify(str(pair / "out"), adapter=str(damaged))
    assert verdict.code == "adapter_misfit"
    assert [d.where for d in verdict.differences] == [f"model.{ONE}"]
    (tmp_path / "copied").mkdir()
    copied = shutil.copytree(
        pair / "out" / "lora", tmp_path / "copied" / "lora"
    )  # without a manifest in the parent folder
    for export in (
        lambda: merge(str(pair / "out"), str(tmp_path / "merged"), adapter=str(damaged)),
        lambda: convert(pair / "out" / "lora", damaged, tmp_path / "plain"),
        lambda: convert(copied, damaged, tmp_path / "plain", model="org/model"),
    ):
        with pytest.raises(PlanError, match=rf"in 1 of its weights: model\.{ONE} \(cosine"):
            export()
    assert not {"merged", "plain"} & {path.name for path in tmp_path.iterdir()}


def test_a_zero_weight_has_no_direction_and_stays_zero(own: Callable[..., Path], tmp_path: Path, pair: Path) -> None:
    source = own("llama")
    for path in source.glob("*.safetensors"):
        content = load_file(path)
        for name, tensor in content.items():
            if "layers.0.self_attn.v_proj" in name:
                tensor.zero_()
            if "layers.1.self_attn.v_proj" in name:
                tensor[3:] = tensor[:1]  # rank 3, so the four smallest singular values are almost zero
        save_file(content, path, metadata={"format": "pt"})
    out = tmp_path / "out"
    initialize(InitOptions(model=str(source), out=str(out), rank=4, device=("cpu",)))
    trained = train(out, tmp_path / "trained")
    assert rejected_modules(tmp_path, trained) == {}
    tensors = load_file(trained / WEIGHTS)
    for name in keys("layers.0.self_attn.v_proj"):
        tensors[name] = torch.randn_like(tensors[name])
    save_file(tensors, trained / WEIGHTS, metadata={"format": "pt"})
    assert set(rejected_modules(tmp_path, trained)) == {"model.layers.0.self_attn.v_proj"}


def test_one_expert_replaced_by_noise_is_named(tmp_path: Path) -> None:
    _, out, manifest = initialize_family("mixtral", tmp_path, "float32")
    trained = train_family(FAMILIES["mixtral"], out, tmp_path / "trained")
    assert rejected_modules(tmp_path, trained) == {}
    weight = next(w for w in manifest.weights if w.expert and w.expert.index == 1 and w.expert.part == 0)
    tensors = load_file(trained / WEIGHTS)
    assert weight.expert
    A = tensors[f"base_model.model.{weight.key}.lora_A.weight"]
    block = A.reshape(weight.expert.count, -1, A.shape[1])[1]
    block[: weight.rank] = block.std() * torch.randn_like(block[: weight.rank])
    save_file(tensors, trained / WEIGHTS, metadata={"format": "pt"})
    assert set(rejected_modules(tmp_path, trained)) == {weight.module}


@pytest.fixture
def resized(pair: Path, tmp_path: Path) -> Path:
    """The trained adapter as PEFT saves it after the vocabulary was resized, with a saved head."""

    def add(t: Tensors) -> None:
        t["base_model.model.model.embed_tokens.weight"] = torch.ones(70, 32)
        t["base_model.model.lm_head.base_layer.weight"] = torch.ones(70, 32)

    folder = changed(pair, tmp_path / "resized", add)
    edit_json(folder / "adapter_config.json", modules_to_save=["lm_head"])
    return folder


def test_extra_tensors_of_an_adapter_are_a_note(resized: Path, pair: Path) -> None:
    verdict = verify(str(pair / "out"), adapter=str(resized))
    assert (verdict.code, verdict.differences) == ("trained_pair", ())
    notes = "\n".join(verdict.notes)
    for named in ("modules_to_save", "lm_head.base_layer.weight", "embed_tokens.weight"):
        assert named in notes
    assert notes.count("kept by merge and convert") == 2


@pytest.mark.parametrize("key", ["lora_magnitude_vector.weight", "lora_embedding_A"])
def test_dora_and_embedding_tensors_are_a_difference(key: str, pair: Path, tmp_path: Path) -> None:
    name = f"base_model.model.model.{ONE}.{key}"
    folder = changed(pair, tmp_path / "more", lambda t: t.update({name: torch.ones(48)}))
    assert [d.where for d in verify(str(pair / "out"), adapter=str(folder)).differences] == [name]
