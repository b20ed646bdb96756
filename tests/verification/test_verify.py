"""verify: every kind of damage to a finished output is named with a hint, and an intact output passes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from support import fork_server
from support.marks import wide
from support.tiny_models import KINDS, TARGETS, VOCABULARY, contents, edit_inputs, edit_json, tensors

from milora_init.api import merge
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import read_header
from milora_init.cli.main import run
from milora_init.errors import PlanError, UsageError
from milora_init.export.convert import convert
from milora_init.lora.compatibility import UNTRAINED
from milora_init.manifest import MANIFEST, Manifest, WeightRecord, read_manifest
from milora_init.run.progress import Progress, ShardResult
from milora_init.verification.verdict import TEXTS, Code, Verdict
from milora_init.verification.verify import verify

Built = Callable[..., Path]
Start = Callable[..., Manifest]
Q0 = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NEW_HEAD = """
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained("./svd_init", num_labels=3)
config = LoraConfig.from_pretrained("./svd_init", subfolder="lora")
config.task_type = "SEQ_CLS"
model = get_peft_model(base, config)
state = get_peft_model_state_dict(model) | load_peft_weights("./svd_init", subfolder="lora")
set_peft_model_state_dict(model, state)
"""


def flip(path: Path, name: str, *, bit: int = 1) -> None:
    """Flip one bit of the first byte of a tensor: of a little-endian number, its least significant."""
    header = read_header(path)
    content = bytearray(path.read_bytes())
    content[len(header.raw) + header.tensors[name].start] ^= bit
    path.write_bytes(content)


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][name])


def require(verdict: Verdict, code: Code, *wheres: str) -> None:
    """The verdict has this code, names all of these places, and has a hint for every difference."""
    assert verdict.code == code
    assert not verdict.ok
    found = [difference.where + ": " + difference.what for difference in verdict.differences]
    for where in wheres:
        assert any(where in line for line in found), (where, found)
    assert all(difference.hint for difference in verdict.differences)


CASES: list[Any] = [
    *[("llama", dtype, {}) for dtype in ("float32", "bfloat16", "float16")],
    *[wide("llama", "bfloat16", {"mode": mode}) for mode in ("max", "mid", "random")],
    ("llama", "float32", {"rslora": True, "alpha": 16}),
    ("llama", "float32", {"dtype": "bfloat16"}),
    ("llama", "float32", {"rank": 16, "target": ("all-linear",)}),
    ("gpt2", "float32", {}),
    ("gpt2", "bfloat16", {"mode": "max", "alpha": 2}),
    ("bert", "float32", {}),
    ("tied llama", "float32", {}),
]


@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_an_intact_output_passes_against_its_source(
    kind: str, dtype: str, options: dict[str, Any], start: Start, checkpoint: Built, tmp_path: Path
) -> None:
    source = checkpoint(kind, dtype)
    start(source, **{"target": TARGETS[kind], **options})
    before = contents(tmp_path / "out")
    verdict = verify(str(tmp_path / "out"), model=str(source), all_components=True)
    assert (verdict.differences, verdict.notes, verdict.code) == ((), (), "pair")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("shards", [1, 3])
def test_an_output_made_from_pickles_passes_against_its_source(
    shards: int, start: Start, pickled: Built, tmp_path: Path
) -> None:
    start(pickled(shards))
    verdict = verify(str(tmp_path / "out"), model=str(pickled(shards)), all_components=True)
    assert verdict.differences == ()


def test_rank_deficient_and_zero_weights_pass(start: Start, own: Built, tmp_path: Path) -> None:
    source = own("llama")
    for path in source.glob("*.safetensors"):
        content = {name: tensor for name, tensor in tensors(source).items() if name in read_header(path).tensors}
        for name in content:
            if "q_proj" in name:
                content[name][3:] = content[name][:1]
            if "v_proj" in name:
                content[name].zero_()
        save_file(content, path, metadata={"format": "pt"})
    start(source)
    assert verify(str(tmp_path / "out"), model=str(source), all_components=True).differences == ()


def test_the_manifest_has_the_hash_of_every_file(out: Path) -> None:
    manifest = read_manifest(out)
    assert manifest
    assert manifest.hashes == {name: sha256(out / name) for name in manifest.files}


def test_a_resumed_run_keeps_the_hashes_of_the_earlier_shards(start: Start, checkpoint: Built, tmp_path: Path) -> None:
    class CutOff(Progress):
        def shard(self, result: ShardResult[WeightRecord], finished: int, of: int, elapsed_s: float) -> None:
            if finished == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(checkpoint("llama"), progress=CutOff())
    assert verify(str(tmp_path / "out")).code == "unfinished"
    start(checkpoint("llama"))
    verdict = verify(str(tmp_path / "out"))
    assert (verdict.code, verdict.differences) == ("pair", ())


def test_a_moved_or_downloaded_folder_passes(out: Path) -> None:
    verdict = verify(str(out))
    assert verdict.ok
    assert "where the pair was made" in verdict.notes[0]
    (out / "README.md").write_text("# a card")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    edit_json(out / "lora/adapter_config.json", base_model_name_or_path="someone/llama-milora")
    verdict = verify(str(out))
    assert verdict.ok
    assert "a repository on the Hub" in verdict.notes[0]


@pytest.mark.parametrize("name", [Q0, EMBEDDING])
def test_a_flipped_bit_in_the_base_is_named_by_its_file(name: str, out: Path) -> None:
    path = shard_of(out, name)
    flip(path, name)
    require(verify(str(out)), "damaged", path.name)


@pytest.mark.parametrize("name", [Q0, EMBEDDING])
def test_a_flipped_bit_that_the_manifest_hides_is_found_against_the_source(
    name: str, out: Path, checkpoint: Built
) -> None:
    path = shard_of(out, name)
    flip(path, name, bit=2)  # two units in the last place
    hashes = json.loads((out / MANIFEST).read_text())["hashes"]
    edit_json(out / MANIFEST, hashes={**hashes, path.name: sha256(path)})
    assert verify(str(out)).ok
    verdict = verify(str(out), model=str(checkpoint("llama")))
    require(verdict, "damaged", name)
    assert len(verdict.differences) == 1


def test_a_flipped_bit_in_the_adapter_is_found(out: Path) -> None:
    path = out / "lora/adapter_model.safetensors"
    flip(path, f"base_model.model.{Q0.removesuffix('.weight')}.lora_A.weight")
    require(verify(str(out)), "damaged", "lora/adapter_model.safetensors")


@pytest.mark.parametrize("options", [{"mode": "random", "seed": 1}, {"mode": "max"}])
def test_the_adapter_of_another_run_is_a_replaced_adapter(options: dict[str, Any], out: Path, finished: Built) -> None:
    other = finished(**options)
    shutil.copy(other / "lora/adapter_model.safetensors", out / "lora")
    require(verify(str(out)), "replaced_adapter", "lora/adapter_model.safetensors")
    of_itself = verify(str(out), adapter=str(out / "lora"))  # it equals what is there, which is not the initial one
    assert "was not trained" not in " ".join(finding.what for finding in of_itself.findings)


def test_original_shards_with_the_adapter_of_a_residual_are_found(out: Path, checkpoint: Built) -> None:
    for path in checkpoint("llama").glob("*.safetensors"):
        shutil.copy(path, out)
    require(verify(str(out)), "original_with_adapter", "holds the weights of the original model")


def test_a_residual_base_without_its_adapter_is_found(out: Path) -> None:
    shutil.rmtree(out / "lora")
    require(verify(str(out)), "residual_alone", "lora/adapter_config.json", "lora/adapter_model.safetensors")


def test_a_missing_shard_and_every_other_difference_are_named(out: Path) -> None:
    path = shard_of(out, Q0)
    path.unlink()
    (out / "tokenizer.json").write_text("{}")
    edit_json(out / "lora/adapter_config.json", r=5)
    require(verify(str(out)), "damaged", path.name, "tokenizer.json", "r is 5")


def test_a_truncated_shard_is_found(out: Path) -> None:
    path = shard_of(out, Q0)
    path.write_bytes(path.read_bytes()[:-1])
    require(verify(str(out)), "damaged", f"{path.name}: {path.stat().st_size} bytes")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00099-of-00099.safetensors", "pytorch_model.bin", "adapter_config.json"]
)
def test_a_file_that_would_be_loaded_instead_is_found(name: str, out: Path, checkpoint: Built) -> None:
    shutil.copy(next(checkpoint("llama").glob("*.safetensors")), out / name)
    require(verify(str(out)), "damaged", f"{name}: not a file of this pair")


def test_an_index_that_names_another_file_is_found(out: Path) -> None:
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    others = set(index["weight_map"].values()) - {index["weight_map"][Q0]}
    edit_json(path, weight_map={**index["weight_map"], Q0: min(others)})
    require(verify(str(out)), "damaged", "the index puts")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 8),
        ("lora_alpha", 32),
        ("init_lora_weights", "pissa"),
        ("use_rslora", True),
        ("fan_in_fan_out", True),
        ("peft_type", "IA3"),
        ("rank_pattern", {"q_proj": 2}),
        ("use_dora", True),
        ("target_modules", ["q_proj"]),
        ("target_modules", "(q_proj"),
        ("target_modules", ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]),
        ("base_model_name_or_path", ""),
        ("base_model_name_or_path", "/somewhere/else"),
    ],
)
def test_an_edited_adapter_config_is_named_by_its_key(key: str, value: Any, out: Path) -> None:
    edit_json(out / "lora/adapter_config.json", **{key: value})
    verdict = verify(str(out))
    require(verdict, "damaged", key)
    assert len(verdict.differences) == 1


def test_a_path_to_the_original_is_named(out: Path, checkpoint: Built) -> None:
    edit_json(out / "lora/adapter_config.json", base_model_name_or_path=str(checkpoint("llama")))
    require(verify(str(out)), "damaged", "is the original model")


def test_settings_that_affect_only_training_may_be_edited(out: Path) -> None:
    targets = [f"model.layers.{i}.{name}" for i in (0, 1) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"
    )]  # fmt: skip
    edit_json(out / "lora/adapter_config.json", lora_dropout=0.2, inference_mode=True, target_modules=targets)
    assert verify(str(out)).ok


def test_a_folder_without_a_manifest_has_a_code_of_its_own(out: Path) -> None:
    (out / MANIFEST).unlink()
    require(verify(str(out)), "no_manifest", MANIFEST)
    shutil.rmtree(out / "lora")
    require(verify(str(out)), "unknown", MANIFEST)
    (out / ".milora-init").mkdir()
    require(verify(str(out)), "unfinished", MANIFEST)


def test_another_source_is_named(out: Path, own: Built) -> None:
    other = own("llama")
    flip(shard_of(other, Q0), Q0, bit=2)
    verdict = verify(str(out), model=str(other))
    require(verdict, "other_model", "another model, or another commit", Q0)
    assert len(verdict.differences) == 2


def test_a_missing_source_and_all_without_a_source_are_errors(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        verify(str(out), model=str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="--all needs the original model"):
        verify(str(out), all_components=True)


def test_a_component_of_another_mode_is_found(finished: Built, tmp_path: Path, checkpoint: Built) -> None:
    """A consistent pair of the largest components, whose manifest claims the smallest."""
    out = Path(shutil.copytree(finished(mode="max"), tmp_path / "out"))
    edit_inputs(out / MANIFEST, mode="min", method="milora")
    assert verify(str(out)).ok
    sampled = verify(str(out), model=str(checkpoint("llama")))
    judged = verify(str(out), model=str(checkpoint("llama")), all_components=True)
    require(judged, "damaged", "`min` component")
    assert (len(sampled.differences), len(judged.differences)) == (3, 10)


@pytest.fixture(scope="module")
def trained(finished: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter after ten large steps from finished(), saved by PEFT."""
    base = finished()
    model: Any = PeftModel.from_pretrained(
        getattr(transformers, KINDS["llama"][0]).from_pretrained(base), str(base), subfolder="lora", is_trainable=True
    )
    ids = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    folder = tmp_path_factory.mktemp("trained-")
    model.save_pretrained(folder)
    return folder


