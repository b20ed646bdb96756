"""convert --for: the tensors that a server reads, compared with the merged model, weight by weight as on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.families import FAMILIES
from support.family_training import initialize_family, pattern_options, train
from support.marks import wide
from support.tiny_models import tensors

from milora_init.api import convert, verify
from milora_init.cli.main import run
from milora_init.errors import PlanError
from milora_init.export.merge import merge
from milora_init.records import ConvertResult


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trained(family, target) is a folder with `source`, `out`, `trained` and `merged`, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def get(name: str, *target: str) -> Path:
        key = (name, *target)
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            options = pattern_options(FAMILIES[name]) if not target else {"target": target}
            initialize_family(name, folder, "float32", **options)
            train(FAMILIES[name], folder / "out", folder / "trained")
            if name in ("mixtral", "qwen3_moe", "deepseek_v3", "llama"):
                merge(str(folder / "out"), str(folder / "merged"), adapter=str(folder / "trained"))
            made[key] = folder
        return made[key]

    return get


def convert_for(folder: Path, server: str, to: Path, **options: Any) -> ConvertResult:
    return convert(folder / "out", folder / "trained", to, for_=server, **options)


def pairs(plain: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """B and A of each module in float64, by the module's name."""
    factors = load_file(plain / "adapter_model.safetensors")
    ends = ("base_model.model.", ".lora_A.weight")
    names = [key.removeprefix(ends[0]).removesuffix(ends[1]) for key in factors if key.endswith(ends[1])]
    assert len(factors) == 2 * len(names)
    found = ((name, [factors[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "BA"]) for name in names)
    return {name: (B, A) for name, (B, A) in found}


@pytest.mark.parametrize(
    ("name", "server"),
    [("mixtral", "vllm"), wide("mixtral", "sglang"), wide("qwen3_moe", "vllm"), ("deepseek_v3", "sglang")],
)
def test_a_server_that_reads_only_tensors_r_and_alpha_computes_the_merged_model(
    name: str, server: str, trained: Any, tmp_path: Path
) -> None:
    folder = trained(name)
    result = convert_for(folder, server, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    original, merged = tensors(folder / "source"), tensors(folder / "merged")
    found = pairs(tmp_path / "plain")
    assert {f"{module}.weight" for module in found} <= original.keys(), "the names are those on disk"
    assert "target_parameters" not in config
    assert config["lora_alpha"] == config["r"] == max(A.shape[0] for _, A in found.values())
    assert {module.rpartition(".")[2] for module in found} == set(config["target_modules"])
    changed = {n for n in original if not torch.equal(original[n], merged[n])}
    assert changed <= {f"{module}.weight" for module in found}
    for module, (B, A) in found.items():
        served = original[f"{module}.weight"].double() + B @ A
        torch.testing.assert_close(served, merged[f"{module}.weight"].double(), rtol=1e-5, atol=1e-5)
    experts = [module for module in found if ".experts." in module]
    assert len(experts) % 12 == 0, "three projections of four experts"
    if server == "sglang":
        assert {A.shape[0] for _, A in found.values()} == {config["r"]}
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert f"--max-lora-rank {config['r']}" in result.serve
    else:
        assert "--max-lora-rank" not in result.serve or "--max-lora-rank 32" in result.serve
    assert verify(tmp_path / "plain").code == "converted"


def test_a_projection_that_was_not_adapted_gets_zeros(trained: Any, tmp_path: Path) -> None:
    folder = trained("mixtral", "experts.down_proj")
    convert_for(folder, "vllm", tmp_path / "plain")
    found = pairs(tmp_path / "plain")
    original, merged = tensors(folder / "source"), tensors(folder / "merged")
    assert len(found) == 3 * 4 * 2
    for module, (B, A) in found.items():
        assert (B.shape[0], A.shape[1]) == original[f"{module}.weight"].shape
        assert bool((B @ A).any()) == module.endswith(".w2")
        served = original[f"{module}.weight"].double() + B @ A
        torch.testing.assert_close(served, merged[f"{module}.weight"].double(), rtol=1e-5, atol=1e-5)


def test_experts_that_are_stored_fused_keep_the_form_of_peft_and_need_both_projections(
    trained: Any, tmp_path: Path
) -> None:
    folder = trained("gpt_oss")
    convert_for(folder, "vllm", tmp_path / "served")
    convert_for(folder, "peft", tmp_path / "plain")
    served, plain = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("served", "plain"))
    assert served.keys() == plain.keys()
    half = trained("gpt_oss", "experts.down_proj")
    with pytest.raises(PlanError, match=r"only .*experts\.down_proj was adapted.*gate_up_proj") as caught:
        convert_for(half, "vllm", tmp_path / "half")
    assert "milora-init merge" in caught.value.hint
    assert not (tmp_path / "half").exists()


def test_what_a_server_does_not_apply_is_told(trained: Any, tmp_path: Path) -> None:
    gpt2 = convert_for(trained("gpt2", "c_proj"), "vllm", tmp_path / "gpt2")
    assert gpt2.serve == ""
    assert any("no LoRA for GPT2LMHeadModel" in line for line in gpt2.notices)
    assert convert_for(trained("gpt2", "c_proj"), "peft", tmp_path / "peft").notices == ()
    mla = convert_for(trained("deepseek_v3", "kv_b_proj"), "vllm", tmp_path / "mla")
    assert any("kv_b_proj" in line for line in mla.notices)


def test_a_dense_layer_of_a_model_with_experts_has_a_pattern_under_either_name(tmp_path: Path) -> None:
    """PEFT looks it up as `<module>.weight`, vLLM without `.weight`."""
    _, out, _ = initialize_family("qwen3_moe", tmp_path, "float32", target=("q_proj", "down_proj"),
                                  alpha_pattern={"down_proj": 7})  # fmt: skip
    config = json.loads((out / "lora" / "adapter_config.json").read_text())
    dense = "model.layers.0.mlp.down_proj"
    assert config["alpha_pattern"] == {dense: 7, f"{dense}.weight": 7}
    assert config["rank_pattern"] == {dense: 4, f"{dense}.weight": 4}


@pytest.mark.parametrize(("name", "energy"), [("llama", 0.5), ("llama", 0.999), ("llama", 1.0), ("mixtral", 0.9)])
def test_energy_keeps_the_fewest_directions_that_have_this_share(
    name: str, energy: float, trained: Any, tmp_path: Path
) -> None:
    folder = trained(name)
    planned = convert_for(folder, "vllm", tmp_path / "plain", energy=energy, dry_run=True)
    assert not (tmp_path / "plain").exists()
    result = convert_for(folder, "vllm", tmp_path / "plain", energy=energy)
    assert planned.modules == result.modules
    assert planned.files == result.files
    original, merged = tensors(folder / "source"), tensors(folder / "merged")
    found = pairs(tmp_path / "plain")
    for module in result.modules:
        change = merged[f"{module.module}.weight"].double() - original[f"{module.module}.weight"].double()
        s = torch.linalg.svdvals(change)
        B, A = found[module.module]
        assert module.lost**2 <= 1 - energy + 1e-6
        assert float((B @ A - change).norm() / s.norm()) == pytest.approx(module.lost, abs=1e-5)
        if "experts" not in module.module:  # the experts of a projection share the rank of the most demanding one
            kept = s.square().cumsum(0) / s.square().sum()
            assert module.rank == min(int((kept < energy - 1e-9).sum()) + 1, A.shape[0])
    projections: dict[str, set[int]] = {}
    for module in result.modules:
        projections.setdefault(re.sub(r"experts\.\d+", "experts", module.module), set()).add(module.rank)
    assert all(len(ranks) == 1 for ranks in projections.values())


@pytest.mark.parametrize("energy", ["0", "1.5", "-1", "nan"])
def test_an_impossible_energy_or_server_is_refused(
    energy: str, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained("llama")
    words = ["convert", str(folder / "out"), "--adapter", str(folder / "trained"), "--out", str(tmp_path / "plain")]
    assert run([*words, "--energy", energy]) == 2
    assert "is not between 0 and 1" in capsys.readouterr().err
    assert run([*words, "--for", "tgi"]) == 2
    assert "choose one of peft, vllm, sglang" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()


def test_the_dry_run_says_what_would_be_lost(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained("llama")
    words = ["convert", str(folder / "out"), "--adapter", str(folder / "trained"), "--out", str(tmp_path / "plain")]
    assert run([*words, "--energy", "0.9", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing was written" in said
    assert "% of the energy of a module's update lost" in said
    assert "q_proj" not in said
    assert run([*words, "--energy", "0.9", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "planned"
    assert not (tmp_path / "plain").exists()
