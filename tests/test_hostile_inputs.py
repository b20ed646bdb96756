"""Malicious or damaged inputs: each is refused with a clear error, or has no effect."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import contents, edit_json

from milora_init.errors import CheckpointError, OutputError, PlanError
from milora_init.export.merge import merge
from milora_init.manifest import MANIFEST, Manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import make_plan
from milora_init.verification.verify import verify

Built = Callable[..., Path]
Start = Callable[..., Manifest]
WEIGHTS = "adapter_model.safetensors"


def changed_adapter(out: Path, to: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of the initial adapter with every tensor changed."""
    to.mkdir()
    (to / "adapter_config.json").write_bytes((out / "lora" / "adapter_config.json").read_bytes())
    tensors = {name: change(name, tensor) for name, tensor in load_file(out / "lora" / WEIGHTS).items()}
    save_file(tensors, to / WEIGHTS, metadata={"format": "pt"})
    return to


def test_a_pipe_named_like_the_manifest_is_refused_without_reading_it(own: Built) -> None:
    source = own("llama")
    os.mkfifo(source / MANIFEST)
    with pytest.raises(CheckpointError, match="residual base"):
        make_plan(InitOptions(model=str(source), out="out", rank=4), source)


def test_a_config_that_is_nested_too_deep_is_refused(own: Built) -> None:
    source = own("llama")
    content = json.loads((source / "config.json").read_text())
    for _ in range(400):
        content = {"text_config": content}
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="nested deeper than 100 levels"):
        make_plan(InitOptions(model=str(source), out="out", rank=4), source)


def test_a_hidden_shard_is_refused(own: Built) -> None:
    source = own("llama")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = next(iter(content["weight_map"].values()))
    (source / file).rename(source / f".{file}")
    renamed = {name: f".{file}" if at == file else at for name, at in content["weight_map"].items()}
    edit_json(index, weight_map=renamed)
    with pytest.raises(CheckpointError, match="hidden"):
        make_plan(InitOptions(model=str(source), out="out", rank=4), source)


@pytest.mark.parametrize("name", [".bashrc", "x/.git/hooks/post-checkout"])
def test_a_manifest_may_not_name_a_hidden_file_at_any_depth(name: str, out: Path) -> None:
    files = json.loads((out / MANIFEST).read_text())["files"]
    edit_json(out / MANIFEST, files=files | {name: 1})
    with pytest.raises(OutputError, match="hidden"):
        verify(str(out))


def test_an_adapter_at_the_root_of_a_pair_is_refused_by_merge(out: Path, tmp_path: Path) -> None:
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="transformers would load this adapter"):
        merge(str(out), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_with_a_direction_set_to_zero_is_refused(factor: str, out: Path, tmp_path: Path) -> None:
    def zeroed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor * 1.01
        if factor in name:
            tensor = tensor.clone()
            tensor[(0,) if factor == "lora_A" else (slice(None), 0)] = 0
        return tensor

    adapter = changed_adapter(out, tmp_path / "trained", zeroed)
    with pytest.raises(PlanError, match="directions are zero"):
        merge(str(out), str(tmp_path / "merged"), adapter=str(adapter))
    assert not verify(str(out), adapter=str(adapter)).ok


@pytest.mark.parametrize("factor", [0.5, 2.0, 5.0, 1000.0])
def test_the_initial_adapter_multiplied_by_a_number_is_refused(factor: float, out: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = changed_adapter(
        out,
        tmp_path / "trained",
        lambda _, tensor: factor * (tensor + 0.01 * tensor.abs().mean() * torch.randn_like(tensor)),
    )
    with pytest.raises(PlanError, match=r"times"):
        merge(str(out), str(tmp_path / "merged"), adapter=str(adapter))


def test_a_manifest_cannot_disable_the_check_of_a_trained_adapter(out: Path, tmp_path: Path) -> None:
    weights = json.loads((out / MANIFEST).read_text())["weights"]
    edit_json(out / MANIFEST, weights=[weight | {"untrainable": weight["rank"]} for weight in weights])
    torch.manual_seed(0)
    adapter = changed_adapter(out, tmp_path / "trained", lambda _, tensor: torch.randn_like(tensor))
    with pytest.raises(PlanError, match=r"unrelated|trained"):
        merge(str(out), str(tmp_path / "merged"), adapter=str(adapter))


def test_a_huge_adapter_config_is_refused_without_reading_it(out: Path, tmp_path: Path) -> None:
    adapter = changed_adapter(out, tmp_path / "trained", lambda _, tensor: tensor * 1.01)
    with (adapter / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file: it takes no space
    with pytest.raises(CheckpointError, match=f"{1 << 40} bytes, more than the limit of"):
        merge(str(out), str(tmp_path / "merged"), adapter=str(adapter))
    assert not verify(str(out), adapter=str(adapter)).ok


def test_a_config_with_more_layers_than_tensors_is_refused(own: Built) -> None:
    source = own("llama")
    edit_json(source / "config.json", num_hidden_layers=10**8)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 100000000"):
        make_plan(InitOptions(model=str(source), out="out", rank=4), source)


def test_the_output_of_a_private_model_has_private_permissions(start: Start, own: Built, tmp_path: Path) -> None:
    source = own("llama")
    for path in source.iterdir():
        path.chmod(0o600)
    umask = os.umask(0)
    try:
        start(source)
    finally:
        os.umask(umask)
    out = tmp_path / "out"
    for name in contents(out):
        if name != MANIFEST:
            assert stat.S_IMODE((out / name).stat().st_mode) == 0o600, name