def test_a_trained_adapter_belongs_to_the_base_it_was_trained_on(trained: Path, finished: Built) -> None:
    verdict = verify(str(finished()), adapter=str(trained))
    assert verdict.differences == ()
    assert verdict.code == "trained_pair"


def test_a_trained_adapter_may_name_the_place_that_its_base_had(
    trained: Path, finished: Built, checkpoint: Built, tmp_path: Path
) -> None:
    """Its factors tell the base, as merge and convert find it."""
    folder, base = Path(shutil.copytree(trained, tmp_path / "trained")), str(finished())
    edit_json(folder / "adapter_config.json", base_model_name_or_path="./svd_init")
    verdict = verify(base, adapter=str(folder))
    assert (verdict.code, verdict.differences) == ("trained_pair", ())
    assert "the factors tell what it was trained from" in "".join(verdict.notes)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(checkpoint("llama")))
    require(verify(base, adapter=str(folder)), "adapter_misfit", "is the original model")


def test_a_trained_adapter_on_another_base_is_foreign(trained: Path, finished: Built) -> None:
    other = finished(mode="max")
    verdict = verify(str(other), adapter=str(trained))
    require(verdict, "foreign_adapter", "unrelated to the initial adapter", "base_model_name_or_path")
    assert len(verdict.differences) == 2  # no module is listed twice
    assert {d.hint for d in verdict.differences} == {f"by its config it was trained from {finished()}: give that"}


