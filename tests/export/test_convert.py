"""convert: a trained pair becomes a plain LoRA adapter; on the original model it computes the same function."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.marks import wide
from support.tiny_models import TARGETS, contents
from support.training import digests, load, logits, train

from milora_init.api import convert
from milora_init.cli.main import run
from milora_init.errors import CheckpointError, MiloraError, OutputError, PlanError, UsageError
from milora_init.export.merge import merge
from milora_init.linalg.low_rank import product_svd
from milora_init.manifest import Manifest
from milora_init.records import CONVERTED, ConvertResult
from milora_init.verification.verify import verify

Built = Callable[..., Path]
Start = Callable[..., Manifest]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_patterns(lora: Path) -> None:
    """Halve the rank of one module, in the form that PEFT saves; its scale does not change."""
    weights = load_file(lora / "adapter_model.safetensors")
    key = min(name for name in weights if name.endswith(".lora_A.weight"))
    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    weights[key] = weights[key][:2].contiguous()
    weights[key.replace("lora_A", "lora_B")] = weights[key.replace("lora_A", "lora_B")][:, :2].contiguous()
    save_file(weights, lora / "adapter_model.safetensors", metadata={"format": "pt"})
    edit(lora, rank_pattern={module: 2}, alpha_pattern={module: 3})


@pytest.mark.parametrize(
    ("kind", "rslora"),
    [("llama", True), wide("llama", False), wide("qwen2", True), wide("gpt2", True), ("gpt2", False)],
)
def test_the_converted_adapter_on_the_original_computes_what_the_trained_pair_computes(
    kind: str, rslora: bool, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    source, out = checkpoint(kind), tmp_path / "out"
    start(source, out=str(out), rank=4, alpha=6, rslora=rslora, target=TARGETS[kind])
    trained = train(out, tmp_path / "trained")
    inputs = digests(source, out, trained)

    modules = convert(out / "lora", trained, tmp_path / "plain").modules

    assert digests(source, out, trained) == inputs
    assert {(m.rank, m.lost) for m in modules} == {(8, 0.0)}
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source)
    pair = logits(load(out, trained))
    plain = load(source, tmp_path / "plain")
    assert (logits(load(source)) - pair).abs().max() > 0.1, "the training changed nothing"
    torch.testing.assert_close(logits(plain), pair, rtol=1e-4, atol=1e-4)
    merged = load(out, trained).merge_and_unload()
    torch.testing.assert_close(logits(plain), logits(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_with_patterns_is_converted(rslora: bool, checkpoint: Built, start: Start, tmp_path: Path) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    start(source, out=str(out), rank=4, rslora=rslora)
    with_patterns(out / "lora")
    trained = train(out, tmp_path / "trained")
    initial = shutil.copytree(out / "lora", tmp_path / "initial")  # the manifest records another adapter
    with pytest.raises(PlanError, match="is not the adapter that milora-init wrote"):
        convert(out / "lora", trained, tmp_path / "plain")
    convert(initial, trained, tmp_path / "plain", model=str(source))

    # The base does not match the shortened factors, so only the changes s (B A - B0 A0) are compared.
    before, after = load(out, out / "lora").merge_and_unload(), load(out, trained).merge_and_unload()
    original = load(source)
    plain = load(source, tmp_path / "plain").merge_and_unload()
    moved = dict(after.named_parameters())
    start_at, origin = dict(before.named_parameters()), dict(original.named_parameters())
    for name, value in plain.named_parameters():
        torch.testing.assert_close(value - origin[name], moved[name] - start_at[name], rtol=1e-4, atol=1e-5)


def test_compression_is_the_best_of_its_rank_and_reports_the_loss(
    checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    start(source, out=str(out), rank=4, rslora=True)
    trained = train(out, tmp_path / "trained")
    convert(out / "lora", trained, tmp_path / "whole")
    modules = convert(out / "lora", trained, tmp_path / "small", rank=3).modules

    origin = dict(load(source).named_parameters())
    whole = dict(load(source, tmp_path / "whole").merge_and_unload().named_parameters())
    small = dict(load(source, tmp_path / "small").merge_and_unload().named_parameters())
    for module in modules:
        name = f"{module.module}.weight"
        exact, kept = ((x[name] - origin[name]).detach().double() for x in (whole, small))
        s = torch.linalg.svdvals(exact)
        assert module.lost == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-2)
        assert float((exact - kept).norm() / s.norm()) == pytest.approx(module.lost, rel=1e-2)


def test_a_product_at_full_rank_is_itself_and_a_zero_product_loses_nothing() -> None:
    torch.manual_seed(0)
    B, A = torch.randn(9, 4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    product = product_svd(B, A)
    left, right = product.factors(4)
    torch.testing.assert_close(left @ right, B @ A)
    assert product.lost(4) == 0
    zero = product_svd(B, 0 * A)
    left, right = zero.factors(2)
    assert not (left @ right).any()
    assert (zero.lost(2), zero.rank_for(0.9)) == (0, 1)


@pytest.fixture(scope="module")
def pair(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out` and `trained`; tests must copy it before they change it."""
    from support.runs import initialize

    from milora_init.options import InitOptions

    folder = tmp_path_factory.mktemp("pair")
    out = folder / "out"
    initialize(InitOptions(model=str(checkpoint("llama")), out=str(out), rank=4, device=("cpu",)))
    train(out, folder / "trained", steps=1)
    return folder


