"""folder: a checkpoint is read as transformers reads it; invalid or malicious content is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.reference import same_bytes

from milora_init.checkpoint.folder import SAFETENSORS_INDEX, Checkpoint, open_checkpoint, open_model, unloaded_weights
from milora_init.checkpoint.side_files import side_files
from milora_init.checkpoint.tensor_file import open_shard
from milora_init.errors import CheckpointError, UsageError

Built = Callable[..., Path]


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.headers:
        shard = open_shard(checkpoint.folder / file)
        found |= {name: shard.read(name) for name in shard.header.tensors}
        shard.close()
    return found


@pytest.fixture(params=["sharded", "single", "pickle", "sharded pickle"])
def form(request: pytest.FixtureRequest, checkpoint: Built, pickled: Built, tmp_path: Path) -> Path:
    """The tiny llama in each file format of a checkpoint."""
    if request.param == "sharded":
        return checkpoint("llama")
    if request.param == "single":
        return tiny_models.as_single_file(checkpoint("llama"), tmp_path / "single")
    return pickled(3 if request.param == "sharded pickle" else 1)


def test_every_tensor_of_every_file_format_is_read_unchanged(form: Path, checkpoint: Built) -> None:
    expected = tiny_models.tensors(checkpoint("llama"))
    opened = open_checkpoint(form)
    found = read_all(opened)
    assert found.keys() == expected.keys() == opened.tensors.keys()
    assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())
    assert {name: info.shape for name, info in opened.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }


def test_reading_a_tensor_returns_a_copy(form: Path) -> None:
    """Writing into it reaches neither the file nor the next read."""
    opened = open_checkpoint(form)
    shard = open_shard(form / next(iter(opened.headers)))
    name = next(iter(shard.header.tensors))
    before = shard.read(name)
    shard.read(name).zero_()
    assert same_bytes(shard.read(name), before)
    shard.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_is_read(dtype: str, checkpoint: Built) -> None:
    folder = checkpoint("llama", dtype)
    expected = tiny_models.tensors(folder)
    found = read_all(open_checkpoint(folder))
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())


def test_a_single_file_is_preferred_to_an_index(own: Built) -> None:
    folder = own("llama")
    save_file({"only": torch.ones(2)}, folder / "model.safetensors")
    opened = open_checkpoint(folder)
    assert list(opened.headers) == ["model.safetensors"]
    assert opened.index is None


def test_safetensors_are_preferred_to_pickles(own: Built) -> None:
    folder = own("llama")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert not open_checkpoint(folder).is_pickle


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent: no such folder"):
        open_checkpoint(tmp_path / "absent")


def test_a_folder_without_a_config_is_named(own: Built) -> None:
    folder = own("llama")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(folder)


def test_an_adapter_folder_is_refused_with_a_hint_to_its_original_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no config\.json") as caught:
        open_checkpoint(tmp_path)
    assert "original model" in caught.value.hint


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no weights") as caught:
        open_checkpoint(tmp_path)
    assert "gguf" in caught.value.hint


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
def test_an_invalid_config_is_refused(content: bytes, own: Built) -> None:
    folder = own("llama")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: not"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(own: Built) -> None:
    folder = own("llama")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_checkpoint(folder)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / SAFETENSORS_INDEX
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", "..", ".", "", "a\\b.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_refused(file: str, own: Built) -> None:
    folder = own("llama")
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "outside.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update(extra=file))
    with pytest.raises(CheckpointError, match="outside the folder") as caught:
        open_checkpoint(folder)
    assert repr(file) in caught.value.message


def test_an_index_that_mixes_formats_is_refused(own: Built) -> None:
    folder = own("llama")
    edit_index(folder, lambda index: index["weight_map"].update(extra="pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*another format"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"w": 1}, "text"])
def test_an_index_without_a_map_is_refused(weight_map: object, own: Built) -> None:
    folder = own("llama")
    edit_index(folder, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(folder)


def test_an_index_that_misplaces_a_tensor_is_refused(own: Built) -> None:
    folder = own("llama")
    index = json.loads((folder / SAFETENSORS_INDEX).read_text())["weight_map"]
    name, right = next((name, file) for name, file in index.items() if list(index.values()).count(file) > 1)
    wrong = next(file for file in index.values() if file != right)
    edit_index(folder, lambda content: content["weight_map"].update({name: wrong}))
    with pytest.raises(CheckpointError, match=f"puts {name} into {wrong}, it is in {right}"):
        open_checkpoint(folder)


def test_an_index_entry_without_a_tensor_is_unfilled(own: Built) -> None:
    folder = own("llama")
    file = next(folder.glob("*.safetensors")).name
    edit_index(folder, lambda content: content["weight_map"].update(invented=file))
    opened = open_checkpoint(folder)
    assert opened.missing_tensors == ("invented",)
    assert "invented" not in opened.tensors


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_without_their_index_are_refused(form: str, own: Built, pickled: Built, tmp_path: Path) -> None:
    folder = own("llama") if form == "safetensors" else Path(shutil.copytree(pickled(3), tmp_path / "own"))
    (index,) = folder.glob("*.index.json")
    index.unlink()
    with pytest.raises(CheckpointError, match=rf"-00001-of-\d+\.{form}, but no {index.name}") as caught:
        open_checkpoint(folder)
    assert f"fetch {index.name}" in caught.value.hint


@pytest.mark.parametrize("name", ["config.json", SAFETENSORS_INDEX])
def test_a_huge_json_file_is_refused_without_reading_it(name: str, own: Built) -> None:
    folder = own("llama")
    with (folder / name).open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file: it takes no space
    with pytest.raises(CheckpointError, match=rf"{name}: {1 << 40} bytes"):
        open_checkpoint(folder)


def test_a_checkpoint_folder_with_an_adapter_is_refused(own: Built) -> None:
    folder = own("llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json beside its weights: transformers would") as caught:
        open_model(folder)
    assert "merge it first" in caught.value.hint
    assert "move it away" in caught.value.hint


def test_other_weight_files_are_listed_as_left_out(own: Built) -> None:
    folder = own("llama")
    assert unloaded_weights(open_checkpoint(folder)) == []
    out = ["consolidated.safetensors", "model-mtp.safetensors", "model.GGUF", "pytorch_model.bin", "zero/", "original/"]
    for name in ("original", "zero", "assets", ".cache"):
        (folder / name).mkdir()
    for name in (*out[:4], "zero/optimizer.pt", "original/consolidated.00.pth", "assets/a.png", ".cache/x.bin"):
        (folder / name).write_bytes(b"x")
    assert unloaded_weights(open_checkpoint(folder)) == sorted(out)


def test_a_module_of_a_sentence_transformer_is_not_left_out(own: Built) -> None:
    folder = own("bert")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"x")
    (folder / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    assert unloaded_weights(open_checkpoint(folder)) == []


def test_a_tensor_in_two_shards_is_refused(own: Built) -> None:
    folder = own("llama")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, tensor = next(iter(tiny_models.tensors(folder).items()))
    content = {**load_file(second), name: tensor}
    save_file(content, second)
    with pytest.raises(CheckpointError, match=rf"{name} is in {first.name} and again in {second.name}"):
        open_checkpoint(folder)


class CreatesFileWhenUnpickled:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(pickled: Built, tmp_path: Path) -> None:
    shutil.copytree(pickled(1), tmp_path / "model")
    torch.save({"w": CreatesFileWhenUnpickled(tmp_path / "ran")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: torch\.load\(weights_only=True"):
        open_checkpoint(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "not a plain mapping"),
        ({"state_dict": {"w": torch.ones(2)}}, "not a plain mapping"),
        ({"w": torch.eye(3).to_sparse()}, "w is torch.float32 torch.sparse_coo"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "w is torch.complex128"),
    ],
)
def test_a_pickle_of_anything_but_plain_tensors_is_refused(
    content: object, message: str, pickled: Built, tmp_path: Path
) -> None:
    shutil.copytree(pickled(1), tmp_path / "model")
    torch.save(content, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")


def test_a_pickle_cut_short_is_refused(pickled: Built, tmp_path: Path) -> None:
    shutil.copytree(pickled(1), tmp_path / "model")
    path = tmp_path / "model" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="refuses it"):
        open_checkpoint(tmp_path / "model")


def test_the_digest_changes_with_the_weights_and_with_the_config(own: Built) -> None:
    folder = own("llama")
    before = dict(open_checkpoint(folder).digest)
    assert dict(open_checkpoint(folder).digest) == before
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n")
    after = open_checkpoint(folder).digest
    assert {name for name in before if before[name] != after[name]} == {shard.name, "config.json"}


def test_side_files_of_the_model_are_copied_and_other_files_are_not(own: Built) -> None:
    folder = own("llama")
    not_copied = ["adapter_config.json", "model.onnx", "model.gguf", "tf_model.h5", ".gitattributes", "README.fr.md"]
    copied = ["modeling_own.py", "chat_template.jinja", "vocab.txt", "special_tokens_map.json"]
    for name in (*not_copied, *copied):
        (folder / name).write_bytes(b"x")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_bytes(b"x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_bytes(b"x")
    given = {"LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(side_files(folder)) == given | set(copied) | {"additional_chat_templates/tool.jinja"}


def test_the_modules_of_a_sentence_transformer_are_copied(own: Built) -> None:
    folder = own("bert")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"x")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}, {"path": "3_Normalize"}, {}]))
    found = side_files(folder)
    assert "2_Dense/model.safetensors" in found


@pytest.mark.parametrize("content", [b"{", b"7", b"\xff"])
def test_a_broken_modules_json_is_named(content: bytes, own: Built) -> None:
    folder = own("bert")
    (folder / "modules.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        side_files(folder)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "config.json", SAFETENSORS_INDEX, "modules.json", "additional_chat_templates/tool.jinja",
     "additional_chat_templates", "1_Pooling/config.json", "1_Pooling", "1_Pooling/deep"],
)  # fmt: skip
def test_a_copied_file_that_is_a_link_out_of_the_folder_is_refused(name: str, own: Built) -> None:
    folder, secret = own("llama"), "my key"
    (folder.parent / "home").mkdir()
    (folder.parent / "home" / "id_rsa").write_text(secret)
    if "1_Pooling" in name:
        (folder / "modules.json").write_text('[{"path": "1_Pooling"}]')
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    leads_to_a_folder = path.name in ("additional_chat_templates", "1_Pooling", "deep")
    path.symlink_to(folder.parent / "home" / ("" if leads_to_a_folder else "id_rsa"))
    read = open_checkpoint if name in ("config.json", SAFETENSORS_INDEX) else side_files
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        read(folder)
    assert secret not in caught.value.message
    assert caught.value.hint


def test_a_chain_of_links_out_of_the_folder_and_a_loop_are_refused(own: Built) -> None:
    folder = own("llama")
    (folder / ".here").symlink_to(folder.parent / "id_rsa")
    (folder / "vocab.txt").symlink_to(".here")
    with pytest.raises(CheckpointError, match=r"vocab\.txt"):
        side_files(folder)
    (folder / "vocab.txt").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "again").symlink_to(".")
    with pytest.raises(CheckpointError, match="additional_chat_templates/again is a link to a folder"):
        side_files(folder)


def test_a_shard_may_be_a_link_out_of_the_folder(own: Built) -> None:
    folder = own("llama")
    shard = next(folder.glob("*.safetensors"))
    shard.rename(folder.parent / shard.name)
    shard.symlink_to(folder.parent / shard.name)
    assert open_checkpoint(folder).headers
    assert side_files(folder)


def test_a_link_within_the_folder_is_copied_like_a_file(own: Built) -> None:
    folder = own("llama")
    (folder / "vocab.txt").symlink_to("tokenizer.json")
    assert "vocab.txt" in side_files(folder)


@pytest.mark.parametrize("name", ["vocab.txt", "additional_chat_templates/tool.jinja"])
@pytest.mark.parametrize("kind", ["dangling", "pipe", "socket"])
def test_a_side_file_that_is_not_a_regular_file_is_refused(kind: str, name: str, own: Built) -> None:
    folder = own("llama")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    what = "a link to what is not there" if kind == "dangling" else "no plain file"
    with pytest.raises(CheckpointError, match=f"{path.name} is {what}") as caught:
        side_files(folder)
    assert caught.value.hint


@pytest.mark.parametrize(
    "path",
    ["lora", "Lora", "lora/deep", ".git", ".milora-init", "1_Pooling/.git", "../x", "/etc", "a/../..", "a\\b", "a\0b",
     "config.json", "adapter_config.json", "milora_init.json", "milora_merge.json", "README.md", SAFETENSORS_INDEX,
     "model-00001-of-00002.safetensors", "model.safetensors", ".", 5, None],
)  # fmt: skip
def test_a_module_path_that_is_reserved_hidden_or_outside_is_refused(path: object, own: Built) -> None:
    folder = own("llama")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": path}]))
    with pytest.raises(CheckpointError, match=r"modules\.json") as caught:
        side_files(folder)
    assert caught.value.hint


def test_each_side_file_is_listed_once_and_hidden_files_are_not(own: Built) -> None:
    folder = own("bert")
    for name in ("1_Pooling/config.json", "1_Pooling/deep/x.txt", "1_Pooling/.git/config", "1_Pooling/.token"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    modules = ["1_Pooling", "1_Pooling/deep", "1_Pooling", "tokenizer.json"]
    (folder / "modules.json").write_text(json.dumps([{"path": path} for path in modules]))
    found = side_files(folder)
    assert sorted(found) == sorted(set(found))
    assert [name for name in found if "/" in name] == ["1_Pooling/config.json", "1_Pooling/deep/x.txt"]


def test_a_file_called_lora_is_not_copied(own: Built) -> None:
    folder = own("llama")
    (folder / "lora").write_bytes(b"x")
    assert "lora" not in side_files(folder)