def test_a_trained_adapter_of_another_rank_is_foreign(trained: Path, finished: Built) -> None:
    require(verify(str(finished(rank=2)), adapter=str(trained)), "foreign_adapter", "r is 4", "and 19 more")


def test_an_unreadable_trained_adapter_is_a_misfit_and_not_foreign(
    trained: Path, finished: Built, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "trained"))
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    require(verify(str(finished()), adapter=str(folder)), "adapter_misfit", str(path))
    path.unlink()
    require(verify(str(finished()), adapter=str(folder)), "adapter_misfit", f"{path}: missing")


def test_a_trained_adapter_of_other_targets_is_foreign(trained: Path, finished: Built) -> None:
    other = finished(target=("q_proj", "o_proj"))
    verdict = verify(str(other), adapter=str(trained))
    require(verdict, "foreign_adapter", "target_modules", "o_proj", "not adapted in this output, and 15 more")


def test_the_verify_command_prints_the_verdict_and_sets_the_exit_status(
    out: Path, checkpoint: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(out), "--against", str(checkpoint("llama")), "--all"]) == 0
    captured = capsys.readouterr()
    compared = f"21 tensors and all components with {checkpoint('llama')}\n"
    assert captured.out.startswith(f"{out}: {TEXTS['pair']}\ncompared: ")
    assert captured.out.endswith(compared)
    assert captured.err.startswith("reading and comparing\nnote: ")
    shutil.rmtree(out / "lora")
    assert run(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{out}: {TEXTS['residual_alone']}\n"
    assert (captured.err.count("differs: "), captured.err.count("hint: ")) == (2, 1)  # both have the same hint
    assert run(["verify", str(out), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert list(content) == [
        "schema", "command", "status", "out", "fingerprint", "source", "warnings", "code", "text", "differences",
        "notes", "checked",
    ]  # fmt: skip
    assert (content["status"], content["code"]) == ("differs", "residual_alone")
    assert content["text"] == TEXTS["residual_alone"]
    assert len(content["differences"]) == 2
    assert run(["verify", str(out / "nothing")]) == 2
    assert run(["verify", str(out), "--all"]) == 2
    assert run(["verify"]) == 2


def test_an_adapter_config_without_its_patterns_is_a_difference(
    start: Callable[..., Manifest], checkpoint: Built, tmp_path: Path
) -> None:
    start(checkpoint("llama"), rank_pattern={"v_proj": 2})
    path = tmp_path / "out" / "lora" / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["rank_pattern"]
    path.write_text(json.dumps(config))
    require(verify(str(tmp_path / "out")), "damaged", "rank_pattern is None")


def test_the_hint_for_a_trained_adapter_that_does_not_fit_is_to_train_again(
    trained: Path, finished: Built, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "trained"))
    edit_json(folder / "adapter_config.json", lora_bias=True, lora_alpha=99)
    verdict = verify(str(finished()), adapter=str(folder))
    require(verdict, "adapter_misfit", "lora_bias", "lora_alpha is 99")
    assert {d.hint for d in verdict.differences} == {"train again from the initial adapter, with its config unchanged"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_new_head_in_the_adapter_is_a_note(
    kind: str, finished: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT saves `modules_to_save` with the adapter: classifier and score, of which the model has only score."""
    (tmp_path / "svd_init").symlink_to(finished(kind, target=TARGETS[kind]))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(NEW_HEAD, names)
    names["model"].save_pretrained("trained")
    verdict = verify("svd_init", adapter="trained")
    assert (verdict.code, verdict.differences) == ("trained_pair", ())
    notes = "\n".join(verdict.notes)
    assert "modules_to_save is ['classifier', 'score']: trained beside the factors, and kept by merge" in notes
    assert "base_model.model.score.weight: trained beside the factors" in notes


def test_the_original_with_a_named_adapter_is_recognized_without_a_manifest(
    trained: Path, checkpoint: Built, finished: Built, tmp_path: Path
) -> None:
    assert verify(str(checkpoint("llama")), adapter=str(finished() / "lora")).code == "original_with_adapter"


def print_statuses(commands: list[list[str]]) -> None:
    print(*map(run, commands), file=sys.stderr)


@pytest.mark.parametrize(
    "name", [MANIFEST, wide("config.json"), "lora/adapter_config.json", wide("tokenizer.json"), ".milora-init"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_instead_of_a_file_is_an_error_and_is_never_read(
    kind: str, name: str, out: Path, tmp_path: Path
) -> None:
    """Reading the pipe would block; reading the device would never end."""
    path = out / name
    if name == ".milora-init":
        path.mkdir()
        path /= "journal.jsonl"
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    trained = ["--adapter", str(out / "lora")]
    commands = [["verify", str(out)], ["verify", str(out), *trained], ["report", str(out)]]
    commands += [["merge", str(out), "--out", str(tmp_path / "merged")], ["push", str(out), "me/pair"]]
    if name == ".milora-init":  # only the initialisation reads it
        commands = [["-m", str(tmp_path / "source"), "-o", str(out), "-r", "4", "--overwrite"]]
        shutil.copytree(out, tmp_path / "source", ignore=shutil.ignore_patterns(MANIFEST, ".milora-init", "lora"))
    process = fork_server.run(print_statuses, commands)  # in a separate process, which a timeout can end
    only_read_the_manifest = ["report"] if name != MANIFEST else []
    statuses = [0 if command[0] in only_read_the_manifest else 1 for command in commands]
    assert process.stderr.splitlines()[-1] == " ".join(map(str, statuses))
    assert "Traceback" not in process.stderr
    assert "please report" not in process.stderr


@pytest.mark.parametrize("saved_again", [False, True])
def test_an_adapter_that_was_not_trained_is_named_in_the_same_words_by_every_command(
    saved_again: bool, finished: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, adapter = finished(), tmp_path / "adapter"
    shutil.copytree(out / "lora", adapter)
    if saved_again:
        weights = adapter / "adapter_model.safetensors"
        save_file(tensors(adapter), weights, metadata={"format": "pt", "saved": "again"})
        assert weights.read_bytes() != (out / "lora" / weights.name).read_bytes()
    verdict = verify(str(out), adapter=str(adapter))
    assert (verdict.ok, verdict.code) == (True, "pair")
    assert any(note.endswith(UNTRAINED) for note in verdict.notes)
    assert merge(out, tmp_path / "merged", adapter=adapter, progress=False).notices == (f"{adapter} {UNTRAINED}",)
    capsys.readouterr()
    assert run(["report", str(out), "--adapter", str(adapter)]) == 0
    said = capsys.readouterr()
    assert f"warning: {adapter} {UNTRAINED}" in said.err
    assert "trained from" not in said.out
    assert "intruders" not in said.out
    with pytest.raises(PlanError, match="holds the initial factors"):
        convert(str(out), str(adapter), str(tmp_path / "plain"))
    assert not (tmp_path / "plain").exists()


def test_the_adapter_inside_a_pair_is_told_from_a_foreign_folder(finished: Built) -> None:
    with pytest.raises(UsageError, match="is a part of a pair") as caught:
        verify(str(finished() / "lora"))
    assert caught.value.hint == f"name the pair: {finished()}"
