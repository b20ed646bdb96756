"""report --adapter: what a training did to the weights, compared with plain float64 linear algebra."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES
from support.family_training import initialize_family, load, train, train_model
from support.marks import wide
from support.tiny_models import tensors
from support.trained_beside import load as load_model
from support.trained_beside import train as train_beside
from support.trained_beside import with_settings
from torch import Tensor

from milora_init.cli.main import run
from milora_init.export.merge import merge, plan_of
from milora_init.export.movement import measure
from milora_init.linalg.movement import INTRUDER_COSINE, INTRUDER_VECTORS, movement


def truth(W: Tensor, D: Tensor, r: int) -> tuple[float, float, float, float, int]:
    """|D| / |W|, the three shares, and the intruder dimensions, by full SVDs."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    squares = [
        float((U[:, part].mT @ D).square().sum() + (D @ Vh[part].mT).square().sum()) / float(2 * D.square().sum())
        for part in (slice(-r, None), slice(r))
    ]
    new = torch.linalg.svd(W + D, full_matrices=False).U[:, :INTRUDER_VECTORS]
    found = int(((U.mT @ new).abs().amax(dim=0) <= INTRUDER_COSINE).sum())
    return float(D.norm() / W.norm()), squares[0], 1 - sum(squares), squares[1], found


@pytest.mark.parametrize("shape", [(40, 40), (64, 32), (32, 64)])
@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_shares_and_intruders_are_those_of_full_svds(shape: tuple[int, int], strength: float) -> None:
    torch.manual_seed(0)
    W = torch.randn(*shape, dtype=torch.float64)
    B, A = strength * torch.randn(shape[0], 3, dtype=torch.float64), torch.randn(3, shape[1], dtype=torch.float64)
    found = movement(W, B, A, 4)
    relative, minor, middle, principal, intruders = truth(W, B @ A, 4)
    assert (found.relative, found.minor, found.middle, found.principal) == pytest.approx(
        (relative, minor, middle, principal), rel=1e-6
    )
    assert found.intruders == intruders
    assert found.vectors == 10


def test_an_update_in_the_smallest_directions_is_minor_and_strengthened_ones_are_no_intruders() -> None:
    torch.manual_seed(0)
    W = torch.randn(48, 32, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    for part, share in ((slice(-4, None), "minor"), (slice(4), "principal"), (slice(10, 14), "middle")):
        found = movement(W, 50 * U[:, part], Vh[part], 4)
        assert getattr(found, share) == pytest.approx(1, abs=1e-9)
        assert found.intruders == 0
    nothing = movement(W, torch.zeros(48, 2), torch.zeros(2, 32), 4)
    assert (nothing.norm, nothing.minor, nothing.intruders) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [wide("llama", {}), ("gpt2", {}), wide("mixtral", {}), ("llama", {"method": "rlmo"})],
)
def test_every_weight_is_measured_against_the_original(name: str, options: dict[str, str], tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, out, manifest = initialize_family(name, tmp_path, "float32", **options)
    method = manifest.method
    base, adapter = (out, out / "lora") if method.writes_base else (source, out)
    trained = train_model(family, load(family, base, adapter, trainable=True), tmp_path / "trained")
    merge(str(out), str(tmp_path / "merged"), adapter=str(trained))
    before, after = tensors(source), tensors(tmp_path / "merged")
    weights = measure(*plan_of(str(out), str(trained)))
    assert [weight.module for weight in weights] == [record.module for record in manifest.weights]
    for weight, record in zip(weights, manifest.weights, strict=True):
        W, merged = before[record.tensor].double(), after[record.tensor].double()
        if record.row is not None:
            W, merged = W[record.row], merged[record.row]
        if record.transposed:
            W, merged = W.mT, merged.mT
        relative, minor, _, principal, intruders = truth(W, merged - W, min(record.rank, min(W.shape) // 2))
        moved = weight.moved
        assert moved.relative == pytest.approx(relative, rel=1e-3)
        assert (moved.minor, moved.principal) == pytest.approx((minor, principal), abs=2e-3)
        assert moved.intruders == intruders


def test_the_command_prints_a_table_json_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, out, _ = initialize_family("llama", tmp_path, "float32")
    train(FAMILIES["llama"], out, tmp_path / "trained")
    words = ["report", "out", "--adapter", "trained"]
    assert run([*words, "--plot", "moved.png"]) == 0
    said = capsys.readouterr().out
    assert "smallest" in said
    assert "trained: trained from out" in said
    assert (tmp_path / "moved.png").read_bytes().startswith(b"\x89PNG")
    assert run([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["movement"]) == 10
    for row in (*printed["movement"], *printed["movement_groups"]):
        assert row["minor"] + row["middle"] + row["principal"] == pytest.approx(1)


def dora(folder: Path) -> Path:
    family = FAMILIES["llama"]
    return train_beside(
        family, with_settings(folder / "out", load_model(family, folder / "out"), use_dora=True), folder / "dora", 1
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "trained", "--markdown"], "--adapter and --markdown exclude each other"),
        (["--adapter", "trained", "--html", "x.html"], "--adapter and --html exclude each other"),
        (["--model", "source"], "--model is for a report on a trained adapter"),
        (["--adapter", "absent"], "absent: no such folder"),
        (["--adapter", "dora"], "DoRA changes the length of every row"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    initialize_family("llama", tmp_path, "float32")
    if "dora" in words:
        dora(tmp_path)
    assert run(["report", "out", *words]) != 0
    assert message in capsys.readouterr().err
