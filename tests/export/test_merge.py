"""merge: base and adapter become one plain model that computes what the pair computes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.marks import wide
from support.tiny_models import TARGETS, contents, tensors
from support.training import digests, load, logits, train

from milora_init.api import convert
from milora_init.cli.main import run
from milora_init.errors import CheckpointError, OutputError, PlanError, UsageError
from milora_init.export.merge import merge
from milora_init.export.merge_weight import merged_weight
from milora_init.manifest import WORK_FOLDER, Manifest
from milora_init.records import MERGED
from milora_init.run.shard import ShardWriter
from milora_init.verification.verify import verify

Built = Callable[..., Path]
Start = Callable[..., Manifest]

pytestmark = pytest.mark.usefixtures("file_by_file")


def model_files(folder: Path) -> dict[str, bytes]:
    """Every file of a merge except its record, which holds paths and times."""
    return {name: content for name, content in contents(folder).items() if name != MERGED}


@pytest.mark.parametrize(
    ("kind", "rslora"),
    [("llama", True), wide("llama", False), wide("qwen2", True), wide("gpt2", True), ("gpt2", False)],
)
def test_the_merged_model_computes_what_the_trained_pair_computes(
    kind: str, rslora: bool, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    source, out = checkpoint(kind), tmp_path / "out"
    start(source, alpha=6, rslora=rslora, target=TARGETS[kind])
    trained = train(out, tmp_path / "trained")
    inputs = digests(source, out, trained)

    merged = merge(str(out), str(tmp_path / "merged"), adapter=str(trained))

    assert digests(source, out, trained) == inputs
    assert set(model_files(tmp_path / "merged")) == {n for n in contents(source) if n != "README.md"}
    assert merged.files == {name: len(content) for name, content in model_files(tmp_path / "merged").items()}
    pair, plain = logits(load(out, trained)), logits(load(tmp_path / "merged"))
    assert (logits(load(source)) - pair).abs().max() > 0.1, "the training changed nothing"
    torch.testing.assert_close(plain, pair, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain, logits(load(out, trained).merge_and_unload()), rtol=1e-4, atol=1e-4)
    convert(out / "lora", trained, tmp_path / "plain")
    torch.testing.assert_close(plain, logits(load(source, tmp_path / "plain")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("residual", ["auto", "float32"])
def test_merging_the_untrained_adapter_restores_the_source(
    dtype: str, residual: str, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    """Adapted weights up to the rounding of the residual, at most one ulp; all other tensors byte for byte."""
    source = checkpoint("llama", dtype)
    manifest = start(source, dtype=residual)
    merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    before, after = tensors(source), tensors(tmp_path / "merged")
    adapted = {record.tensor for record in manifest.weights}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name not in adapted:
            assert tensor.dtype == after[name].dtype
            assert torch.equal(tensor, after[name])
            continue
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(after[name], tensor, rtol=eps, atol=eps * float(tensor.abs().max()))
        if residual == "float32" and dtype != "float32":
            assert torch.equal(after[name], tensor)  # a float32 residual keeps enough bits for a 16-bit sum
    read = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert read == json.loads((source / "config.json").read_text())
    total = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in after.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_adapter_of_another_dtype_is_merged_with_the_same_accuracy(
    dtype: torch.dtype, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    """PEFT saves adapters in the dtype of the training; with autocast_adapter_dtype=False that is the base's dtype."""
    manifest = start(checkpoint("llama", "bfloat16"))
    trained = shutil.copytree(tmp_path / "out" / "lora", tmp_path / "trained")
    weights = load_file(trained / "adapter_model.safetensors")
    factors = {key: (factor * 1.25).to(dtype) for key, factor in weights.items()}
    save_file(factors, trained / "adapter_model.safetensors", metadata={"format": "pt"})
    merge(str(tmp_path / "out"), str(tmp_path / "merged"), adapter=str(trained))
    base, merged = tensors(tmp_path / "out"), tensors(tmp_path / "merged")
    for record in manifest.weights:
        B, A = (factors[f"base_model.model.{record.module}.lora_{name}.weight"].double() for name in "BA")
        exact = base[record.tensor].double() + B @ A
        off = (merged[record.tensor].double() - exact).abs()
        half_ulp = torch.ldexp(torch.full_like(exact, 2.0**-9), torch.frexp(exact).exponent)
        assert float((off - half_ulp - 2.0**-22 * exact.abs().max()).max()) <= 0, record.module