def _drop(name: str) -> Callable[[Path], None]:
    def damage(trained: Path) -> None:
        weights = load_file(trained / "adapter_model.safetensors")
        gone = [key for key in weights if name in key]
        assert gone
        save_file({k: v for k, v in weights.items() if k not in gone}, trained / "adapter_model.safetensors")

    return damage


def _add(trained: Path) -> None:
    weights = load_file(trained / "adapter_model.safetensors")
    save_file(weights | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, trained / "adapter_model.safetensors")


def _another(trained: Path) -> None:
    """Replace the factors by noise of the same shapes, like an adapter of another base with the same config."""
    torch.manual_seed(9)
    weights = load_file(trained / "adapter_model.safetensors")
    save_file({k: torch.randn_like(v) for k, v in weights.items()}, trained / "adapter_model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], type[MiloraError], str]] = {
    "other targets": (_drop("v_proj"), PlanError, "v_proj"),
    "half a pair": (_drop("layers.0.self_attn.q_proj.lora_B"), CheckpointError, "has no lora_B"),
    "extra key": (_add, PlanError, "lm_head.weight"),
    "another rank": (lambda t: edit(t, r=8), CheckpointError, "rank 8"),
    "another alpha": (lambda t: edit(t, lora_alpha=99), PlanError, "scale"),
    "another base": (_another, PlanError, "unrelated to the initial adapter of this output"),
    "DoRA": (lambda t: edit(t, use_dora=True), CheckpointError, "lora_magnitude_vector"),
    "a bias of the factors": (lambda t: edit(t, lora_bias=True), PlanError, "lora_bias"),
    "modules_to_save": (lambda t: edit(t, modules_to_save=["lm_head"]), CheckpointError, "modules_to_save"),
    "tokens": (lambda t: edit(t, trainable_token_indices=[1]), CheckpointError, "trainable_token_indices"),
    "experts": (
        lambda t: edit(t, target_parameters=["experts.gate_up_proj"]),
        PlanError,
        "experts.gate_up_proj is a parameter of experts",
    ),
    "no weights": (lambda t: (t / "adapter_model.safetensors").unlink(), CheckpointError, "adapter_model"),
    "cut short": (
        lambda t: (t / "adapter_model.safetensors").write_bytes((t / "adapter_model.safetensors").read_bytes()[:-9]),
        CheckpointError,
        "adapter_model",
    ),
    "no config": (lambda t: (t / "adapter_config.json").unlink(), CheckpointError, "adapter_config"),
    "not LoRA": (lambda t: edit(t, peft_type="IA3"), PlanError, "does not describe"),
}


