"""Whole runs on quantised sources: a dense pair that is the model's values, streamed, resumed, and the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import quantised, reference
from support.interruptions import InterruptAt, InterruptedRunError
from support.tiny_models import contents, edit_json, tensors
from torch import Tensor

from milora_init import api
from milora_init.checkpoint.dequantise import locate
from milora_init.checkpoint.folder import open_checkpoint, open_model
from milora_init.checkpoint.header import read_header
from milora_init.errors import CheckpointError, PlanError, SolveError, UsageError
from milora_init.export.merge import merge, plan_of
from milora_init.export.movement import measure
from milora_init.lora.folder import open_factors, read_lora
from milora_init.manifest import MANIFEST, Manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import make_plan
from milora_init.records import MERGED
from milora_init.run.progress import Progress

Start = Callable[..., Manifest]
TARGETS: Mapping[str, tuple[str, ...] | None] = {
    "fp8": None, "deepseek": ("q_a_proj", "down_proj", "experts"), "fp4": ("q_a_proj", "experts"),
    "gpt_oss": ("q_proj", "experts"), "int4": None, "nvfp4": None, "modelopt": None, "modelopt fp8": None, "nf4": None,
}  # fmt: skip


FURTHER = ("modelopt fp8", "nf4")


def wide(*kinds: str) -> list[Any]:
    """Parameters of further cases that `make test-wide` runs."""
    return [pytest.param(kind, marks=pytest.mark.wide) for kind in kinds]


WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "fp8": quantised.save_fp8,
    "deepseek": partial(quantised.save_fp8, kind="deepseek", block=16),
    "fp4": quantised.save_fp4,
    "gpt_oss": quantised.save_gpt_oss,
    "int4": partial(quantised.save_compressed, scheme="int4"),
    "nvfp4": partial(quantised.save_compressed, scheme="nvfp4"),
    "modelopt": partial(quantised.save_modelopt, algorithm="NVFP4"),
    "modelopt fp8": partial(quantised.save_modelopt, algorithm="FP8"),
    "nf4": quantised.save_nf4,
}


class Sources(dict[str, Path]):
    """sources[kind] is a quantised model, written when a test first asks for it; tests must not write into it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __missing__(self, kind: str) -> Path:
        self[kind] = WRITERS[kind](self._root / kind.replace(" ", "-"))
        return self[kind]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return Sources(tmp_path_factory.mktemp("quantised"))


def outputs(out: Path) -> dict[str, bytes]:
    """All files except the manifest, which holds times, and the adapter's config, which names the folder."""
    return {n: c for n, c in contents(out).items() if n not in (MANIFEST, "lora/adapter_config.json")}


