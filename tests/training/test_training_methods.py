"""METHOD, BASE and the options: what fits, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest
import train
from support.training_folders import TrainingFolders
from training_methods import METHODS, MismatchError, find_start


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
        ("pissa", "pair", {}, "mode min, pissa needs mode max"),
        ("lora", "pair", {}, "not the original model"),
        ("full", "pair", {}, "not the original model"),
        ("milora", "source", {}, "--mode min"),
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


def test_every_method_that_has_an_initial_adapter_names_its_mode() -> None:
    for name, method in METHODS.items():
        assert name == method.name
        assert (method.mode is None) == (method.starts_from in ("fresh", "full"))


def test_the_base_of_a_pair_is_never_evaluated_alone(training_folders: TrainingFolders) -> None:
    subject = evaluate.find_subject(str(training_folders.pair))
    assert (subject.adapter, subject.is_residual) == (str(training_folders.pair / "lora"), True)
    assert evaluate.find_subject(str(training_folders.source)).adapter is None
