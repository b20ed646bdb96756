"""The files of a merged model: --dtype, --shard-size, the index, and the files beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.family_training import initialize_family, load, train
from support.marks import wide
from support.tiny_models import contents, tensors
from support.training import train as train_pair

from milora_init.api import verify
from milora_init.cli.main import run
from milora_init.errors import OutputError, SolveError, UsageError
from milora_init.export.merge import merge
from milora_init.manifest import Manifest
from milora_init.records import MERGED

Built = Callable[..., Path]
Start = Callable[..., Manifest]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [wide("llama", "float32"), ("gpt2", "float16"), ("mixtral", "float32"), wide("llava", "float16")],
)
def test_the_merged_model_is_written_in_the_dtype_that_was_asked_for(name: str, dtype: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    _, out, _ = initialize_family(name, tmp_path, "bfloat16")
    trained = train(family, out, tmp_path / "trained")
    exact = dict(load(family, out, trained).merge_and_unload().state_dict())  # in float32, as loaded
    merge(str(out), str(tmp_path / "merged"), adapter=str(trained), dtype=dtype)
    assert {tensor.dtype for tensor in tensors(tmp_path / "merged").values()} == {getattr(torch, dtype)}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    half_ulp = torch.finfo(getattr(torch, dtype)).eps / 2
    for parameter, value in load(family, tmp_path / "merged").state_dict().items():
        off = (value - exact[parameter]).abs() - half_ulp * exact[parameter].abs()
        assert float(off.max()) < 1e-6, parameter
    assert verify(tmp_path / "merged", model=tmp_path / "source").ok


def test_tensors_of_another_dtype_than_the_model_keep_it(own: Built, start: Start, tmp_path: Path) -> None:
    source = own("llama", "bfloat16")
    shard = next(path for path in sorted(source.glob("*.safetensors")) if "model.norm.weight" in load_file(path))
    stored = load_file(shard)
    save_file({**stored, "model.norm.weight": stored["model.norm.weight"].float()}, shard, metadata={"format": "pt"})
    start(source)
    merge(str(tmp_path / "out"), str(tmp_path / "merged"), dtype="float16")
    found = tensors(tmp_path / "merged")
    assert {name for name, tensor in found.items() if tensor.dtype != torch.float16} == {"model.norm.weight"}


def test_a_value_that_overflows_the_dtype_names_the_tensor(own: Built, start: Start, tmp_path: Path) -> None:
    source = own("llama", "bfloat16")
    shard = next(path for path in sorted(source.glob("*.safetensors")) if "model.norm.weight" in load_file(path))
    stored = load_file(shard)
    stored["model.norm.weight"][3] = 1e6
    save_file(stored, shard, metadata={"format": "pt"})
    start(source)
    with pytest.raises(SolveError, match=r"model\.norm\.weight cannot be merged: it overflows float16"):
        merge(str(tmp_path / "out"), str(tmp_path / "merged"), dtype="float16")
    assert not (tmp_path / "merged" / "config.json").exists()


@pytest.mark.parametrize(
    ("kind", "size", "most"), [("llama", "9kB", 9000), ("gpt2", "20 KB", 20000), ("llama", "1GB", 10**9)]
)
def test_shards_are_split_again_and_the_index_names_every_tensor(
    kind: str, size: str, most: int, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    source = checkpoint(kind)
    start(source, target=("all-linear",))
    trained = train_pair(tmp_path / "out", tmp_path / "trained", steps=2)
    merge(str(tmp_path / "out"), str(tmp_path / "whole"), adapter=str(trained))
    merged = merge(str(tmp_path / "out"), str(tmp_path / "merged"), adapter=str(trained), shard_size=size)
    whole, split = tensors(tmp_path / "whole"), tensors(tmp_path / "merged")
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    for shard in shards:
        sizes = [tensor.nbytes for tensor in load_file(shard).values()]
        assert sum(sizes) <= most or len(sizes) == 1
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = tmp_path / "merged" / "model.safetensors.index.json"
    if len(shards) == 1:
        assert shards[0].name == "model.safetensors"
        assert not index.exists()
    else:
        content = json.loads(index.read_text())
        assert content["weight_map"] == {n: s.name for s in shards for n in load_file(s)}
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in split.values())
    assert set(merged.files) == {n for n in contents(tmp_path / "merged") if n != MERGED}
    assert verify(tmp_path / "merged", model=source).ok


def test_a_damaged_shard_of_the_base_is_refused_also_when_shards_are_split(out: Path, tmp_path: Path) -> None:
    path = sorted(out.glob("model-*.safetensors"))[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Exception, match="is not the file that milora-init wrote"):
        merge(str(out), str(tmp_path / "merged"), shard_size="1GB")
    assert not (tmp_path / "merged" / "config.json").exists()


def test_generation_config_chat_template_and_processor_are_kept(own: Built, start: Start, tmp_path: Path) -> None:
    source = own("llama")
    kept = {
        "generation_config.json": b'{"temperature": 0.5}', "chat_template.jinja": b"{{ messages }}",
        "preprocessor_config.json": b"{}", "processor_config.json": b"{}",
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
    }  # fmt: skip
    (source / "additional_chat_templates").mkdir()
    for name, content in kept.items():
        (source / name).write_bytes(content)
    start(source)
    trained = train_pair(tmp_path / "out", tmp_path / "trained", steps=1)
    (trained / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    (trained / "chat_template.jinja").write_text("new")
    merge(str(tmp_path / "out"), str(tmp_path / "merged"), adapter=str(trained))
    merged = contents(tmp_path / "merged")
    assert {name: merged[name] for name in kept} == kept
    assert merged["tokenizer_config.json"] == contents(source)["tokenizer_config.json"]

    merge(str(tmp_path / "out"), str(tmp_path / "asked"), adapter=str(trained), tokenizer=str(trained))
    asked = contents(tmp_path / "asked")
    assert asked["chat_template.jinja"] == b"new"
    assert asked["generation_config.json"] == kept["generation_config.json"]
    assert "additional_chat_templates/tools.jinja" not in asked, "the tokenizer's files are replaced together"
    with pytest.raises(OutputError, match="another request"):  # another tokenizer is another merge
        merge(str(tmp_path / "out"), str(tmp_path / "asked"), adapter=str(trained))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype 'int8' is not known"),
        ({"shard_size": "big"}, "--shard-size 'big' is no size"),
        ({"shard_size": "0GB"}, "--shard-size '0GB' is no size"),
        ({"tokenizer": "absent"}, "--tokenizer absent: no tokenizer there"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str, out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        merge(str(out), str(tmp_path / "merged"), **options)
    assert message in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "merged").exists()


def test_the_command_takes_these_options(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "merge",
        str(out),
        "--out",
        str(tmp_path / "merged"),
        "--dtype",
        "float16",
        "--shard-size",
        "1GB",
    ]
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "unchanged"