def test_the_sum_is_rounded_once() -> None:
    """1 + 2^-8 is the midpoint of two bfloat16 values, and 2^-30 more must round up. All sums are exact."""
    residual, B, A = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 2), torch.tensor([[2.0**-8], [2.0**-30]])
    merged = merged_weight(residual, B, A, 1.0, torch.bfloat16)
    assert float(merged) == 1 + 2.0**-7
    assert float(merged_weight(residual, B[:, :1], A[:1], 1.0, torch.bfloat16)) == 1.0  # to even


def test_an_interrupted_merge_is_resumed_by_the_same_command(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tmp_path / "merged"
    merge(str(out), str(tmp_path / "uninterrupted"))
    whole, real = model_files(tmp_path / "uninterrupted"), ShardWriter.finish
    made: list[str] = []
    interrupt_at = 2  # finished files

    def cut_off(shard: ShardWriter[None], *cancelled: Any) -> Any:
        if len(made) == interrupt_at:
            raise KeyboardInterrupt
        made.append(shard.name)
        return real(shard, *cancelled)

    monkeypatch.setattr(ShardWriter, "finish", cut_off)
    with pytest.raises(KeyboardInterrupt):
        merge(str(out), str(merged))
    assert not (merged / "config.json").exists()
    assert not (merged / "model.safetensors.index.json").exists()
    assert (merged / WORK_FOLDER).is_dir()
    interrupt_at = len(whole)
    merge(str(out), str(merged))
    assert model_files(merged) == whole
    assert len(made) == len(set(made)), "a file was written twice"


def no_shard(out: Path, trained: Path) -> None:
    next(out.glob("model-*.safetensors")).unlink()


def no_manifest(out: Path, trained: Path) -> None:
    (out / "milora_init.json").unlink()


def a_key_missing(out: Path, trained: Path) -> None:
    weights = load_file(trained / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, trained / "adapter_model.safetensors")


def a_key_too_many(out: Path, trained: Path) -> None:
    weights = load_file(trained / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    save_file(weights, trained / "adapter_model.safetensors")


def of_another_base(out: Path, trained: Path) -> None:
    weights = load_file(trained / "adapter_model.safetensors")
    save_file({key: torch.randn_like(value) for key, value in weights.items()}, trained / "adapter_model.safetensors")


def with_dora(out: Path, trained: Path) -> None:
    tiny_models.edit_json(trained / "adapter_config.json", use_dora=True)


def not_finite(out: Path, trained: Path) -> None:
    weights = load_file(trained / "adapter_model.safetensors")
    key = min(weights)
    weights[key][0, 0] = torch.inf
    save_file(weights, trained / "adapter_model.safetensors")


def another_initial(out: Path, trained: Path) -> None:
    weights = load_file(out / "lora" / "adapter_model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, out / "lora" / "adapter_model.safetensors")


def another_scale(out: Path, trained: Path) -> None:
    for folder in (out / "lora", trained):
        tiny_models.edit_json(folder / "adapter_config.json", lora_alpha=8)


def trained_elsewhere(out: Path, trained: Path) -> None:
    other = shutil.copytree(out, out.parent / "other")
    tiny_models.edit_inputs(other / "milora_init.json", seed=1)
    tiny_models.edit_json(trained / "adapter_config.json", base_model_name_or_path=str(other))


def pickled(out: Path, trained: Path) -> None:
    (trained / "adapter_model.safetensors").rename(trained / "adapter_model.bin")


def odd_parameters(out: Path, trained: Path) -> None:
    tiny_models.edit_json(trained / "adapter_config.json", target_parameters=5)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (no_shard, CheckpointError, "was changed or removed|no such|missing"),
        (no_manifest, OutputError, "no milora_init.json"),
        (a_key_missing, CheckpointError, "incomplete"),
        (a_key_too_many, PlanError, "lm_head"),
        (of_another_base, PlanError, "unrelated to the initial adapter"),
        (with_dora, CheckpointError, "lora_magnitude_vector"),
        (not_finite, PlanError, "NaN or infinite"),
        (another_initial, PlanError, "is not the adapter that milora-init wrote"),
        (another_scale, PlanError, "the output was made with scale 1"),
        (trained_elsewhere, PlanError, "another output of milora-init"),
        (pickled, CheckpointError, "only adapter_model.bin"),
        (odd_parameters, CheckpointError, "target_parameters is 5"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_pair_or_adapter_is_refused_and_nothing_is_written(
    damage: Callable[[Path, Path], None], error: type[Exception], words: str, out: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(out / "lora", trained)
    damage(out, trained)
    with pytest.raises(error, match=words):
        merge(str(out), str(tmp_path / "merged"), adapter=str(trained))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("inside", ["config.json", "model-00001-of-00002.safetensors", "milora_init.json"])
def test_an_output_folder_that_is_not_empty_is_refused_and_unchanged(inside: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / inside).write_bytes(b"mine")
    with pytest.raises(OutputError):
        merge(str(out), str(tmp_path / "merged"))
    assert contents(tmp_path / "merged") == {inside: b"mine"}


def test_an_output_at_or_inside_the_base_is_refused(out: Path) -> None:
    before = contents(out)
    with pytest.raises(OutputError):
        merge(str(out), str(out))
    with pytest.raises(OutputError):
        merge(str(out), str(out / "merged"))
    assert contents(out) == before


def test_a_finished_merge_is_unchanged_and_another_request_is_refused(
    checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    source, out, merged = checkpoint("llama"), tmp_path / "out", tmp_path / "merged"
    start(source)
    trained = train(out, tmp_path / "trained")
    first = merge(str(out), str(merged))
    before = {path: path.stat().st_mtime_ns for path in merged.iterdir()}
    assert merge(str(out), str(merged)) == dataclasses.replace(first, unchanged=True)
    assert {path: path.stat().st_mtime_ns for path in merged.iterdir()} == before
    with pytest.raises(OutputError, match="another request: it was made of another adapter") as caught:
        merge(str(out), str(merged), adapter=str(trained))
    assert "--overwrite" in caught.value.hint
    assert {path: path.stat().st_mtime_ns for path in merged.iterdir()} == before
    second = merge(str(out), str(merged), adapter=str(trained), overwrite=True)
    assert second.fingerprint != first.fingerprint
    torch.testing.assert_close(logits(load(merged)), logits(load(out, trained)), rtol=1e-4, atol=1e-4)
    (merged / "tokenizer.json").unlink()
    with pytest.raises(OutputError, match=r"tokenizer\.json has since been changed or removed"):
        merge(str(out), str(merged), adapter=str(trained))


def test_the_merge_command_prints_json_progress_and_a_summary(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", str(out), "--out", str(tmp_path / "merged"), "--json"]) == 0
    answer, lines = capsys.readouterr()
    said = json.loads(answer)
    assert (said["command"], said["status"], said["modules"]) == ("merge", "done", 10)
    assert lines == ""
    shards = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert run(["merge", str(out), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run(["merge", str(out), "--out", str(tmp_path / "third")]) == 0
    summary, lines = capsys.readouterr()
    assert "10 modules merged" in summary
    assert [line.split()[1] for line in lines.splitlines()] == [f"{shard}:" for shard in shards]
    total = lines.split(" of ")[-1].strip()
    assert lines.endswith(f"{total} of {total}\n")


def test_merge_counts_the_entries_that_equal_the_original(
    checkpoint: Built, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, to = checkpoint("llama", "bfloat16"), str(tmp_path / "out"), tmp_path / "merged"
    manifest = start(source)
    with pytest.raises(CheckpointError, match="another model, or another commit"):
        merge(out, str(to), model=str(checkpoint("llama")))
    assert not to.exists()
    assert merge(out, str(to)).bit_equal is None
    said = merge(out, str(to), model=str(source))
    before, after = tensors(source), tensors(to)
    equal = [before[r.tensor].view(torch.int16) == after[r.tensor].view(torch.int16) for r in manifest.weights]
    assert (said.bit_equal, said.entries) == (sum(int(e.sum()) for e in equal), sum(e.numel() for e in equal))
    assert said.bit_equal is not None
    assert 0 < said.bit_equal < said.entries
    assert run(["merge", out, "--out", str(to), "--against", str(source)]) == 0
    assert (
        f"{said.bit_equal / said.entries:.4%} of the {said.entries:,} entries of the merged weights"
        in capsys.readouterr().out
    )


def test_an_original_model_with_an_adapter_in_its_folder_is_refused(own: Built, start: Start, tmp_path: Path) -> None:
    source, out, to = own("llama"), str(tmp_path / "out"), tmp_path / "merged"
    start(source)
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="transformers would load this adapter"):
        merge(out, str(to), model=str(source))
    assert not to.exists()
    with pytest.raises(CheckpointError, match="transformers would load this adapter"):
        verify(out, model=str(source))


def test_a_source_with_an_unfilled_index_entry_is_initialized_and_merged(
    own: Built, start: Start, tmp_path: Path
) -> None:
    source, out, to = own("llama"), str(tmp_path / "out"), tmp_path / "merged"
    index = json.loads((source / "model.safetensors.index.json").read_text())
    right = dict(index["weight_map"])
    index["weight_map"]["mtp.fc.weight"] = max(right.values())
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    start(source)
    assert verify(out, model=str(source), all_components=True).differences == ()
    assert merge(out, str(to), model=str(source)).bit_equal is not None
    assert json.loads((to / "model.safetensors.index.json").read_text())["weight_map"] == right


def test_a_source_of_several_dtypes_is_restored_with_its_config(
    checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint("llama", "bfloat16"), tmp_path / "source"))
    name = "model.layers.0.self_attn.q_proj.weight"
    shard = next(path for path in sorted(source.glob("*.safetensors")) if name in load_file(path))
    weights = load_file(shard)
    save_file({**weights, name: weights[name].half()}, shard, metadata={"format": "pt"})
    start(source, dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    merge(str(tmp_path / "out"), str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}


def test_an_unsafe_output_path_is_refused(out: Path, tmp_path: Path) -> None:
    trained = shutil.copytree(out / "lora", tmp_path / "trained")
    with pytest.raises(UsageError, match="--out is empty"):
        merge(str(out), "")
    with pytest.raises(UsageError, match="--model is empty"):
        merge(str(out), str(tmp_path / "merged"), model="")
    with pytest.raises(UsageError, match="--adapter is empty"):  # an empty value does not mean the adapter in OUT
        merge(str(out), str(tmp_path / "merged"), adapter="")
    with pytest.raises(OutputError, match="lies inside"):
        merge(str(out), str(trained / "merged"), adapter=str(trained))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="a link to what is not there"):
        merge(str(out), str(tmp_path / "link"))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "adapter_config.json").write_text("{}")
    with pytest.raises(OutputError, match="holds an adapter"):
        merge(str(out), str(tmp_path / "merged"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_base_with_a_changed_side_file_of_the_same_size_is_refused(name: str, out: Path, tmp_path: Path) -> None:
    path = out / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\n", b" ", 1) if b"\n" in content else content[:-1] + b" ")
    with pytest.raises(CheckpointError, match=f"{name} was changed"):
        merge(str(out), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_base_with_a_flipped_bit_is_not_merged_until_it_is_restored(out: Path, tmp_path: Path) -> None:
    merge(str(out), str(tmp_path / "uninterrupted"))
    path = out / "model-00002-of-00010.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is not the file that milora-init wrote") as caught:
        merge(str(out), str(tmp_path / "merged"))
    assert "milora-init verify" in caught.value.hint
    assert not (tmp_path / "merged" / "config.json").exists()
    path.write_bytes(content)
    merge(str(out), str(tmp_path / "merged"))
    assert model_files(tmp_path / "merged") == model_files(tmp_path / "uninterrupted")


def name_a_file(out: Path, name: str, content: bytes) -> None:
    """Add a file to the manifest, with its right size and hash."""
    manifest = json.loads((out / "milora_init.json").read_text())
    manifest["files"][name] = len(content)
    manifest["hashes"][name] = hashlib.sha256(content).hexdigest()
    (out / "milora_init.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../mine", "a/../../mine", "{home}/mine", "..\\mine", "./tokenizer.json", ".bashrc",
                                  ".git/config"])  # fmt: skip
def test_a_manifest_with_an_outside_or_hidden_path_is_refused_by_every_command(
    name: str, out: Path, tmp_path: Path
) -> None:
    name = name.format(home=tmp_path)
    (tmp_path / "mine").write_bytes(b"mine")
    name_a_file(out, name, b"mine")
    before = contents(tmp_path)
    words = (["merge", str(out), "--out", str(tmp_path / "deep" / "merged")], ["verify", str(out)],
             ["report", str(out)], ["push", str(out), "me/pair"])  # fmt: skip
    for command in words:
        assert run(command) == 1, command
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "model.safetensors", "lora/more.safetensors", "README.md", MERGED, "x.bin"]
)
def test_a_manifest_with_an_unexpected_file_is_not_merged(name: str, out: Path, tmp_path: Path) -> None:
    (out / name).write_bytes(b"theirs")
    name_a_file(out, name, b"theirs")
    if name == "model.safetensors":  # it would be read as the weights
        (out / name).rename(out / "more.safetensors")
        name_a_file(out, "more.safetensors", b"theirs")
    with pytest.raises(CheckpointError) as caught:
        merge(str(out), str(tmp_path / "merged"))
    assert caught.value.hint
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "lora", "lora/adapter_config.json", "shard"])
def test_a_link_out_of_the_pair_is_refused_by_merge_and_push_and_named_by_verify(
    name: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(out.glob("*.safetensors")).name if name == "shard" else name
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    for command in (["merge", str(out), "--out", str(tmp_path / "merged")], ["push", str(out), "me/pair"]):
        assert run(command) == 1
        said = capsys.readouterr().err
        assert name in said
        assert "leads out of" in said
    assert not (tmp_path / "merged").exists()
    verdict = verify(str(out))
    assert any(d.where.startswith(name) and "leads out of" in d.what and d.hint for d in verdict.differences)


def test_a_pair_in_the_cache_of_the_hub_is_merged(out: Path, tmp_path: Path) -> None:
    merge(str(out), str(tmp_path / "uninterrupted"))
    repository = tmp_path / "models--me--pair"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(out.rglob("*")) if path.is_file()):
        link = snapshot / path.relative_to(out)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(repository / "blobs" / str(number))
        link.symlink_to(os.path.relpath(repository / "blobs" / str(number), link.parent))
    assert verify(str(snapshot)).ok
    merge(str(snapshot), str(tmp_path / "merged"))
    assert model_files(tmp_path / "merged") == model_files(tmp_path / "uninterrupted")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))


def test_a_changed_file_of_an_interrupted_merge_is_written_again(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, real = tmp_path / "merged", ShardWriter.finish
    merge(str(out), str(tmp_path / "uninterrupted"))
    made: list[str] = []

    def cut_off(shard: ShardWriter[None], *cancelled: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(shard.name)
        return real(shard, *cancelled)

    monkeypatch.setattr(ShardWriter, "finish", cut_off)
    with pytest.raises(KeyboardInterrupt):
        merge(str(out), str(merged))
    monkeypatch.undo()
    raw = bytearray((merged / made[0]).read_bytes())
    raw[-1] ^= 1
    (merged / made[0]).write_bytes(raw)
    merge(str(out), str(merged))
    assert model_files(merged) == model_files(tmp_path / "uninterrupted")


@pytest.mark.parametrize("name", ["../mine", "/mine", ""])
def test_a_merge_record_with_an_outside_path_is_refused(name: str, out: Path, tmp_path: Path) -> None:
    merge(str(out), str(tmp_path / "merged"))
    (tmp_path / "mine").write_bytes(b"mine")
    record = json.loads((tmp_path / "merged" / MERGED).read_text())
    tiny_models.edit_json(tmp_path / "merged" / MERGED, files={**record["files"], name: 4})
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="is not a record that this version reads"):
        merge(str(out), str(tmp_path / "merged"), overwrite=True)
    assert contents(tmp_path) == before


def test_a_revision_needs_the_model(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama"))
    with pytest.raises(UsageError, match="--revision v2 is of the original model, which is not given"):
        merge(str(tmp_path / "out"), str(tmp_path / "merged"), revision="v2")
    assert not (tmp_path / "merged").exists()


def test_the_folder_of_a_training_is_told_from_its_adapter(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    start(checkpoint("llama"))
    train(tmp_path / "out", tmp_path / "run" / "adapter")
    with pytest.raises(UsageError, match="is not the adapter") as caught:
        merge(str(tmp_path / "out"), str(tmp_path / "merged"), adapter=str(tmp_path / "run"))
    assert caught.value.hint == f"it is in that folder: --adapter {tmp_path}/run/adapter"
