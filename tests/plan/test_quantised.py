"""What a plan does with a quantised source: it names what it cannot read, and the base speaks of no quantisation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import quantised
from support.tiny_models import edit_json
from torch import Tensor

from milora_init.checkpoint.quantisation import METHODS, REFUSED
from milora_init.errors import CheckpointError, PlanError, UsageError
from milora_init.options import InitOptions
from milora_init.plan.output_files import with_dtype
from milora_init.plan.plan import Plan, make_plan

Q0 = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("quantised")
    return {
        "fp8": quantised.save_fp8(root / "fp8"),
        "int8": quantised.save_compressed(root / "int8", "int8 asymmetric"),
        "int4": quantised.save_compressed(root / "int4", "int4 asymmetric"),
        "nvfp4": quantised.save_compressed(root / "nvfp4", "nvfp4"),
        "gpt_oss": quantised.save_gpt_oss(root / "gpt_oss"),
    }


@pytest.fixture
def own(sources: Mapping[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """own(kind, change=None, **settings) is a copy with changed tensors and changed keys of quantization_config."""

    def get(kind: str, change: Change | None = None, **settings: Any) -> Path:
        folder = tmp_path / "own"
        folder.mkdir()
        for path in sources[kind].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        if change:
            tensors = {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}
            change(tensors)
            for path in folder.glob("*.safetensors*"):
                path.unlink()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if settings:
            config = json.loads((folder / "config.json").read_text())["quantization_config"] | settings
            edit_json(folder / "config.json", quantization_config=config)
        return folder

    return get


def plan(folder: Path, **options: Any) -> Plan:
    return make_plan(InitOptions(model=str(folder), out="out", rank=4, **options), folder)


def renamed(name: str, to: str | None) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(name)
        if to:
            tensors[to] = tensor

    return change


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


FLAT = {"x.weight": torch.ones(8).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(1)}
SCALE = f"{Q0}.weight_scale_inv"
PACKED = f"{Q0}.weight_packed"
BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"


@pytest.mark.parametrize(
    ("kind", "change", "settings", "parts"),
    [
        ("fp8", renamed(SCALE, None), {}, [f"{Q0}.weight is stored as F8_E4M3", "no", SCALE]),
        ("fp8", renamed(f"{Q0}.weight", None), {}, [SCALE, "the weight is missing"]),
        ("fp8", replaced(SCALE, lambda s: s[:1]), {}, [SCALE, "[1, 2]", "should have the shape [2, 2]"]),
        ("fp8", replaced(SCALE, lambda s: s.to(torch.int32)), {}, [SCALE, "I32", "should be F32"]),
        ("fp8", None, {"weight_block_size": [16, 16]}, ["should have the shape"]),
        ("fp8", None, {"weight_block_size": None}, ["should have the shape [1]"]),
        ("fp8", None, {"weight_block_size": [0, 16]}, ["weight_block_size is [0, 16]"]),
        ("fp8", replaced(f"{Q0}.weight", lambda q: q.view(torch.uint8)), {}, ["U8", "no rule reads it"]),
        ("fp8", renamed(f"{Q0}.weight", f"{Q0}.weight_packed"), {}, ["F8_E4M3"]),
        ("fp8", replaced(f"{Q0}.weight", lambda q: q[:0]), {}, [SCALE]),
        ("fp8", lambda t: t.update(FLAT), {}, ["x.weight", "[8]", "rules read matrices"]),
        ("int4", renamed(f"{Q0}.weight_shape", None), {}, [PACKED, "no", f"{Q0}.weight_shape"]),
        ("int4", renamed(f"{Q0}.weight_zero_point", None), {}, [PACKED, "asymmetric", "stores no zero point"]),
        ("int4", replaced(f"{Q0}.weight_zero_point", lambda z: z[:4]), {}, ["zero_point is I32 [4, 2]", "[8, 2]"]),
        ("int4", replaced(PACKED, lambda q: q[:, :7]), {}, [PACKED, "no config group fits"]),
        ("int4", None, {"config_groups": {}}, ["weight_packed is [64, 12]", "no config group fits"]),
        ("int4", None, {"transform_config": {"config_groups": {"a": {}}}}, ["transform_config", "rotated"]),
        ("int4", None, {"sparsity_config": {"format": "sparse-bitmask"}}, ["sparsity_config", "sparse"]),
        ("int4", None, {"quantization_status": "frozen"}, ["quantization_status 'frozen'"]),
        ("int4", lambda t: t.update({f"{Q0}.weight": torch.ones(64, 64)}), {}, [f"{Q0}.weight is stored twice"]),
        ("int4", None, {"format": "marlin-24"}, ["the format 'marlin-24'"]),
        ("nvfp4", replaced(PACKED, lambda q: q[0, 0]), {}, [f"{Q0}.weight_scale", "should have the shape"]),
        ("int8", replaced(f"{Q0}.weight_zero_point", lambda z: z.bool()), {}, ["zero_point is BOOL", f"{Q0}.weight"]),
        ("nvfp4", renamed(f"{Q0}.weight_global_scale", None), {}, [PACKED, "no", "weight_global_scale"]),
        ("nvfp4", replaced(f"{Q0}.weight_scale", lambda s: s[:, :3]), {}, ["weight_scale", "[64, 3]", "[64, 4]"]),
        ("gpt_oss", renamed(BLOCKS.replace("blocks", "scales"), None), {}, [BLOCKS, "no", "down_proj_scales"]),
        ("gpt_oss", replaced(BLOCKS, lambda q: q[:, :, :, :8]), {}, [BLOCKS, "expected [experts, out, in / 32, 16]"]),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_by_name(
    kind: str, change: Change | None, settings: dict[str, Any], parts: list[str], own: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan(own(kind, change, **settings))
    for part in parts:
        assert part in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("method", [*REFUSED, "spqr", "bitsandbytes", "of tomorrow", None, ["fp8"]])
def test_a_method_without_a_rule_is_refused_by_name(method: Any, own: Callable[..., Path]) -> None:
    folder = own("fp8", quant_method=method, load_in_8bit=True)
    with pytest.raises(CheckpointError, match="the checkpoint is quantised") as caught:
        plan(folder)
    assert str(method) in caught.value.message or not isinstance(method, str)
    assert "unquantised" in caught.value.hint


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"bitsandbytes"}))
def test_a_config_that_calls_plain_weights_quantised_is_refused(method: str, checkpoint: Any, tmp_path: Path) -> None:
    folder = quantised.save_model(tmp_path / "plain", "llama")
    edit_json(folder / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match="but no tensor of it is"):
        plan(folder)


@pytest.mark.parametrize("place", ["top", "section", "compression_config", "hf_quant_config", "two", "none"])
def test_the_configuration_is_found_wherever_it_is(place: str, own: Callable[..., Path]) -> None:
    folder = own("fp8")
    path = folder / "config.json"
    settings = json.loads(path.read_text())["quantization_config"]
    if place == "section":
        edit_json(path, quantization_config=None, text={"quantization_config": settings})
    elif place == "compression_config":
        edit_json(path, quantization_config=None, compression_config=settings)
    elif place == "two":
        edit_json(path, text={"quantization_config": {**settings, "weight_block_size": [8, 8]}})
    elif place in ("none", "hf_quant_config"):
        edit_json(path, quantization_config=None)
        if place == "hf_quant_config":
            content = {"quantization": {"quant_method": "fp8", "quant_algo": "FP8", **settings}}
            (folder / "hf_quant_config.json").write_text(json.dumps(content))
    if place in ("two", "none"):
        with pytest.raises(CheckpointError, match=r"two different|config\.json has no quantization_config for it"):
            plan(folder)
        return
    made = plan(folder)
    config = json.loads(made.config_bytes)
    assert "quant" not in json.dumps(config)
    assert "compression_config" not in config
    assert "hf_quant_config.json" not in made.files
    assert [w.source_dtype for w in made.weights] == ["BF16"] * len(made.weights)


def test_a_layer_without_a_module_becomes_dense_too(own: Callable[..., Path]) -> None:
    """DeepSeek's layer for multi-token prediction has tensors and no module: names decide, not modules."""

    def add(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
        tensors |= quantised.fp8_blocks("model.layers.2.eh_proj.weight", torch.randn(64, 128), (32, 32))

    made = plan(own("fp8", add))
    assert made.jobs[0].header is not None
    entries = made.jobs[0].header.tensors
    assert entries["model.layers.2.eh_proj.weight"].dtype == "BF16"
    assert not any(info.dtype.startswith("F8") or "scale" in name for name, info in entries.items())


def test_a_float_called_scale_is_a_parameter(own: Callable[..., Path]) -> None:
    """`.scale` is also the name of real parameters: only one beside an FP8 weight is a part."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.norm.scale"] = torch.ones(64)
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)  # of the KV cache

    (job,) = plan(own("fp8", add)).jobs
    assert job.header is not None
    assert "model.layers.0.norm.scale" in job.header.tensors
    assert "model.layers.0.self_attn.k_scale" not in job.header.tensors


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "BF16"), ("float32", "F32"), ("float16", "F16")])
def test_all_that_becomes_dense_has_the_dtype_of_the_base(dtype: str, stored: str, sources: Mapping[str, Path]) -> None:
    made = plan(sources["fp8"], dtype=dtype, target=("q_proj",))
    infos = {n: i for job in made.jobs if job.header for n, i in job.header.tensors.items()}
    assert {infos[f"{Q0}.weight"].dtype, infos["model.layers.0.mlp.gate_proj.weight"].dtype} == {stored}
    assert infos["model.norm.weight"].dtype == "BF16"  # not quantised: copied
    config = json.loads(made.config_bytes)
    assert config["dtype"] == ("bfloat16" if dtype == "auto" else dtype)


def test_the_dtype_is_that_of_the_config_and_never_that_of_the_scales(own: Callable[..., Path]) -> None:
    folder = own("fp8")
    edit_json(folder / "config.json", dtype=None)
    made = plan(folder)  # then that of the other weights, and written down
    assert json.loads(made.config_bytes)["dtype"] == "bfloat16"
    edit_json(folder / "config.json", dtype="float16")
    assert {w.dtype for w in plan(folder).weights} == {"F16"}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bool"])
def test_a_dtype_that_dense_weights_cannot_have_is_refused(dtype: str, own: Callable[..., Path]) -> None:
    folder = own("fp8")
    edit_json(folder / "config.json", dtype=dtype)
    with pytest.raises(CheckpointError, match=f"names the dtype {dtype}"):
        plan(folder)


@pytest.mark.parametrize("listed", [5, "lm_head", {"a": 1}, [["lm_head"]], [None]])
def test_a_list_of_unquantised_modules_that_is_none_is_refused(listed: Any, own: Callable[..., Path]) -> None:
    folder = own("fp8", modules_to_not_convert=listed)
    with pytest.raises(PlanError, match=r"modules_to_not_convert in config\.json is"):
        plan(folder, base="mixed", target=("o_proj",))


def test_a_pattern_in_the_list_is_copied_and_never_run(own: Callable[..., Path]) -> None:
    pattern = "^(a+)+$|(x+x+)+y"
    folder = own("fp8", modules_to_not_convert=[pattern, "lm_head"])
    config = json.loads(plan(folder, base="mixed", target=("o_proj",)).config_bytes)
    listed = config["quantization_config"]["modules_to_not_convert"]
    assert listed[:2] == [pattern, "lm_head"]
    assert f"{Q0.replace('q_proj', 'o_proj')}" in listed


def test_a_file_of_scales_alone_has_no_file_in_the_base(tmp_path: Path) -> None:
    folder = quantised.save_fp8(
        tmp_path / "x", files=lambda name: "scales.safetensors" if "scale" in name else "model-1.safetensors"
    )
    made = plan(folder)
    assert [job.target for job in made.jobs] == ["model-1.safetensors"]
    assert made.index is not None
    weight_map = json.loads(made.index)["weight_map"]
    assert set(weight_map.values()) == {"model-1.safetensors"}
    assert not any("scale" in name for name in weight_map)


@pytest.mark.parametrize(
    ("kind", "target", "dense"),
    [
        ("fp8", "q_proj", {"q_proj", "k_proj", "v_proj"}),
        ("fp8", "o_proj", {"o_proj"}),
        ("fp8", "up_proj", {"gate_proj", "up_proj"}),
        ("int4", "down_proj", {"down_proj"}),
        ("gpt_oss", "q_proj", set()),
    ],
)
def test_a_mixed_base_keeps_all_that_need_not_be_dense(
    kind: str, target: str, dense: set[str], sources: Mapping[str, Path]
) -> None:
    """What vLLM fuses is dense together, and config.json lists it."""
    made = plan(sources[kind], base="mixed", target=(target,))
    stored = made.checkpoint.stored
    kept = {n: i for job in made.jobs if job.header for n, i in job.header.tensors.items()}
    modules = {n.removesuffix(".weight") for n in made.checkpoint.quantised.tensors if n.split(".")[-2] in dense}
    config = json.loads(made.config_bytes)["quantization_config"]
    listed = config["ignore" if kind == "int4" else "modules_to_not_convert"]
    assert modules <= set(listed)
    assert {"lm_head"} <= set(listed)
    for name, tensor in made.checkpoint.quantised.tensors.items():
        parts = {info.name for info in tensor.parts.values()}
        if name.removesuffix(".weight") in modules:
            assert kept[name].dtype == "BF16"
            assert parts.isdisjoint(kept.keys() - {name})
        else:
            assert all((kept[p].dtype, kept[p].shape) == (stored[p].dtype, stored[p].shape) for p in parts)
    sizes = made.base_sizes
    assert sizes["mixed"] == made.base_bytes < sizes["dense"]
    assert plan(sources[kind], target=(target,)).base_bytes == sizes["dense"]


def test_experts_are_dense_as_a_whole_and_cut_blocks_always(tmp_path: Path) -> None:
    source = quantised.save_fp8(tmp_path / "moe", "deepseek", block=16)
    made = plan(source, base="mixed", target=("experts.down_proj",))
    listed = json.loads(made.config_bytes)["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.1.mlp.experts" in listed
    assert "model.layers.1.mlp.shared_experts.gate_proj" not in listed
    cut = quantised.save_fp8(tmp_path / "cut", block=40)
    made = plan(cut, base="mixed", target=("q_proj",))
    assert "quantization_config" not in json.loads(made.config_bytes)  # all of it is cut short, so nothing is left


@pytest.mark.parametrize("kind", ["plain", "modelopt", "adapter only"])
def test_a_mixed_base_that_cannot_be_is_refused(kind: str, sources: Mapping[str, Path], tmp_path: Path) -> None:
    if kind == "adapter only":
        with pytest.raises(UsageError, match="writes no base"):
            plan(sources["fp8"], base="mixed", method="rlmo")
        return
    folder = tmp_path / kind
    source = quantised.save_model(folder, "llama") if kind == "plain" else quantised.save_modelopt(folder, "FP8")
    with pytest.raises(PlanError, match="--base mixed") as caught:
        plan(source, base="mixed")
    assert "--base" in caught.value.hint
    assert list(plan(source).base_sizes) == ([] if kind == "plain" else ["dense"])


def test_few_bits_are_told_and_eight_are_not(sources: Mapping[str, Path]) -> None:
    (told,) = [n for n in plan(sources["int4"]).notices if "stored in 4 bits" in n]
    assert "int4, groups of 32, asymmetric" in told
    assert not [n for n in plan(sources["fp8"]).notices if "bits" in n]
    assert not [n for n in plan(sources["int4"], mode="max").notices if "bits" in n]
    assert not [n for n in plan(sources["gpt_oss"], target=("q_proj",)).notices if "bits" in n]


def test_the_dtype_of_a_model_is_not_that_of_its_codes() -> None:
    config = {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "quantization_config": {"dtype": "int8"}}
    changed = with_dtype(config, "float16")
    assert changed["quantization_config"] == {"dtype": "int8"}
    assert (changed["dtype"], changed["text_config"]["dtype"]) == ("float16", "float16")