SLOW = "([a-z_.0-9]+)*!"


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_a_pattern_from_an_adapter_config_is_not_run(key: str, pair: Path, tmp_path: Path) -> None:
    """The first pattern would take too long to match. No pattern is run, so harmless ones are refused too."""
    for number, pattern in enumerate((SLOW, r".*\.q_proj", "re:q_proj")):
        trained = Path(shutil.copytree(pair / "trained", tmp_path / f"trained-{number}"))
        out = Path(shutil.copytree(pair / "out", tmp_path / f"out-{number}"))
        value = pattern if key == "target_modules" else {pattern: 4}
        edit(trained, **{key: value})
        found = verify(str(pair / "out"), adapter=str(trained)).differences
        assert [d.what for d in found if key in d.what and repr(pattern)[1:-1] in d.what]
        edit(out / "lora", **{key: value})
        assert key in "".join(d.what for d in verify(str(out)).differences)
        if key != "target_modules":  # merge and convert use the tensor names and not target_modules
            with pytest.raises(CheckpointError, match="patterns from a file are not run"):
                merge(str(pair / "out"), str(tmp_path / "merged"), adapter=str(trained))
            with pytest.raises(CheckpointError, match="patterns from a file are not run"):
                convert(pair / "out" / "lora", trained, tmp_path / "plain")
            with pytest.raises(CheckpointError, match="patterns from a file are not run"):
                merge(str(out), str(tmp_path / "merged"))
    edit(trained, target_modules=[f"re:{SLOW}"], rank_pattern={}, alpha_pattern={})
    assert "target_modules misses" in "".join(
        d.what for d in verify(str(pair / "out"), adapter=str(trained)).differences
    )


