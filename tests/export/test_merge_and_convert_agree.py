"""The trained pair, merge, convert and PEFT's own merge compute the same function, for every kind of adapter."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import architectures
from support.families import FAMILIES
from support.family_training import initialize_family, load, model_output, pattern_options, train
from support.marks import wide
from support.runs import initialize
from support.tiny_models import tensors

from milora_init.api import convert
from milora_init.errors import MiloraError, PlanError
from milora_init.export.merge import merge
from milora_init.lora.compatibility import require_trained_from
from milora_init.manifest import Manifest
from milora_init.options import InitOptions
from milora_init.verification.verify import verify

NAMES = ["gpt2", "mixtral", *map(wide, ("llama", "gpt_oss", "qwen2", "deepseek_v3", "llava", "t5"))]
Made = Callable[..., tuple[Path, Path, Path, Manifest]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(name, dtype="float32", patterns=True): source, output, trained adapter, manifest; tests change none."""
    done: dict[tuple[str, str, bool], tuple[Path, Path, Path, Manifest]] = {}

    def get(name: str, dtype: str = "float32", *, patterns: bool = True) -> tuple[Path, Path, Path, Manifest]:
        if (name, dtype, patterns) not in done:
            family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
            options = pattern_options(family) if patterns else {"alpha": 6}
            source, out, manifest = initialize_family(name, folder, dtype, **options)
            done[name, dtype, patterns] = source, out, train(family, out, folder / "trained"), manifest
        return done[name, dtype, patterns]

    return get


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patterns", [pytest.param(False, marks=pytest.mark.wide), True])
def test_after_training_all_four_agree(name: str, patterns: bool, made: Made, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, out, trained, _ = made(name, patterns=patterns)
    merge(str(out), str(tmp_path / "merged"), adapter=str(trained))
    convert(out / "lora", trained, tmp_path / "plain")

    model = load(family, out, trained)
    pair = model_output(family, model)
    changed = float((pair - model_output(family, load(family, source))).norm() / pair.norm())
    assert changed > 0.02, "the training changed nothing"
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model_output(family, model.merge_and_unload()), pair, **near)
    torch.testing.assert_close(model_output(family, load(family, tmp_path / "merged")), pair, **near)
    torch.testing.assert_close(model_output(family, load(family, source, tmp_path / "plain")), pair, **near)
    assert verify(str(out), adapter=str(trained)).code == "trained_pair"
    assert tensors(source).keys() == tensors(tmp_path / "merged").keys()


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_the_merged_weights_are_the_sum_rounded_once(name: str, made: Made, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, out, trained, manifest = made(name, "bfloat16")
    merge(str(out), str(tmp_path / "merged"), adapter=str(trained))
    convert(out / "lora", trained, tmp_path / "plain")

    model = load(family, out, trained)
    pair = model_output(family, model)
    exact = dict(model.merge_and_unload().named_parameters())  # in float32
    plain = dict(load(family, tmp_path / "merged").named_parameters())
    adapted = {r.expert.parameter if r.expert else f"{r.module}.weight" for r in manifest.weights}
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    for parameter in adapted:
        off = (plain[parameter] - exact[parameter]).abs()
        assert float((off - half_ulp * exact[parameter].abs()).max()) < 1e-6, parameter
    assert {t.dtype for t in tensors(tmp_path / "merged").values()} == {torch.bfloat16}
    other = model_output(family, load(family, source, tmp_path / "plain"))
    assert float((other - pair).norm() / pair.norm()) < 0.1  # the residual was rounded, the source was not


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_compression_below_twice_the_rank_reports_the_loss(name: str, made: Made, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, out, trained, _ = made(name)
    pair = model_output(family, load(family, out, trained))
    off = {}
    for rank in (2, 5):
        modules = convert(out / "lora", trained, tmp_path / f"plain-{rank}", rank=rank).modules
        assert all(0 < module.lost < 1 for module in modules)
        other = model_output(family, load(family, source, tmp_path / f"plain-{rank}"))
        off[rank] = float((other - pair).norm() / pair.norm())
    assert off[5] < off[2]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_rank_limit_reduces_only_the_modules_above_it(name: str, made: Made, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, out, trained, _ = made(name)
    whole = {m.module: m.rank for m in convert(out / "lora", trained, tmp_path / "whole").modules}
    cut = convert(out / "lora", trained, tmp_path / "plain", rank=7).modules
    assert {m.module: m.rank for m in cut} == {module: min(7, rank) for module, rank in whole.items()}
    assert {6, 7} <= {m.rank for m in cut}
    assert all((m.lost > 1e-6) == (whole[m.module] > 7) for m in cut)
    pair = model_output(family, load(family, out, trained))
    plain = model_output(family, load(family, source, tmp_path / "plain"))
    assert float((plain - pair).norm() / pair.norm()) < max(m.lost for m in cut)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("patterns", [False, True])
def test_a_server_without_patterns_computes_the_same(
    rank: int | None, patterns: bool, made: Made, tmp_path: Path
) -> None:
    """vLLM reads r, lora_alpha and use_rslora but no patterns, and no rank may be above r."""
    family = FAMILIES["llama"]
    source, out, trained, _ = made("llama", patterns=patterns)
    convert(out / "lora", trained, tmp_path / "plain", rank=rank)

    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    factors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    original = dict(load(family, source).named_parameters())
    plain = dict(load(family, source, tmp_path / "plain").merge_and_unload().named_parameters())
    assert config["r"] == max(factor.shape[0] for key, factor in factors.items() if ".lora_A." in key)
    modules = [re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key) for key in factors if ".lora_A." in key]
    for module in (match[1] for match in modules if match):
        B, A = (factors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "BA")
        served = original[f"{module}.weight"] + scale * B @ A
        torch.testing.assert_close(served, plain[f"{module}.weight"], rtol=1e-5, atol=1e-6)
    assert len(modules) == len(factors) / 2 > 0


def test_an_adapter_of_a_similar_base_is_recognized_by_the_base_in_its_config(tmp_path: Path) -> None:
    """The principal directions of a model and of a fine-tuned copy are almost the same."""
    family = FAMILIES["llama"]
    _, out, _ = initialize_family("llama", tmp_path / "one", "float32", mode="max")
    similar = architectures.save(tmp_path / "two" / "source", family, "float32")
    for shard in similar.glob("*.safetensors"):
        torch.manual_seed(1)
        tuned = {name: w + 1e-3 * w.std() * torch.randn_like(w) for name, w in load_file(shard).items()}
        save_file(tuned, shard, metadata={"format": "pt"})
    asked = InitOptions(model=str(similar), out=str(tmp_path / "two" / "out"), rank=4, mode="max",
                        target=family.targets, device=("cpu",))  # fmt: skip
    initialize(asked)
    trained = train(family, tmp_path / "two" / "out", tmp_path / "trained")
    require_trained_from(
        out / "lora" / "adapter_model.safetensors", trained / "adapter_model.safetensors"
    )  # the factors alone show no difference
    assert verify(str(out), adapter=str(trained)).code == "foreign_adapter"
    for export in (
        lambda: merge(str(out), str(tmp_path / "merged"), adapter=str(trained)),
        lambda: convert(out / "lora", trained, tmp_path / "plain"),
    ):
        with pytest.raises(PlanError, match="another output of milora-init"):
            export()
    assert not {"merged", "plain"} & {path.name for path in tmp_path.iterdir()}


def test_an_expert_adapter_without_its_manifest_is_refused_with_the_reason(made: Made, tmp_path: Path) -> None:
    _, out, trained, _ = made("mixtral")
    initial = shutil.copytree(out / "lora", tmp_path / "initial")
    with pytest.raises(MiloraError, match="only the manifest says which experts"):
        convert(initial, trained, tmp_path / "plain", model="original")
    assert not (tmp_path / "plain").exists()
