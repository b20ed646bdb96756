"""The methods beyond MiLoRA and PiSSA: orthonormal factors, and adapters of the original model without a base."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from support import architectures, reference
from support.families import FAMILIES
from support.family_training import initialize_family, load, load_on_original, model_output, pattern_options
from support.interruptions import InterruptAt, InterruptedRunError, ShardLog
from support.marks import wide
from support.tiny_models import TARGETS, contents, edit_inputs, tensors, zero_rows
from support.training import TOKENS
from torch import Tensor

from milora_init import api
from milora_init.checkpoint.tensor_file import SafetensorsShard
from milora_init.errors import MiloraError, OutputError, PlanError
from milora_init.manifest import MANIFEST, Manifest, read_manifest
from milora_init.methods import recorded_method
from milora_init.report import loading_lines, run_fields

Built = Callable[..., Path]
Start = Callable[..., Manifest]
Made = Callable[[str, str], tuple[Path, Path, Manifest]]
ADAPTER_ONLY = ("rlmo", "rlpo", "mica")
FILES = {"adapter_config.json", "adapter_model.safetensors", MANIFEST}
MODELS = ("llama", "gpt2", "mixtral", wide("gemma3"))


def adapter(out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((out / "adapter_config.json").read_text())
    return config, load_file(out / "adapter_model.safetensors")


def factors_of(weights: dict[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """B and A of a module in float64."""
    B, A = (weights[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "BA")
    return B, A


def subspace_error(X: Tensor, truth: Tensor) -> float:
    """The sine of the largest angle between the column spaces of X and of truth, both orthonormal (k, r)."""
    return float(torch.linalg.matrix_norm(X - truth @ (truth.T @ X), 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(name, method) is a family's source, its output with alpha 8, and the manifest; tests change neither."""
    done: dict[tuple[str, str], tuple[Path, Path, Manifest]] = {}

    def get(name: str, method: str) -> tuple[Path, Path, Manifest]:
        if (name, method) not in done:
            options: dict[str, Any] = {"target": ("q_proj", "v_proj")} if method == "mica" and has_experts(name) else {}
            folder = tmp_path_factory.mktemp(f"{name}-{method}-")
            done[name, method] = initialize_family(name, folder, "float32", method=method, alpha=8, **options)
        return done[name, method]

    return get


def has_experts(name: str) -> bool:
    return any("experts" in target for target in FAMILIES[name].targets)


