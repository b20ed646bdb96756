"""plan: everything is decided before anything is done, and the fingerprint holds what decides the bytes."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_models

from milora_init.checkpoint.folder import SAFETENSORS_INDEX
from milora_init.errors import CheckpointError, PlanError
from milora_init.export.merge import merge
from milora_init.options import InitOptions
from milora_init.plan.plan import Plan, describe, make_plan
from milora_init.run.pool import weights_in_memory

Built = Callable[..., Path]


def plan(folder: Path, **options: Any) -> Plan:
    given = {"out": "out", "rank": 4, "device": ("cpu",), **options}
    return make_plan(InitOptions(model=str(folder), **given), folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 5}, {"mode": "max"}, {"mode": "random"}, {"alpha": 8}, {"rslora": True}, {"dropout": 0.1},
        {"dtype": "float16"}, {"seed": 1}, {"target": ("q_proj",)}, {"exclude": ("q_proj",)},
    ],
    ids=str,
)  # fmt: skip
def test_the_fingerprint_changes_with_every_option_that_decides_the_output(
    change: dict[str, Any], checkpoint: Built
) -> None:
    folder = checkpoint("llama")
    assert plan(folder, **change).fingerprint != plan(folder).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"out": "elsewhere"}, {"device": ("auto",)}, {"overwrite": True}, {"token": "hf_x"}, {"cache_dir": "cache"},
        {"alpha": 4}, {"task_type": "CAUSAL_LM"},
        {"target": ("re:.*[qkv]_proj", "up_proj", "down_proj")},
    ],
    ids=str,
)  # fmt: skip
def test_the_fingerprint_does_not_change_with_what_leaves_the_output_as_it_is(
    change: dict[str, Any], checkpoint: Built
) -> None:
    folder = checkpoint("llama")
    assert plan(folder, **change).fingerprint == plan(folder).fingerprint


def test_the_fingerprint_changes_with_the_source(checkpoint: Built, own: Built) -> None:
    folder = own("llama")
    assert plan(folder).fingerprint == plan(checkpoint("llama")).fingerprint
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    assert plan(folder).fingerprint != plan(checkpoint("llama")).fingerprint


def test_no_secret_is_written_anywhere(checkpoint: Built) -> None:
    made = plan(checkpoint("llama"), token="hf_secret")
    assert "hf_secret" not in json.dumps(describe(made, 1, 0.0)) + json.dumps(made.inputs) + repr(made.options)


def test_planning_writes_nothing(own: Built, tmp_path: Path) -> None:
    folder = own("llama")
    before = tiny_models.contents(tmp_path)
    plan(folder, out=str(tmp_path / "out"))
    assert tiny_models.contents(tmp_path) == before


def test_a_rank_too_high_names_the_smallest_weight_and_its_shape(checkpoint: Built) -> None:
    with pytest.raises(PlanError) as caught:
        plan(checkpoint("llama"), rank=20, target=("q_proj", "v_proj", "up_proj"))
    assert "rank 20 is above the 16 that model.layers.0.self_attn.v_proj allows" in caught.value.message
    assert "[16, 32]" in caught.value.message
    assert caught.value.hint == "--rank 16, or --exclude v_proj, or a rank_pattern for them in a recipe"


def test_a_rank_of_a_pattern_that_is_too_high_is_told_from_the_rank(checkpoint: Built) -> None:
    with pytest.raises(PlanError) as caught:
        plan(checkpoint("llama"), rank=4, target=("k_proj",), rank_pattern={"k_proj": 20})
    assert caught.value.hint == "lower the rank in rank_pattern, to 16 or less"


def test_a_rank_as_high_as_the_smallest_weight_is_planned(checkpoint: Built) -> None:
    made = plan(checkpoint("llama"), rank=16)
    assert min(min(w.weight.shape) for w in made.weights) == 16
    assert any("takes all components of 4 weights, and none stays in the base" in notice for notice in made.notices)
    assert not any("stays in the base" in notice for notice in plan(checkpoint("llama"), rank=15).notices)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_a_packed_weight_is_refused_by_name(dtype: torch.dtype, own: Built) -> None:
    folder = own("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = tiny_models.tensors(folder)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=f"{name} is stored as") as caught:
        plan(folder)
    assert "unquantised" in caught.value.hint


def test_a_packed_weight_is_told_where_it_is_not_targeted(own: Built) -> None:
    folder = own("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = tiny_models.tensors(folder)
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert any(
        f"1 tensors look quantised (packed), the first is {name}" in notice
        for notice in plan(folder, target=("v_proj",)).notices
    )
    with pytest.raises(PlanError, match="packed"):
        plan(folder, target=("q_proj",))


@pytest.mark.parametrize("form", ["another shape", "another name"])
def test_a_packed_weight_is_called_packed(form: str, own: Built) -> None:
    """As bitsandbytes and GPTQ store it."""
    folder = own("llama")
    tensors = tiny_models.tensors(folder)
    for name in [name for name in tensors if "q_proj" in name]:
        packed = torch.zeros(tensors.pop(name).numel() // 8, 1, dtype=torch.int32)
        tensors[name if form == "another shape" else name.replace("weight", "qweight")] = packed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, PlanError), match=r"q_proj(\.weight)? is packed") as caught:
        plan(folder, target=("q_proj",))
    assert "different models" not in caught.value.hint


def test_the_mask_of_an_old_gpt2_is_not_called_packed(own: Built) -> None:
    folder = own("gpt2")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
    save_file(tiny_models.tensors(folder) | mask, folder / "model.safetensors", metadata={"format": "pt"})
    assert not any("packed" in notice for notice in plan(folder, target=("c_attn",)).notices)


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_config_json_keeps_every_byte_unless_its_dtype_changes(source: str, dtype: str, checkpoint: Built) -> None:
    folder = checkpoint("llama", source)
    before = (folder / "config.json").read_bytes()
    after = plan(folder, dtype=dtype).config_bytes
    if dtype in ("auto", source):
        assert after == before
    else:
        assert json.loads(after) == {**json.loads(before), "dtype": dtype}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": None, "torch_dtype": "float32"}, {"torch_dtype": "float16"}),
        ({"dtype": None, "torch_dtype": None}, {"dtype": "float16"}),
        ({"torch_dtype": "float32"}, {"dtype": "float16", "torch_dtype": "float16"}),
        ({"nested": {"dtype": "float32", "n": 1}}, {"dtype": "float16", "nested": {"dtype": "float16", "n": 1}}),
    ],
)
def test_config_json_says_its_dtype_wherever_it_stands(
    changes: dict[str, Any], expected: dict[str, Any], own: Built
) -> None:
    folder = own("llama")
    tiny_models.edit_json(folder / "config.json", **changes)
    before = json.loads((folder / "config.json").read_text())
    assert json.loads(plan(folder, dtype="float16").config_bytes) == before | expected


def test_shards_and_headers_stay_as_they_are_where_no_dtype_changes(checkpoint: Built) -> None:
    folder = checkpoint("llama", "bfloat16")
    made = plan(folder)
    assert [job.target for job in made.jobs] == [path.name for path in sorted(folder.glob("*.safetensors"))]
    assert len(made.jobs) > 2
    for job in made.jobs:
        assert job.header
        assert (folder / job.target).read_bytes().startswith(job.header.raw)
    assert made.index == (folder / SAFETENSORS_INDEX).read_bytes()


def test_the_index_follows_a_new_dtype(own: Built) -> None:
    folder = own("llama", "bfloat16")
    path = folder / SAFETENSORS_INDEX
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "own": 1, "metadata": {"total_size": 0, "total_parameters": 7}}))
    made = plan(folder, dtype="float32")
    assert made.index is not None
    index = json.loads(made.index)
    sizes = {name: tensor.nbytes for name, tensor in tiny_models.tensors(folder).items()}
    doubled = {w.weight.tensor for w in made.weights}
    expected = sum(size * (2 if name in doubled else 1) for name, size in sizes.items())
    assert index == {
        "own": 1,
        "metadata": {"total_size": expected, "total_parameters": 7},
        "weight_map": before["weight_map"],
    }


def test_pickles_become_safetensors_under_transformers_names(pickled: Built) -> None:
    single = plan(pickled(1))
    assert [job.target for job in single.jobs] == ["model.safetensors"]
    assert single.index is None
    sharded = plan(pickled(3))
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [job.target for job in sharded.jobs] == names
    assert sharded.index is not None
    before = json.loads((pickled(3) / "pytorch_model.bin.index.json").read_text())
    assert json.loads(sharded.index) == {
        **before,
        "weight_map": {
            name: file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            for name, file in before["weight_map"].items()
        },
    }
    assert "pytorch_model.bin.index.json" not in sharded.files


def test_every_weight_has_one_job_and_every_job_its_own_weights(checkpoint: Built) -> None:
    made = plan(checkpoint("llama"))
    done = [w.weight.module for job in made.jobs for w in job.splits]
    assert sorted(done) == sorted(w.weight.module for w in made.weights)
    assert all(job.header and name in job.header.tensors for job in made.jobs for name in job.weights)
    assert len({w.seed for w in made.weights}) == len(made.weights)


def test_a_job_can_travel_to_another_machine(checkpoint: Built) -> None:
    for job in plan(checkpoint("llama"), dtype="float16").jobs:
        assert pickle.loads(pickle.dumps(job)) == job


def test_a_single_file_beside_an_index_is_noticed(own: Built) -> None:
    folder = own("llama")
    assert plan(folder).notices == ()
    save_file(tiny_models.tensors(folder), folder / "model.safetensors", metadata={"format": "pt"})
    ignored, left = plan(folder).notices
    assert "the index is ignored" in ignored
    assert left.startswith("not copied, because transformers does not load them: model-00001-of-00010.safetensors, ")
    assert left.endswith(" and 2 more")


def name_in_the_index(folder: Path, name: str, *, of: str = SAFETENSORS_INDEX) -> str:
    """Let the index name one more tensor; returns the file it is said to be in."""
    index = json.loads((folder / of).read_text())
    file = str(max(index["weight_map"].values()))
    index["weight_map"][name] = file
    (folder / of).write_text(json.dumps(index))
    return file


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.9.x"])
def test_a_tensor_that_only_the_index_names_is_left_out_where_no_module_wants_it(name: str, own: Built) -> None:
    folder = own("llama")
    before = json.loads((folder / SAFETENSORS_INDEX).read_text())["weight_map"]
    name_in_the_index(folder, name)
    made = plan(folder)
    (notice,) = made.notices
    assert f"the index names {name}, which no file has" in notice
    assert made.index is not None
    assert json.loads(made.index)["weight_map"] == before


def test_the_same_holds_for_pickles(pickled: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pickled(3), tmp_path / "own"))
    name_in_the_index(folder, "mtp.fc.weight", of="pytorch_model.bin.index.json")
    made = plan(folder)
    assert made.index is not None
    assert b"mtp" not in made.index
    assert "mtp.fc.weight" in made.notices[0]


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_that_only_the_index_names_is_missed_where_a_module_wants_it(name: str, own: Built) -> None:
    folder = own("llama")
    file = json.loads((folder / SAFETENSORS_INDEX).read_text())["weight_map"][name]
    kept = {key: tensor for key, tensor in load_file(folder / file).items() if key != name}
    save_file(kept, folder / file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"the index names {name}, which LlamaForCausalLM needs"):
        plan(folder)


def test_a_tied_head_that_only_the_index_names_is_not_missed(own: Built) -> None:
    folder = own("tied llama")
    name_in_the_index(folder, "lm_head.weight")
    assert "lm_head.weight" in plan(folder, target=("q_proj",)).notices[0]


def test_a_tensor_that_the_index_does_not_name_is_kept_as_transformers_keeps_it(own: Built) -> None:
    folder = own("llama")
    index = json.loads((folder / SAFETENSORS_INDEX).read_text())
    del index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index))
    assert "model.layers.0.self_attn.q_proj" in {w.weight.module for w in plan(folder).weights}
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path).model.layers[0].self_attn.q_proj.weight
        for path in (tiny_models.save(folder.parent / "whole", "llama", torch.float32), folder)
    )
    assert torch.equal(before, after)


def test_weights_beside_the_model_are_noticed(own: Built) -> None:
    folder = own("llama")
    save_file({"mtp.weight": torch.ones(2)}, folder / "model-mtp.safetensors")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    assert plan(folder).notices == (
        "not copied, because transformers does not load them: model-mtp.safetensors, original/",
    )


def test_a_residual_is_not_split_again(start: Callable[..., Any], checkpoint: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(checkpoint("llama"))
    with pytest.raises(CheckpointError, match=r"holds milora_init\.json: it is a residual base") as caught:
        plan(out)
    assert caught.value.hint.endswith(f"--model {checkpoint('llama')}")
    for content in ("{", "[]", '{"source": 1}', '{"source": {"model": 7}}', ""):
        (out / "milora_init.json").write_text(content)
        with pytest.raises(CheckpointError, match="it is a residual base"):
            plan(out)
    edited = json.dumps({"source": {"model": "x\n::stop-commands::y\x1b[0m" + "z" * 5000}})
    (out / "milora_init.json").write_text(edited)
    with pytest.raises(CheckpointError) as caught:
        plan(out)
    assert caught.value.hint.isprintable()
    assert len(caught.value.hint) < 400
    (out / "milora_init.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds lora/adapter_config\.json") as caught:
        plan(out)
    assert "move it away" in caught.value.hint


def test_a_merged_output_is_a_model_like_another(start: Callable[..., Any], checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama"))
    merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    assert plan(tmp_path / "merged").weights


def test_a_model_with_an_adapter_over_it_is_not_split(own: Built) -> None:
    folder = own("llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="transformers would load this adapter"):
        plan(folder)


def test_a_config_that_would_round_the_residuals_again_is_noticed(own: Built) -> None:
    folder = own("llama")
    tiny_models.edit_json(folder / "config.json", dtype="bfloat16")
    (notice,) = plan(folder).notices
    assert "residuals are stored as float32, but config.json says bfloat16" in notice
    assert "`--dtype float32`" in notice
    assert plan(folder, dtype="float32").notices == ()


def test_the_sizes_promised_are_the_sizes_made(start: Callable[..., Any], checkpoint: Built, tmp_path: Path) -> None:
    folder = checkpoint("llama", "bfloat16")
    described = describe(plan(folder, dtype="float32", out=str(tmp_path / "out")), 1, 0.0)
    start(folder, dtype="float32")
    made = tiny_models.contents(tmp_path / "out")
    assert set(described["files"]) == set(made)
    assert described["adapter_bytes"] == len(made["lora/adapter_model.safetensors"])
    assert {s["target"]: s["bytes"] for s in described["shards"]} == {
        name: len(content) for name, content in made.items() if name.startswith("model-") and "index" not in name
    }
    assert described["base_bytes"] == sum(shard["bytes"] for shard in described["shards"])
    assert described["source_bytes"] == sum(tensor.nbytes for tensor in tiny_models.tensors(folder).values())
    json.dumps(described)


# The process's own account where the system keeps one: getrusage charges a child for what its parent held.
PEAK = """
import pathlib, re, resource, sys
from milora_init.cli.main import run

if status := run(sys.argv[1:]):
    sys.exit(status)
account = pathlib.Path("/proc/self/status")
peak_kib = re.search(r"VmHWM:\\s+(\\d+)", account.read_text())[1] if account.exists() else None
peak_bytes = int(peak_kib) << 10 if peak_kib else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak_bytes)
"""


@pytest.mark.wide
def test_the_memory_promised_is_the_memory_used(tmp_path: Path) -> None:
    """Within 30 %, for weights large enough to matter beside the libraries."""
    folder = tmp_path / "model"
    make_checkpoint.make(folder, size="1b-layer")
    made = plan(folder, rank=64, target=("up_proj", "q_proj"))
    promised = made.peak_memory_bytes(*weights_in_memory(made))
    arguments = ["--model", folder, "--out", tmp_path / "out", "--rank", "64", "--target", "up_proj"]
    arguments += ["--target", "q_proj", "--device", "cpu", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)], stdout=subprocess.PIPE, check=True, text=True
    )
    assert promised == pytest.approx(int(done.stdout), rel=0.3)
