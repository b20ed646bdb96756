"""METHOD, BASE and the options: what fits, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest
import train
from support.training_folders import TrainingFolders
from training_methods import METHODS, MismatchError, find_start, make_start

from milora_init.methods import METHODS as INITIAL


def test_the_pair_gives_its_own_rank_alpha_and_dropout(training_folders: TrainingFolders) -> None:
    start = find_start("milora", str(training_folders.pair))
    assert (start.model, start.adapter) == (str(training_folders.pair), str(training_folders.pair / "lora"))
    assert (start.rank, start.alpha, start.scale, start.dropout) == (4, 4, 1, 0)
    assert find_start("milora", str(training_folders.pair), dropout=0).dropout == 0


def test_a_fresh_lora_has_the_authors_scale_unless_alpha_is_given(training_folders: TrainingFolders) -> None:
    start = find_start("lora", str(training_folders.source))
    assert (start.rank, start.alpha, start.scale, start.dropout) == (64, 128, 2, 0.05)
    assert find_start("lora", str(training_folders.source), rank=8, alpha=8).scale == 1


def test_a_mode_is_never_read_from_a_path(training_folders: TrainingFolders) -> None:
    assert "min" in str(training_folders.source)
    assert find_start("lora", str(training_folders.source)).adapter is None
    with pytest.raises(MismatchError, match=r"milora_init\.json"):
        find_start("milora", str(training_folders.source))


@pytest.mark.parametrize(
    ("method", "base", "options", "message"),
    [
        ("pissa", "pair", {}, "method milora, not pissa"),
        ("lora", "pair", {}, "not the original model"),
        ("full", "pair", {}, "not the original model"),
        ("milora", "source", {}, "--method milora"),
        ("milora", "pair", {"rank": 8}, "has rank 4, not 8"),
        ("milora", "pair", {"alpha": 8}, "has alpha 4, not 8"),
        ("full", "source", {"rank": 8}, "leave --rank"),
    ],
)
def test_what_does_not_fit_is_refused(
    training_folders: TrainingFolders, method: str, base: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        find_start(method, str(getattr(training_folders, base)), **options)


def test_the_script_refuses_with_status_2_and_writes_nothing(
    training_folders: TrainingFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["lora", str(training_folders.pair), str(tmp_path / "run")]) == 2
    assert "train lora on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_method_of_milora_init_can_be_trained() -> None:
    assert METHODS.keys() == INITIAL.keys() | {"lora", "full"}
    for name, method in METHODS.items():
        assert name == method.name
        assert method.is_initial == (name in INITIAL)
        assert (method.starts_from == "pair") == (name in INITIAL and INITIAL[name].writes_base)


def test_an_adapter_of_the_original_starts_on_the_original(training_folders: TrainingFolders, tmp_path: Path) -> None:
    source, out = str(training_folders.source), tmp_path / "out"
    make_start(METHODS["mica"], source, out, rank=4)
    start = find_start("mica", str(out))
    assert (start.model, start.adapter, start.revision, start.scale) == (source, str(out), None, 1)
    subject = evaluate.find_subject(str(out))
    assert (subject.model, subject.adapter, subject.is_residual) == (source, str(out), False)
    with pytest.raises(MismatchError, match="method mica, not rlmo: train mica on it"):
        find_start("rlmo", str(out))
    with pytest.raises(MismatchError, match="not the original model: train lora on"):
        find_start("lora", str(out))


def test_the_base_of_a_pair_is_never_evaluated_alone(training_folders: TrainingFolders) -> None:
    subject = evaluate.find_subject(str(training_folders.pair))
    assert (subject.adapter, subject.is_residual) == (str(training_folders.pair / "lora"), True)
    assert evaluate.find_subject(str(training_folders.source)).adapter is None


def test_the_initial_adapter_of_a_pair_is_no_base(training_folders: TrainingFolders) -> None:
    with pytest.raises(MismatchError, match=f"a part of the pair {training_folders.pair}: name that"):
        find_start("milora", str(training_folders.pair / "lora"))


def test_an_adapter_of_another_base_is_not_evaluated(training_folders: TrainingFolders, tmp_path: Path) -> None:
    source, pair = training_folders.source, training_folders.pair
    make_start(METHODS["milora"], str(source), tmp_path / "other", rank=8)
    for model, adapter, message in (
        (source, pair / "lora", "a residual base: evaluate"),
        (tmp_path / "other", pair / "lora", "do not belong together"),
        (pair / "lora", "", "is an adapter: name its pair"),
        (training_folders.data.parent, "", "is no model"),
    ):
        with pytest.raises(MismatchError, match=message):
            evaluate.find_subject(str(model), str(adapter) or None)
    assert evaluate.find_subject(str(pair), str(pair / "lora")).is_residual


def test_results_of_another_adapter_are_kept(
    training_folders: TrainingFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "results" / "gsm8k" / "x.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"model": "m", "adapter": "a"}')
    words = ["--tasks", "gsm8k", "--out", str(tmp_path / "results"), "--name", "x"]
    assert evaluate.main([str(training_folders.pair), *words]) == 2
    assert "has the results of a: give these another name" in capsys.readouterr().err
    assert earlier.read_text() == '{"model": "m", "adapter": "a"}'


def test_a_missing_package_names_the_extra(
    training_folders: TrainingFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("training_methods.find_spec", lambda name: None if name in ("trl", "lm_eval") else object())
    words = ["--data", str(training_folders.data)]
    assert train.main(["milora", str(training_folders.pair), str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert "train.py: the package trl is not installed; install the extra: pip install '.[train]'" in said
    assert evaluate.main([str(training_folders.pair)]) == 2
    assert "the package lm_eval is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