@pytest.mark.parametrize("method", ADAPTER_ONLY)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_an_adapter_is_written_with_the_vectors_of_the_method(
    method: str, kind: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source, out = checkpoint(kind), tmp_path / "out"
    manifest = start(source, method=method, target=TARGETS[kind], alpha=8)
    assert contents(out).keys() == FILES
    config, weights = adapter(out)
    assert config["base_model_name_or_path"] == str(source)
    assert config["init_lora_weights"] == ("mica" if method == "mica" else True)
    assert config["lora_dropout"] == 0.0
    mode, original = manifest.inputs["mode"], tensors(source)
    for record in manifest.weights:
        W = original[record.tensor].T if record.transposed else original[record.tensor]
        truth, (B, A) = reference.spectrum(W), factors_of(weights, record.module)
        indices = reference.wanted(len(truth.s), record.rank, mode)
        assert (B.shape, A.shape) == ((W.shape[0], 4), (4, W.shape[1]))
        kept, zero, vectors = (B, A, truth.U) if method == "mica" else (A.T, B, truth.V)
        assert not zero.any()
        assert (kept.T @ kept - torch.eye(4)).abs().max() <= 2 * reference.EPS32
        # Float32 rounds each entry; the solver's own error is many times smaller for these spectra.
        assert subspace_error(kept, vectors[:, indices]) <= 2 * reference.EPS32
        assert (record.rounding.error, record.rounding.leak, record.untrainable) == (0, 0, 0)
        assert record.energy == pytest.approx(float(truth.s[indices].square().sum() / truth.s.square().sum()), rel=1e-9)
    assert run_fields(manifest)["worst_step_0_error"] == 0
    assert read_manifest(out) == manifest


@pytest.mark.parametrize("method", ["rlmo", "mica"])
@pytest.mark.parametrize("name", MODELS)
def test_the_output_at_step_0_is_that_of_the_original_to_the_bit(method: str, name: str, made: Made) -> None:
    family = FAMILIES[name]
    source, out, manifest = made(name, method)
    assert any(record.expert for record in manifest.weights) == (has_experts(name) and method != "mica")
    expected = model_output(family, load(family, source))
    assert torch.equal(model_output(family, load_on_original(family, source, out)), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("patterns", [wide(False), True])
def test_orthonormal_factors_and_their_base_compute_the_original(
    name: str, patterns: bool, made: Made, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    if patterns:
        options = pattern_options(family)
        source, out, manifest = initialize_family(name, tmp_path, "float32", method="olora-tail", **options)
    else:
        source, out, manifest = made(name, "olora-tail")
    expected = model_output(family, load(family, source))
    together = model_output(family, load(family, out, out / "lora"))
    alone = model_output(family, load(family, out))
    scale = float(expected.abs().max())
    assert float((together - expected).abs().max()) <= 1e-4 * scale
    assert float((alone - expected).abs().max()) > 1e-2 * scale
    weights = load_file(out / "lora" / "adapter_model.safetensors")
    for record in (record for record in manifest.weights if record.expert is None):
        B, A = factors_of(weights, record.module)
        assert (B.T @ B - torch.eye(record.rank)).abs().max() <= 2 * reference.EPS32
        assert (A @ A.T - torch.eye(record.rank)).abs().max() <= 2 * reference.EPS32
    assert {record.untrainable for record in manifest.weights} == {0}


def test_orthonormal_factors_are_the_vectors_of_float64_and_the_base_is_rounded_once(
    start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source, out = checkpoint("gpt2", "bfloat16"), tmp_path / "out"
    manifest = start(source, method="olora-tail", target=TARGETS["gpt2"], alpha=2)
    weights, base, original = load_file(out / "lora/adapter_model.safetensors"), tensors(out), tensors(source)
    for record in manifest.weights:
        W, R = original[record.tensor].T, base[record.tensor].T
        truth, (B, A) = reference.spectrum(W), factors_of(weights, record.module)
        indices = reference.wanted(len(truth.s), record.rank, "min")
        assert (B @ A - truth.U[:, indices] @ truth.V[:, indices].T).norm() <= 4 * reference.EPS32 * 4**0.5
        exact = W.double() - record.scale * B @ A
        noise = 8 * reference.EPS64 * W.double().abs().max()
        assert ((exact - R.double()).abs() <= reference.ulp(exact, R.dtype) / 2 + noise).all()


@pytest.mark.parametrize(("method", "moved"), [("rlmo", {"B"}), ("mica", {"A"}), ("olora-tail", {"A", "B"})])
@pytest.mark.parametrize("name", MODELS)
def test_one_training_step_moves_what_the_method_says_and_nothing_else(
    method: str, moved: set[str], name: str, made: Made
) -> None:
    """With B = 0 the gradient of A is zero at step 0, so plain SGD moves B alone; mica freezes B."""
    family = FAMILIES[name]
    source, out, manifest = made(name, method)
    has_base = manifest.method.writes_base
    model = (
        load(family, out, out / "lora", trainable=True)
        if has_base
        else load_on_original(family, source, out, trainable=True)
    )
    trained = {name.split(".lora_")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(manifest.method.trained.split(" and "))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stored = contents(out if has_base else source)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.train()(**architectures.model_inputs(family))[0].square().mean().backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    adapted = {name for name in before if any(f".lora_{factor}." in name for factor in moved)}
    assert changed <= adapted
    # A projection that this input does not reach, such as that of an expert, gets no gradient.
    assert len(changed) >= len(adapted) / 2
    assert {name.split(".lora_")[1][0] for name in changed} == moved
    assert contents(out if has_base else source) == stored


@pytest.mark.parametrize("method", [*ADAPTER_ONLY, "olora-tail"])
def test_the_loading_lines_load_it(method: str, start: Start, checkpoint: Built, tmp_path: Path) -> None:
    manifest = start(checkpoint("llama"), method=method)
    lines = loading_lines(manifest)
    assert ("low_cpu_mem_usage=True" in lines) == (method == "mica")
    scope: dict[str, Any] = {}
    exec(lines, scope)
    expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))(input_ids=TOKENS).logits
    assert torch.allclose(scope["model"].eval()(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_only_targeted_tensors_are_read(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    located: list[str] = []
    locate = SafetensorsShard.locate

    def recorded(self: SafetensorsShard, name: str) -> Any:
        located.append(name)
        return locate(self, name)

    monkeypatch.setattr(SafetensorsShard, "locate", recorded)
    manifest = start(checkpoint("llama"), method="rlmo", target=("q_proj",))
    read = {name for name in located if not name.endswith((".A", ".B"))}
    assert read == {record.tensor for record in manifest.weights}
    assert manifest.inputs["side_files"] == {}


def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_run(
    start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint("llama", "bfloat16")
    start(source, method="rlmo", out=str(tmp_path / "whole"))
    with pytest.raises(InterruptedRunError):
        start(source, method="rlmo", progress=InterruptAt(1, when="after"))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    log = ShardLog()
    start(source, method="rlmo", progress=log)
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert log.made
    assert log.done_bytes > 0
    assert {name: data for name, data in whole.items() if name != MANIFEST} == {
        name: data for name, data in resumed.items() if name != MANIFEST
    }
    again = api.initialize(source, tmp_path / "out", method="rlmo", rank=4, device=["cpu"], dropout=0.0, progress=False)
    assert again.status == "unchanged"


def test_overwrite_replaces_no_pair_by_an_adapter_nor_the_other_way_round(
    start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    start(source, method="rlmo")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="method was"):
        start(source, method="milora")
    with pytest.raises(OutputError, match="an adapter of an original model, of method rlmo"):
        start(source, method="milora", overwrite=True)
    assert contents(tmp_path / "out") == before
    start(source, method="rlpo", overwrite=True)  # of the same kind
    start(source, method="pissa", out=str(tmp_path / "pair"))
    with pytest.raises(OutputError, match="a residual base and its adapter, of method pissa"):
        start(source, method="mica", out=str(tmp_path / "pair"), overwrite=True)


def test_a_rank_above_the_smaller_side_is_refused(start: Start, checkpoint: Built) -> None:
    with pytest.raises(PlanError, match="rank 17 is above the 16"):
        start(checkpoint("llama"), method="rlmo", rank=17)


def test_mica_is_refused_for_experts_and_by_a_peft_that_does_not_know_it(
    start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="freezes B, which PEFT does not do for experts"):
        initialize_family("mixtral", tmp_path, "float32", method="mica")
    monkeypatch.delattr(peft.tuners.lora.variants, "MiCALinearVariant")
    monkeypatch.setattr(metadata, "version", lambda _: "0.18.0")
    with pytest.raises(PlanError, match=r"PEFT 0\.18\.0 does not know init_lora_weights='mica'"):
        start(checkpoint("llama"), method="mica")


@pytest.mark.parametrize(
    ("method", "why"), [("milora", "with a higher loss"), ("olora-tail", "with a higher loss"), ("rlmo", "policy")]
)
def test_a_dropout_that_is_asked_for_is_written_with_a_warning(
    method: str, why: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    manifest = start(checkpoint("llama"), method=method, dropout=0.1)
    assert manifest.adapter["lora_dropout"] == 0.1
    (notice,) = (notice for notice in manifest.notices if "lora_dropout is 0.1" in notice)
    assert why in notice
    assert "--dropout 0" in notice
    quiet = start(checkpoint("llama"), method=method, out=str(tmp_path / "without"))
    assert quiet.adapter["lora_dropout"] == 0
    assert not [notice for notice in quiet.notices if "dropout" in notice]


def test_an_adapter_is_no_model_to_start_from(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama"), method="rlmo")
    with pytest.raises(MiloraError, match="it is an adapter of milora-init, not a model"):
        start(tmp_path / "out", out=str(tmp_path / "again"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_verify_merge_and_convert_know_orthonormal_factors(
    kind: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source, out = checkpoint(kind), tmp_path / "out"
    start(source, method="olora-tail", target=TARGETS[kind], alpha=8)
    verdict = api.verify(out, model=source, all_components=True)
    assert verdict.ok, verdict.findings
    merged = api.merge(out, tmp_path / "merged", model=source, progress=False)
    assert merged.bit_equal is not None
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert max(float((before[name] - after[name]).abs().max()) for name in before) <= 1e-6
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    model = PeftModel.from_pretrained(model, str(out / "lora"), is_trainable=True).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(5):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    api.convert(out, tmp_path / "trained", tmp_path / "plain", model=str(source))
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    plain = PeftModel.from_pretrained(original, str(tmp_path / "plain")).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).logits
        assert torch.allclose(plain(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_verify_sees_an_adapter_of_other_factors(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    """The adapter of a milora run in an olora-tail output: same names and shapes, other values."""
    source, out = checkpoint("llama"), tmp_path / "out"
    start(source, method="olora-tail")
    start(source, method="milora", dropout=0.0, out=str(tmp_path / "other"))
    name = "lora/adapter_model.safetensors"
    (out / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert api.verify(out).code == "replaced_adapter"
    with pytest.raises(PlanError):
        api.merge(out, tmp_path / "merged", progress=False)


@pytest.mark.parametrize(("method", "claimed"), [("olora-tail", "milora"), ("milora", "olora-tail")])
def test_verify_sees_a_manifest_that_claims_other_factors(
    method: str, claimed: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    start(source, method=method, dropout=0.0)
    edit_inputs(out / MANIFEST, method=claimed)
    assert api.verify(out, model=source, all_components=True).code == "damaged"


def test_orthonormal_factors_of_a_singular_weight_are_verified_by_their_directions(
    start: Start, own: Built, tmp_path: Path
) -> None:
    source, out = own("llama"), tmp_path / "out"
    zero_rows(source, "q_proj", slice(5, 12))  # seven singular values of 32 are zero
    start(source, method="olora-tail", target=("q_proj",))
    verdict = api.verify(out, model=source, all_components=True)
    assert verdict.ok, verdict.findings


@pytest.mark.parametrize("inputs", [None, [], {}, {"method": []}, {"method": "unknown", "mode": "min"}, {"mode": {}}])
def test_inputs_that_name_no_method_have_none(inputs: object) -> None:
    assert recorded_method(inputs) is None
