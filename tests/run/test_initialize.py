"""initialize: from a checkpoint to a pair that transformers and PEFT load and that computes the source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import reference, tiny_models
from support.marks import wide
from support.tiny_models import TARGETS, contents, tensors
from torch import Tensor, nn

from milora_init.manifest import Manifest
from milora_init.report import loading_lines

Built = Callable[..., Path]
Start = Callable[..., Manifest]


def adapter_of(out: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """adapter_config.json, and (B, A) by module."""
    config: dict[str, Any] = json.loads((out / "lora" / "adapter_config.json").read_text())
    factors = load_file(out / "lora" / "adapter_model.safetensors")
    modules = [key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight")]
    assert len(factors) == 2 * len(modules)
    return config, {
        module.removeprefix("base_model.model."): (
            factors[f"{module}.lora_B.weight"],
            factors[f"{module}.lora_A.weight"],
        )
        for module in modules
    }


def require_correct_tensors(
    source: dict[str, Tensor], out: Path, manifest: Manifest, mode: str, dtype: str = "auto"
) -> None:
    """Compare components and residuals with the reference; all other tensors must be unchanged."""
    written = tensors(out)
    config, factors = adapter_of(out)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    assert written.keys() == source.keys()
    assert [record.module for record in manifest.weights] == list(dict.fromkeys(r.module for r in manifest.weights))
    assert factors.keys() == {record.module for record in manifest.weights}
    split = {record.tensor: record for record in manifest.weights}
    for name, before in source.items():
        after = written[name]
        if name not in split:
            assert reference.same_bytes(before, after), f"{name} was not targeted, yet changed"
            continue
        record = split[name]
        B, A = factors[record.module]
        W, R = (before.T, after.T) if config["fan_in_fan_out"] else (before, after)
        assert (B.shape, A.shape) == ((W.shape[0], config["r"]), (config["r"], W.shape[1]))
        assert B.dtype == A.dtype == torch.float32
        assert R.dtype == (before.dtype if dtype == "auto" else getattr(torch, dtype))
        D = scale * (B.double() @ A.double())
        truth = reference.spectrum(W)
        k, r = len(truth.s), config["r"]
        indices = reference.drawn(truth, D, r) if mode == "random" else reference.wanted(k, r, mode)
        assert (D - truth.component(indices)).norm() <= truth.tolerance(indices), name
        exact = W.double() - D
        noise = 8 * reference.EPS64 * W.double().abs().max()
        assert ((exact - R.double()).abs() <= reference.ulp(exact, R.dtype) / 2 + noise).all(), name
        assert record.s_first == pytest.approx(float(truth.s[indices[0]]), rel=1e-9)
        assert record.s_last == pytest.approx(float(truth.s[indices[-1]]), rel=1e-9)
        assert record.shape == tuple(W.shape)


CASES = [
    *[pytest.param("llama", dtype, {}, id=f"llama {dtype}") for dtype in ("float32", "bfloat16", "float16")],
    *[pytest.param(kind, "float32", {}, id=kind) for kind in ("qwen2", "gpt2", "bert", "gemma", "tied llama")],
    *[wide(kind, "bfloat16", {}, id=f"{kind} bfloat16") for kind in ("qwen2", "gpt2", "bert")],
    *[pytest.param("llama", "bfloat16", {"mode": mode}, id=mode) for mode in ("max", "mid", "random")],
    *[wide("gpt2", "float32", {"mode": mode}, id=f"gpt2 {mode}") for mode in ("max", "random")],
    pytest.param("llama", "float32", {"alpha": 8}, id="alpha 8"),
    wide("llama", "float32", {"alpha": 2, "mode": "max"}, id="alpha 2 max"),
    wide("llama", "float32", {"rslora": True}, id="rslora"),
    pytest.param("llama", "bfloat16", {"rslora": True, "alpha": 16, "mode": "mid"}, id="rslora alpha 16 mid"),
    *[
        (pytest.param if dtype == "bfloat16" else wide)("llama", source, {"dtype": dtype}, id=f"{source} as {dtype}")
        for source in ("float32", "bfloat16", "float16")
        for dtype in ("float32", "bfloat16", "float16")
        if source != dtype
    ],
    pytest.param("gpt2", "bfloat16", {"dtype": "float32"}, id="gpt2 bfloat16 as float32"),
    pytest.param("llama", "float32", {"rank": 16, "target": ("all-linear",)}, id="full rank"),
    pytest.param("llama", "float32", {"rank": 1, "target": ("0.mlp.up_proj",)}, id="one direction of one weight"),
]


@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_every_tensor_is_what_the_method_says_and_the_rest_is_untouched(
    kind: str, dtype: str, options: dict[str, Any], start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint(kind, dtype)
    manifest = start(source, **{"target": TARGETS[kind], **options})
    mode, written = options.get("mode", "min"), options.get("dtype", "auto")
    require_correct_tensors(tensors(source), tmp_path / "out", manifest, mode, written)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_pickled_weights_are_split_like_safetensors(
    shards: int, dtype: str, start: Start, pickled: Built, checkpoint: Built, tmp_path: Path
) -> None:
    manifest = start(pickled(shards), dtype=dtype)
    require_correct_tensors(tensors(checkpoint("llama")), tmp_path / "out", manifest, "min", dtype)
    assert not list((tmp_path / "out").glob("*.bin*"))


def outputs(model: nn.Module) -> Tensor:
    ids = torch.randint(0, tiny_models.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.eval()(input_ids=ids)[0]
    assert isinstance(found, Tensor)
    return found.double()


def load_pair(out: Path, kind: str) -> Any:
    cls = getattr(transformers, tiny_models.KINDS[kind][0])
    return PeftModel.from_pretrained(
        cls.from_pretrained(out, dtype=torch.float32), str(out), subfolder="lora", is_trainable=True
    )


def load_source(folder: Path, kind: str) -> Any:
    return getattr(transformers, tiny_models.KINDS[kind][0]).from_pretrained(folder, dtype=torch.float32)


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / x.norm())


EXACT = [
    ("llama", "float32", {}),
    wide("llama", "float32", {"mode": "max", "alpha": 8}),
    ("llama", "float32", {"mode": "random", "rslora": True}),
    ("llama", "bfloat16", {"dtype": "float32", "mode": "max"}),
    wide("qwen2", "float32", {}),
    wide("gpt2", "float32", {"mode": "max"}),
    ("gpt2", "float32", {"rslora": True, "alpha": 2}),
    ("bert", "float32", {}),
    ("bert classifier", "float32", {}),
    wide("gemma", "float32", {}),
    ("tied llama", "float32", {"mode": "mid"}),
]


@pytest.mark.parametrize(("kind", "dtype", "options"), EXACT, ids=str)
def test_the_pair_computes_what_the_source_computes(
    kind: str, dtype: str, options: dict[str, Any], start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint(kind, dtype)
    start(source, **{"target": TARGETS[kind], **options})
    pair = load_pair(tmp_path / "out", kind)
    expected = outputs(load_source(source, kind))
    assert relative_error(expected, outputs(pair)) < 1e-5
    with pair.disable_adapter():
        assert relative_error(expected, outputs(pair)) > 1e-3, "the adapter has no effect"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pair_made_from_pickles_computes_what_the_source_computes(
    shards: int, start: Start, pickled: Built, checkpoint: Built, tmp_path: Path
) -> None:
    start(pickled(shards))
    expected = outputs(load_source(checkpoint("llama"), "llama"))
    assert relative_error(expected, outputs(load_pair(tmp_path / "out", "llama"))) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_pair_differs_from_its_source_only_by_rounding(
    dtype: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    """Each residual entry is off by half a unit; two layers amplify this to some eps, far less than the component."""
    source = checkpoint("llama", dtype)
    start(source)
    pair = load_pair(tmp_path / "out", "llama")
    expected = outputs(load_source(source, "llama"))
    with pair.disable_adapter():
        without = relative_error(expected, outputs(pair))
    assert relative_error(expected, outputs(pair)) < min(16 * torch.finfo(getattr(torch, dtype)).eps, without / 4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_training_starts_from_the_stored_adapter_and_changes_only_the_adapter(
    kind: str, start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    manifest = start(checkpoint(kind), target=TARGETS[kind], dropout=0.0)
    pair = load_pair(tmp_path / "out", kind)
    stored = load_file(tmp_path / "out" / "lora" / "adapter_model.safetensors")
    trainable = {n.replace(".default.", "."): p for n, p in pair.named_parameters() if p.requires_grad}
    assert trainable.keys() == stored.keys()
    assert len(trainable) == 2 * len(manifest.weights)
    assert all(torch.equal(parameter, stored[name]) for name, parameter in trainable.items())
    frozen = {name: parameter.detach().clone() for name, parameter in pair.named_parameters()}

    pair.train()
    optimiser = torch.optim.SGD(trainable.values(), lr=1e-2)
    ids = torch.arange(32).reshape(2, 16) % tiny_models.VOCABULARY
    pair(input_ids=ids)[0].square().mean().backward()
    optimiser.step()
    changed = {name for name, parameter in pair.named_parameters() if not torch.equal(parameter, frozen[name])}
    assert {name.replace(".default.", ".") for name in changed} == stored.keys()


def test_the_lines_printed_load_the_pair(start: Start, checkpoint: Built) -> None:
    manifest = start(checkpoint("llama"))
    scope: dict[str, Any] = {}
    exec(loading_lines(manifest), scope)
    assert relative_error(outputs(load_source(checkpoint("llama"), "llama")), outputs(scope["model"])) < 1e-5


def test_transformers_loads_the_requested_dtype(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama", "bfloat16"), dtype="float32")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    written = tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert written[name].dtype == torch.float32
    assert torch.equal(base.get_parameter(name), written[name])


@pytest.mark.parametrize("mode", ["min", "random"])
def test_the_same_command_makes_the_same_bytes_whatever_the_threads(
    mode: str, start: Start, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        monkeypatch.chdir(folder)
        torch.set_num_threads(threads)
        try:
            start(checkpoint("llama", "bfloat16"), out="out", mode=mode)
        finally:
            torch.set_num_threads(before)
        made.append({name: content for name, content in contents(folder).items() if "milora_init" not in name})
    assert made[0] == made[1]


def test_another_seed_draws_other_components(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        made = start(checkpoint("llama"), mode="random", seed=seed, out=str(tmp_path / str(seed)))
        drawn.append([record.s_first for record in made.weights])
    assert drawn[0] != drawn[1]


def test_the_manifest_records_the_run(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    source = checkpoint("llama", "bfloat16")
    manifest = start(source, dtype="float32", rank=3)
    assert manifest.source == {
        "model": str(source), "revision": None, "architecture": "LlamaForCausalLM",
        "config.json": (source / "config.json").read_text(),
    }  # fmt: skip
    assert manifest.out == manifest.adapter["base_model_name_or_path"] == str(tmp_path / "out")
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.versions["transformers"] == transformers.__version__
    for record in manifest.weights:
        assert (record.rank, record.source_dtype, record.dtype) == (3, "bfloat16", "float32")
        assert record.device == "cpu"
        assert 0 < record.s_last <= record.s_first < record.s_max
        assert record.energy == pytest.approx(record.rounding.component**2)
        assert record.rounding.leak < (record.rounding.leak_if["bfloat16"] or 0)
        assert record.untrainable == 0
        assert min(record.read_s, record.elapsed_s, record.write_s) >= 0


def test_untrainable_directions_of_a_rank_deficient_weight_are_counted(start: Start, own: Built) -> None:
    source = own("llama")
    content = tensors(source)
    name = "model.layers.0.self_attn.q_proj.weight"
    content[name] = torch.outer(torch.arange(32.0), torch.ones(32))  # rank 1
    save_file(content, source / "model.safetensors", metadata={"format": "pt"})
    manifest = start(source, target=("q_proj",), rank=4)
    assert [record.untrainable for record in manifest.weights] == [4, 0]