@pytest.mark.parametrize("name", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_written(name: str, pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "trained", tmp_path / "trained")
    damage, error, says = DAMAGE[name]
    damage(tmp_path / "trained")
    with pytest.raises(error) as caught:
        convert(pair / "out" / "lora", tmp_path / "trained", tmp_path / "plain")
    assert says in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_conversion_does_not_depend_on_the_path_of_the_base(pair: Path, tmp_path: Path) -> None:
    """The config names the path of the base during training; the factors identify the base."""
    shutil.copytree(pair / "trained", tmp_path / "trained")
    edit(tmp_path / "trained", base_model_name_or_path="org/pushed-since")
    convert(pair / "out" / "lora", pair / "trained", tmp_path / "one")
    convert(pair / "out" / "lora", tmp_path / "trained", tmp_path / "two")
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == [CONVERTED]  # it names the folders, and the time
    merge(str(pair / "out"), str(tmp_path / "merged"), adapter=str(tmp_path / "trained"))


def test_an_existing_output_is_refused_and_unchanged(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="holds something else"):
        convert(pair / "out" / "lora", pair / "trained", tmp_path / "plain")
    assert [(p.name, p.read_text()) for p in (tmp_path / "plain").iterdir()] == [("mine", "keep")]


def test_a_rank_that_no_module_has_is_refused(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="rank 9 "):
        convert(pair / "out" / "lora", pair / "trained", tmp_path / "plain", rank=9)


@pytest.mark.parametrize("cut", [{"rank": 0}, {"rank": -1}, {"energy": 1.5}, {"rank": 2, "energy": 0.9}])
def test_an_impossible_cut_is_refused_before_anything_is_read(cut: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^(rank is|--energy|--rank and)") as caught:
        convert(tmp_path / "absent", tmp_path / "absent", tmp_path / "plain", **cut)
    assert caught.value.hint


def test_without_a_manifest_the_original_must_be_named(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "out" / "lora", tmp_path / "lora")
    with pytest.raises(UsageError, match="original"):
        convert(tmp_path / "lora", pair / "trained", tmp_path / "plain")
    convert(tmp_path / "lora", pair / "trained", tmp_path / "plain", model="me/model")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/model"


def test_a_model_that_is_not_the_original_is_refused(
    pair: Path, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = (
        ("./nothere", UsageError),
        ("my-mdel", UsageError),
        ("", UsageError),
        (checkpoint("gpt2"), CheckpointError),
    )
    for model, error in wrong:
        with pytest.raises(error, match=r"no such folder|is empty|not what this output was made from"):
            convert(pair / "out", pair / "trained", tmp_path / "plain", model=str(model))
    assert not (tmp_path / "plain").exists()
    shutil.copytree(checkpoint("llama"), tmp_path / "moved")
    assert not convert(pair / "out", pair / "trained", tmp_path / "plain", model="moved").notices
    named = convert(pair / "out", pair / "trained", tmp_path / "named", model="me/model", dry_run=True)
    assert "me/model was not compared with the recorded original" in named.notices[0]


def test_a_dry_run_says_what_the_run_would_do_with_the_folder(pair: Path, tmp_path: Path) -> None:
    def planned(rank: int) -> ConvertResult:
        return convert(pair / "out", pair / "trained", tmp_path / "plain", rank=rank, dry_run=True)

    assert (planned(2).unchanged, planned(2).notices) == (False, ())
    convert(pair / "out", pair / "trained", tmp_path / "plain", rank=2)
    before = (tmp_path / "plain" / CONVERTED).read_bytes()
    assert planned(2).unchanged
    (refused,) = planned(3).notices
    assert "the run would be refused" in refused
    assert "rank was 2, now 3" in refused
    assert (tmp_path / "plain" / CONVERTED).read_bytes() == before


def test_other_files_in_the_parent_folder_are_unchanged(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.partial").mkdir()
    (tmp_path / "plain.partial" / "mine.txt").write_bytes(b"mine")
    convert(pair / "out" / "lora", pair / "trained", tmp_path / "plain")
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", CONVERTED,
    }  # fmt: skip
    assert (tmp_path / "plain.partial" / "mine.txt").read_bytes() == b"mine"
    assert not list(tmp_path.glob(".plain.*"))


def test_the_output_may_be_a_link_to_an_empty_folder(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "plain").symlink_to(tmp_path / "elsewhere")
    convert(pair / "out" / "lora", pair / "trained", tmp_path / "plain")
    assert (tmp_path / "plain").is_symlink()
    assert (tmp_path / "elsewhere" / "adapter_config.json").is_file()


@pytest.mark.parametrize("inside", ["trained/plain", "out/lora/plain", "trained"])
def test_an_output_inside_an_input_folder_is_refused(inside: str, pair: Path) -> None:
    before = digests(pair)
    with pytest.raises(OutputError):
        convert(pair / "out" / "lora", pair / "trained", pair / inside)
    assert digests(pair) == before


def test_the_convert_command_prints_json_or_nothing_and_refuses_an_existing_output(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init", str(pair / "out" / "lora"), "--trained", str(pair / "trained"), "--out", str(tmp_path / "plain")]
    assert run(["convert", *words, "--rank", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == "done"
    assert {module["rank"] for module in answer["modules"]} == {2}
    again = [*words[:-1], str(tmp_path / "again")]
    assert run(["convert", *again, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run(["convert", *words]) == 1
    assert "holds the output of another request: rank was 2, now not set\n" in capsys.readouterr().err


def test_an_output_name_of_255_bytes_is_written(pair: Path, tmp_path: Path) -> None:
    convert(pair / "out" / "lora", pair / "trained", tmp_path / ("x" * 255))
    assert (tmp_path / ("x" * 255) / "adapter_config.json").is_file()


def test_overwrite_replaces_a_conversion_and_nothing_else(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    convert(pair / "out", pair / "trained", out)
    assert convert(pair / "out", pair / "trained", out, rank=2, overwrite=True).cut
    before = (out / "adapter_model.safetensors").read_bytes()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt, which --overwrite does not replace"):
        convert(pair / "out", pair / "trained", out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_a_failed_rename_keeps_the_earlier_conversion(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the earlier folder cannot be renamed back: then it is kept under the name that it has."""
    out = tmp_path / "plain"
    convert(pair / "out", pair / "trained", out)
    before = (out / "adapter_model.safetensors").read_bytes()
    real = Path.replace

    def no_way_to_out(self: Path, target: Path) -> Path:
        if Path(target) == out:
            raise OSError(errno.EIO, "broken")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", no_way_to_out)
    with pytest.raises(OutputError, match="broken"):
        convert(pair / "out", pair / "trained", out, rank=2, overwrite=True)
    kept = [path for path in tmp_path.rglob("adapter_model.safetensors") if path.read_bytes() == before]
    assert len(kept) == 1