@pytest.mark.parametrize("kind", [*(kind for kind in TARGETS if kind not in FURTHER), *wide(*FURTHER)])
def test_the_pair_is_the_values_and_the_base_is_dense(
    kind: str, start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """Base + component = float32(code) * float32(scale), with one rounding; all else as transformers would load it."""
    source = sources[kind]
    manifest = start(source, target=TARGETS[kind])
    model, base = open_model(source), tensors(tmp_path / "out")
    assert base.keys() == model.tensors.keys()
    adapted: dict[str, Tensor] = {}
    with open_factors(tmp_path / "out/lora/adapter_model.safetensors") as factors:
        for record in manifest.weights:
            B, A = factors.read(record)
            W = locate(model, record.tensor)
            W_values = (W if record.row is None else W.at(record.row)).read().double()
            R = base[record.tensor] if record.row is None else base[record.tensor][record.row]
            D = record.scale * B.double() @ A.double()
            exact = W_values - (D.mT if record.transposed else D)
            assert R.dtype is torch.bfloat16
            assert (R.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max()
            adapted[record.tensor] = R
    for name in base.keys() - adapted.keys():
        expected = locate(model, name).read()
        expected = expected.to(torch.bfloat16) if name in model.quantised.tensors else expected
        assert torch.equal(base[name], expected), name
    config = (tmp_path / "out/config.json").read_text()
    assert "quant" not in config
    assert "expert_dtype" not in config
    assert api.verify(tmp_path / "out", model=source, all_components=True).code == "pair"


@pytest.mark.parametrize("kind", ["fp8", "gpt_oss", "int4"])
def test_the_dense_pair_loads_without_the_libraries_and_computes_the_model(
    kind: str, start: Start, sources: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    import transformers
    from peft import PeftModel

    start(sources[kind], target=TARGETS[kind], dtype="float32")
    for name in ("accelerate", "compressed_tensors"):
        monkeypatch.setitem(sys.modules, name, None)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    pair = PeftModel.from_pretrained(base, tmp_path / "out", subfolder="lora").eval()
    model = transformers.AutoModelForCausalLM.from_config(base.config, dtype=torch.float32).eval()
    values = open_model(sources[kind])
    state = {name: locate(values, name).read().float() for name in values.tensors}
    model.load_state_dict(state)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert (pair(ids).logits - model(ids).logits).abs().max() < 1e-4


def anywhere(name: str) -> str:
    """Codes and their scales in different files, and the weights of a layer in both."""
    return f"model-0000{1 + (sum(name.rpartition('.')[0].encode()) + ('scale' in name)) % 2}-of-00002.safetensors"


@pytest.mark.wide
def test_a_mixed_base_is_the_same_wherever_the_parts_are(start: Start, tmp_path: Path) -> None:
    """q, k and v become dense together, also where they are in different files."""
    near, far = quantised.save_fp8(tmp_path / "near"), quantised.save_fp8(tmp_path / "far", files=anywhere)
    for source in (near, far):
        start(source, out=str(tmp_path / f"mixed-{source.name}"), base="mixed", target=("q_proj",))
    assert same_tensors(tmp_path / "mixed-near", tmp_path / "mixed-far")
    assert api.verify(tmp_path / "mixed-far", model=far).code == "pair"


def test_scales_in_another_file_and_a_resumed_run_give_the_same_bytes(start: Start, tmp_path: Path) -> None:
    near, far = quantised.save_fp8(tmp_path / "near"), quantised.save_fp8(tmp_path / "far", files=anywhere)
    start(near, out=str(tmp_path / "a"))
    start(far, out=str(tmp_path / "b"))
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InterruptedRunError):
        start(far, out=str(tmp_path / "c"), progress=InterruptAt(0, when="after"))
    start(far, out=str(tmp_path / "c"))
    assert outputs(tmp_path / "b") == outputs(tmp_path / "c")
    assert not list(tmp_path.glob("b/*scale*"))


def same_tensors(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_request_is_answered_and_another_model_is_seen(
    start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["modelopt"], source)
    start(source)
    out = tmp_path / "out"
    before = contents(out)
    assert "hf_quant_config.json" not in before
    assert api.initialize(str(source), str(out), rank=4, progress=False, device=["cpu"]).status == "unchanged"
    other = api.verify(out, model=sources["fp8"])
    assert other.code == "other_model"
    assert contents(out) == before


@pytest.mark.parametrize("kind", ["fp8", "gpt_oss", "int4"])
def test_an_adapter_only_method_reads_the_codes_and_writes_no_base(
    kind: str, start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    target = ("q_proj",)
    manifest = start(sources[kind], method="rlmo", target=target)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", MANIFEST,
    }  # fmt: skip
    model = open_model(sources[kind])
    factors = tensors(tmp_path / "out")
    for record in manifest.weights:
        W = locate(model, record.tensor).read().double()
        A = factors[f"base_model.model.{record.module}.lora_A.weight"].double()
        values = torch.linalg.svdvals(W)
        assert torch.allclose((A @ W.mT).norm(dim=1).sort().values, values[-4:].sort().values, atol=1e-5)
    assert api.verify(tmp_path / "out", model=sources[kind], all_components=True).ok


def with_other_b(adapter: Path, to: Path) -> Path:
    """The initial adapter, as if B had been trained."""
    to.mkdir()
    shutil.copy(adapter / "adapter_config.json", to)
    torch.manual_seed(0)
    factors = load_file(adapter / "adapter_model.safetensors")
    trained = {n: t + torch.randn_like(t) * 0.05 if ".lora_B." in n else t for n, t in factors.items()}
    save_file(trained, to / "adapter_model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("kind", ["fp8", "gpt_oss", "modelopt", *wide("fp4", "int4", "nf4")])
def test_an_adapter_of_a_quantised_original_is_merged_into_its_dense_form(
    kind: str, start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """The files, names, dtypes and config of `--base dense`; float32(code) * float32(scale) + D, rounded once."""
    source, out, merged = sources[kind], tmp_path / "out", tmp_path / "merged"
    manifest = start(source, method="rlmo", target=TARGETS[kind])
    trained = with_other_b(out, tmp_path / "trained")
    api.merge(out, merged, adapter=trained, progress=False)
    dense = make_plan(InitOptions(model=str(source), out="dense", rank=4, target=TARGETS[kind]), source)
    assert {*dense.files} - {*dense.adapter_files} == {path.name for path in merged.iterdir()} - {MERGED}
    assert (merged / "config.json").read_bytes() == dense.config_bytes
    for job in dense.jobs:
        assert job.header is not None
        assert read_header(merged / job.target).tensors == job.header.tensors
    model, after = open_model(source), tensors(merged)
    exact = {name: locate(model, name).read().double() for name in model.tensors}
    with open_factors(trained / "adapter_model.safetensors") as factors:
        for record in manifest.weights:
            B, A = factors.read(record)
            D = record.scale * B.double() @ A.double()
            W = exact[record.tensor] if record.row is None else exact[record.tensor][record.row]
            W += D.mT if record.transposed else D
    for name, values in exact.items():
        assert ((values - after[name].double()).abs() <= 0.501 * reference.ulp(values, after[name].dtype)).all(), name
    assert api.verify(merged, model=source).code == "merged"
    again = api.merge(out, tmp_path / "again", model=source, progress=False)
    assert again.initial
    assert again.bit_equal == again.entries
    assert api.verify(tmp_path / "again", model=source).ok


def test_a_training_on_a_quantised_original_is_measured_against_its_values(
    start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    manifest = start(sources["int4"], method="rlmo")
    trained, model = with_other_b(tmp_path / "out", tmp_path / "trained"), open_model(sources["int4"])
    weights = measure(*plan_of(str(tmp_path / "out"), str(trained)))
    with open_factors(trained / "adapter_model.safetensors") as factors:
        for record, weight in zip(manifest.weights, weights, strict=True):
            B, A = factors.read(record)
            W, D = locate(model, record.tensor).read().double(), record.scale * B.double() @ A.double()
            V = torch.linalg.svd(W, full_matrices=False).Vh[-4:]
            assert weight.moved.relative == pytest.approx(float(D.norm() / W.norm()), rel=1e-6)
            # A has the smallest right directions, so all rows of the update lie in them: at least half of the share.
            assert (D @ V.mT).norm() == pytest.approx(float(D.norm()), rel=1e-4)
            assert weight.moved.minor >= 0.5


def scales_apart(name: str) -> str:
    """All scales in a file of their own, the codes of each layer in another one."""
    return "scales.safetensors" if "scale" in name else f"model-{int('layers.1.' in name)}.safetensors"


@pytest.mark.usefixtures("file_by_file")
def test_an_interrupted_merge_with_scales_in_another_file_is_resumed(start: Start, tmp_path: Path) -> None:
    source, out = quantised.save_fp8(tmp_path / "source", files=scales_apart), tmp_path / "out"
    start(source, method="rlmo")

    def interrupt(*_: object) -> None:
        raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        merge(str(out), str(tmp_path / "merged"), progress=interrupt)
    api.merge(out, tmp_path / "merged", progress=False)
    api.merge(out, tmp_path / "at-once", progress=False)
    one, other = contents(tmp_path / "merged"), contents(tmp_path / "at-once")
    assert {*one} == {*other}
    assert {n for n in one if n.endswith(".safetensors")} == {"model-0.safetensors", "model-1.safetensors"}
    assert {n: c for n, c in one.items() if n != MERGED} == {n: c for n, c in other.items() if n != MERGED}


@pytest.mark.parametrize("command", ["init", "scan", "merge"])
@pytest.mark.usefixtures("file_by_file")
def test_a_file_of_scales_that_changes_meanwhile_ends_the_run(command: str, start: Start, tmp_path: Path) -> None:
    """It belongs to no file of the output, so that nothing else would look at it."""
    source = quantised.save_fp8(tmp_path / "source", files=scales_apart)

    def touch() -> None:
        os.utime(source / "scales.safetensors", (1, 1))

    class Touch(Progress):
        def tensor(self, name: str, size_bytes: int) -> None:
            touch()

    if command == "merge":
        start(source, method="rlmo")
    commands: Mapping[str, Callable[[], object]] = {
        "init": lambda: start(source, progress=Touch()),
        "scan": lambda: api.scan(source, rank=4, device="cpu", progress=Touch()),
        "merge": lambda: merge(str(tmp_path / "out"), str(tmp_path / "merged"), progress=lambda *_: touch()),
    }
    with pytest.raises(CheckpointError, match=r"scales\.safetensors changed during the"):
        commands[command]()


def test_what_a_mixed_base_keeps_is_compared_by_its_bytes(start: Start, tmp_path: Path) -> None:
    """Also where other bytes are the same values, and where they are of no weight: scales of activations."""
    zero, source = "model.layers.1.self_attn.q_proj.weight", tmp_path / "source"

    def quantise(name: str, W: Tensor) -> quantised.Parts | None:
        parts = quantised.fp8_static(name, W)
        if name == zero:
            parts[name].zero_()
        return parts if quantised.is_projection(name) else None

    config = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    quantised.rewrite(quantised.save_model(source, "llama"), quantise, {"quantization_config": config})
    start(source, base="mixed", target=("o_proj",))
    out = tmp_path / "out"
    assert api.verify(out, model=source).code == "pair"
    changed = {f"{zero}_scale_inv", "model.layers.0.self_attn.v_proj.activation_scale"}
    gone = "model.layers.1.mlp.up_proj.activation_scale"
    for path in sorted(out.glob("*.safetensors")):
        stored = {n: t * 2 if n in changed else t for n, t in load_file(path).items() if n != gone}
        save_file(stored, path, metadata={"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    del index["weight_map"][gone]
    edit_json(out / "model.safetensors.index.json", **index)
    found = {finding.where for finding in api.verify(out, model=source).findings}
    assert {zero, "model.layers.0.self_attn.v_proj.activation_scale", gone} <= found


def test_a_weight_that_was_trained_as_a_whole_is_not_merged_into_a_base_that_keeps_it_quantised(
    start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    out, trained, module = tmp_path / "out", tmp_path / "trained", "model.layers.0.self_attn.o_proj"
    start(sources["fp8"], out=str(out), target=("q_proj",), base="mixed")
    with_other_b(out / "lora", trained)
    factors = load_file(trained / "adapter_model.safetensors")
    W = locate(open_model(sources["fp8"]), f"{module}.weight").read()
    factors[f"base_model.model.{module}.weight"] = W.float() + 1
    save_file(factors, trained / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_json(trained / "adapter_config.json", modules_to_save=["o_proj"])
    with pytest.raises(PlanError, match=rf"{module}\.weight was trained as a whole, and the base has it quantised"):
        merge(str(out), str(tmp_path / "merged"), adapter=str(trained))
    assert not (tmp_path / "merged").exists()


def test_a_merge_is_dense_and_has_the_plain_config(start: Start, sources: Mapping[str, Path], tmp_path: Path) -> None:
    for dtype in ("auto", "float32"):
        out, merged = tmp_path / dtype, tmp_path / f"merged-{dtype}"
        start(sources["fp8"], out=str(out), dtype=dtype)
        result = api.merge(out, merged, model=sources["fp8"], progress=False)
        config = json.loads((merged / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "bfloat16"
        assert result.bit_equal is not None
        assert result.bit_equal > (0.99 if dtype == "float32" else 0.5) * result.entries
        assert api.verify(merged, model=sources["fp8"]).ok


def test_a_value_beyond_the_dtype_of_the_base_ends_the_run(
    start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """A float32 product may be finite where its bfloat16 is not."""
    source, name = shutil.copytree(sources["fp8"], tmp_path / "source"), "model.layers.1.mlp.down_proj.weight"
    for path in source.glob("*.safetensors"):
        stored = load_file(path)
        if name in stored:
            stored[name][:1] = 448.0
        if f"{name}_scale_inv" in stored:
            stored[f"{name}_scale_inv"][:1] = 3.4e38 / 448
        save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(SolveError, match=f"{name} overflows bfloat16") as caught:
        start(source, target=("q_proj",))
    assert caught.value.hint == "--dtype float32"
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_memory_is_that_of_one_weight(start: Start, sources: Mapping[str, Path]) -> None:
    """The plan counts a quantised weight as float32, whatever its codes take."""

    def planned(source: Path) -> Any:
        plan = make_plan(InitOptions(model=str(source), out="out", rank=4), source)
        return plan.memory_bytes(plan.weights[0]), plan.weights[0].weight.shape

    memory, (m, n) = planned(sources["fp8"])
    assert memory >= m * n * (4 + 2)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("fp8", "q_proj"),
        ("deepseek", "experts"),
        ("int4", "v_proj"),
        pytest.param("fp4", "q_a_proj", marks=pytest.mark.wide),
    ],
)
def test_a_mixed_pair_computes_the_dense_one_and_takes_a_step(
    kind: str, target: str, start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """Equal logits, to the bit; what is not adapted has the source's bytes; a LoRA step runs; a merge stays mixed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    logits, ids = {}, torch.arange(1, 20)[None]
    for base in ("dense", "mixed"):
        out = tmp_path / base
        start(sources[kind], out=str(out), target=(target,), base=base)
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        pair = PeftModel.from_pretrained(model, out, subfolder="lora", is_trainable=True).eval()
        logits[base] = pair(ids).logits
        assert api.verify(out, model=sources[kind]).code == "pair"
    assert torch.equal(logits["dense"], logits["mixed"])
    loss = pair(ids, labels=ids).loss
    loss.backward()
    optimizer = torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert pair(ids, labels=ids).loss < loss
    stored, base_tensors = open_model(sources[kind]).stored, open_checkpoint(tmp_path / "mixed").stored
    source_tensors, ours = tensors(sources[kind]), tensors(tmp_path / "mixed")
    same = [n for n in base_tensors if n in stored and base_tensors[n].dtype == stored[n].dtype and "norm" not in n]
    assert len(same) > 10
    for name in same:
        assert torch.equal(ours[name].view(torch.uint8), source_tensors[name].view(torch.uint8)), name
    api.merge(tmp_path / "mixed", tmp_path / "merged", progress=False)
    assert (
        open_checkpoint(tmp_path / "merged").quantised.tensors.keys() == open_checkpoint(out).quantised.tensors.keys()
    )
    assert api.verify(tmp_path / "merged", model=sources[kind]).ok


@pytest.mark.parametrize("kind", ["fp8", "gpt_oss"])
def test_a_converted_adapter_serves_on_the_untouched_original(
    kind: str, start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """Trained on the dense pair, converted, put on the quantised original: the function of the trained pair."""
    import transformers
    from peft import PeftModel
    from support.training import train

    start(sources[kind], target=("q_proj", "v_proj"))
    out, trained, plain = tmp_path / "out", tmp_path / "trained", tmp_path / "plain"
    train(out, trained, steps=3)
    api.convert(out, trained, plain)
    options: dict[str, Any] = {}
    if kind == "gpt_oss":
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    cls, ids = transformers.AutoModelForCausalLM, torch.arange(1, 20)[None]

    def logits(base: Path, adapter: Path, **more: Any) -> Tensor:
        model = cls.from_pretrained(base, dtype=torch.bfloat16, **more).float()
        found: Tensor = PeftModel.from_pretrained(model, adapter).eval()(ids).logits.detach()
        return found

    pair, served = logits(out, trained), logits(sources[kind], plain, **options)
    initial = logits(out, out / "lora")
    assert (pair - served).abs().max() < 0.05 * max(1.0, float((pair - initial).abs().max()))
    assert (pair - initial).abs().max() > 4 * (pair - served).abs().max()


@pytest.mark.parametrize("kind", ["modelopt", *wide("fp4", "modelopt fp8", "nf4")])
def test_a_converted_adapter_adds_to_the_values_of_the_original(
    kind: str, start: Start, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """Where transformers does not load the original on a CPU: base + trained adapter = values + plain adapter."""
    manifest = start(sources[kind], target=("q_a_proj",) if kind == "fp4" else None)
    trained = with_other_b(tmp_path / "out" / "lora", tmp_path / "trained")
    api.convert(tmp_path / "out", trained, tmp_path / "plain")
    model, base = open_model(sources[kind]), tensors(tmp_path / "out")

    def update(adapter: Path, module: str) -> Tensor:
        factors, found = tensors(adapter), read_lora(adapter).modules[module]
        return found.scale * factors[found.B].double() @ factors[found.A].double()

    assert api.verify(tmp_path / "plain", model=sources[kind]).ok
    for record in manifest.weights:
        W, R = locate(model, record.tensor).read().double(), base[record.tensor].double()
        pair, served = R + update(trained, record.module), W + update(tmp_path / "plain", record.module)
        rounding = 1.01 * torch.finfo(torch.bfloat16).eps / 2 * R.abs().max()
        assert (pair - served).abs().max() <= rounding
        assert (pair - W).abs().max() > 3 * rounding


def test_a_dense_base_is_quantised_by_qlora(start: Start, sources: Mapping[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    start(sources["fp8"])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config, device_map="cpu")
    pair = PeftModel.from_pretrained(base, tmp_path / "out", subfolder="lora", is_trainable=True)
    ids = torch.arange(1, 20)[None]
    pair(ids, labels=ids).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in pair.parameters())


def test_the_leak_in_nf4_stands_beside_the_others(start: Start, sources: Mapping[str, Path]) -> None:
    record = start(sources["fp8"]).weights[0]
    leaks = record.rounding.leak_if
    assert leaks["nf4"] is not None
    assert leaks["bfloat16"] is not None
    assert leaks["nf4"] > 4 * leaks["bfloat16"]


def test_a_base_of_nf4_numbers_through_all_commands(start: Start, tmp_path: Path) -> None:
    source = quantised.save_model(tmp_path / "source", "llama")
    manifest = start(source, method="pissa", nf4=3)
    out = tmp_path / "out"
    assert api.verify(out, model=source, all_components=True).code == "pair"
    assert any("double quantisation" in notice for notice in manifest.notices)
    worst = max(record.rounding.error for record in manifest.weights)
    assert 0.01 < worst < 0.1
    merged = api.merge(out, tmp_path / "merged", progress=False)
    assert not merged.initial
    assert api.verify(tmp_path / "merged", model=source).ok
    base = tensors(out)
    name = manifest.weights[0].tensor
    base[name][0, 0] += 0.01
    file = next(path for path in out.glob("*.safetensors") if name in load_file(path))
    save_file({n: base[n] for n in load_file(file)}, file, metadata={"format": "pt"})
    found = api.verify(out, model=source, all_components=True)
    assert any("numbers that NF4 does not have" in finding.what for finding in found.findings)


@pytest.mark.parametrize("method", ["milora", "rlmo", "mid", "olora-tail"])
def test_a_correction_for_nf4_is_for_the_largest_directions_alone(
    method: str, start: Start, sources: Mapping[str, Path]
) -> None:
    with pytest.raises(UsageError, match="outweighs all but the largest directions") as caught:
        start(sources["fp8"], method=method, nf4=5)
    assert "--method pissa" in caught.value.hint
