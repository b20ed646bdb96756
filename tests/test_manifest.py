"""A damaged or edited manifest is refused with one clear error by every command, whichever field is wrong."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.family_training import initialize_family
from support.marks import mostly_wide, wide
from support.runs import initialize
from support.tiny_models import TARGETS, edit_inputs

from milora_init.checkpoint.folder import Checkpoint, open_checkpoint
from milora_init.cli.main import run
from milora_init.errors import CheckpointError, OutputError
from milora_init.export.merge import merge
from milora_init.hub.model_card import card_data, card_text, step_summary
from milora_init.manifest import MANIFEST, Manifest, read_manifest
from milora_init.options import InitOptions
from milora_init.records import MERGED, read_merged
from milora_init.report import report_json
from milora_init.verification.files import check_weight_records
from milora_init.verification.verify import verify

Built = Callable[..., Path]
JsonPath = tuple[str | int, ...]
JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**19, 10**400, -0.5, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "../x",
    "a" * 100_000, "\0", "(a+)+b", [], [[]], [1], {}, {"x": {}}, [{}] * 3, {"": None},
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(finished: Built) -> Path:
    return finished()


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initialize_family("mixtral", tmp_path_factory.mktemp("moe"), "float32")[1]


def json_paths(content: Any, at: JsonPath = ()) -> Iterator[JsonPath]:
    """The path of every value in a manifest; of its collections of like entries, only the first entry."""
    yield at
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    like = at in (("weights",), ("inputs",), ("files",), ("hashes",))
    for key, value in itertools.islice(items, 1 if like else None):
        yield from json_paths(value, (*at, key))


def with_value(content: Any, at: JsonPath, value: Any) -> Any:
    """A copy of the content with another value at a path; `...` removes the key."""
    if not at:
        return value
    copy = content.copy()
    if value is ... and len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = with_value(content[at[0]] if at[1:] else None, at[1:], value)
    return copy


def read_in_all_ways(base: Checkpoint, manifest: Manifest) -> None:
    """Do everything that the commands do with a manifest."""
    json.dumps(report_json(manifest), allow_nan=False)
    step_summary(manifest)
    card_text(manifest, "org/name")
    card_data(manifest)
    check_weight_records(base, manifest, None)


@pytest.mark.parametrize("junk", mostly_wide(range(len(JUNK) + 1), *range(0, len(JUNK) + 1, 3)))
@pytest.mark.parametrize("kind", ["pair", wide("moe")])
def test_any_value_at_any_place_is_read_or_refused(
    kind: str, junk: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    base, content = open_checkpoint(folder), json.loads((folder / MANIFEST).read_text())
    content["weights"] = sorted(content["weights"], key=lambda weight: not weight["expert"])[:1]  # an expert's first
    value = [*JUNK, ...][junk]
    refused = []
    for place in json_paths(content):
        if value is ... and not place:
            continue
        (tmp_path / MANIFEST).write_text(json.dumps(with_value(content, place, value)))
        try:
            manifest = read_manifest(tmp_path)
        except OutputError as error:
            refused.append(len(error.message))
        else:
            assert manifest
            read_in_all_ways(base, manifest)
    assert len(refused) > 20
    assert max(refused) < 1000


@given(st.binary(max_size=3), st.integers(0, 10**6), st.integers(0, 50))
def test_any_bytes_are_read_or_refused(
    pair: Path, tmp_path_factory: pytest.TempPathFactory, new: bytes, at: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    raw = (pair / MANIFEST).read_bytes()
    at %= len(raw)
    (folder / MANIFEST).write_bytes(raw[:at] + new + raw[at + cut :])
    try:
        manifest = read_manifest(folder)
    except OutputError:
        return
    assert manifest
    read_in_all_ways(open_checkpoint(pair), manifest)


BROKEN: dict[str, tuple[JsonPath, Any]] = {
    "fingerprint is not the hash": (("inputs", "seed"), 7),
    r"weights\[0\]\.scale has the invalid value": (("weights", 0, "scale"), -1.0),
    "(nan|NaN) is not a finite number": (("weights", 0, "scale"), float("nan")),
    "is too large": (("weights", 0, "rank"), 10**400),
    "has rank 33": (("weights", 0, "rank"), 33),
    r"weights\[0\]\.dtype has the invalid value 'float7'": (("weights", 0, "dtype"), "float7"),
    r"weights\[0\]\.shape has the invalid value": (("weights", 0, "shape"), [32, 0]),
    "the key or the row of an expert": (("weights", 0, "row"), 2),
    "two weights have the same place on disk": (("weights", 0, "tensor"), "model.layers.1.self_attn.q_proj.weight"),
    "versions has the invalid value": (("versions", "torch"), 2),
    "notices has the invalid value": (("notices",), "none"),
    "hashes has the invalid value": (("hashes", "config.json"), "abc"),
    "plain name of a file": (("files", "../../x"), 4),
    "patterns from a file are not run": (("adapter", "target_modules"), "(a+)+b"),
}


@pytest.mark.parametrize("says", BROKEN)
def test_every_command_refuses_a_broken_manifest(
    says: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Built
) -> None:
    content = json.loads((out / MANIFEST).read_text())
    place, value = BROKEN[says]
    (out / MANIFEST).write_text(json.dumps(with_value(content, place, value)))
    with pytest.raises(OutputError, match=says):
        read_manifest(out)
    lora, name = str(out / "lora"), str(out)
    for words in (
        ["verify", name],
        ["report", name],
        ["merge", name, "--out", str(tmp_path / "merged")],
        ["convert", "--init", lora, "--trained", lora, "--out", str(tmp_path / "plain")],
        ["push", name, "org/name"],
        ["--model", str(checkpoint("llama")), "--rank", "4", "--out", name, "--device", "cpu"],
    ):
        assert run(words) == 1
        error = capsys.readouterr().err
        assert "milora_init.json is not a manifest that this version reads" in error
        assert "Traceback" not in error
        assert "please report" not in error.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format": true}', b"3", b"9" * 5000, b"\xff\xfe"])
def test_a_file_that_is_no_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(OutputError, match="is not a manifest that this version reads"):
        read_manifest(tmp_path)


def test_a_pipe_or_a_folder_named_like_the_manifest_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    (tmp_path / "other" / MANIFEST).mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "other"):
        with pytest.raises(OutputError, match="is not a manifest that this version reads"):
            read_manifest(folder)


@pytest.mark.wide
def test_any_value_in_a_merge_record_is_read_or_refused(tmp_path: Path, pair: Path) -> None:
    merge(str(pair), str(tmp_path / "merged"))
    content = json.loads((tmp_path / "merged" / MERGED).read_text())
    for place in json_paths(content):
        for value in JUNK:
            (tmp_path / MERGED).write_text(json.dumps(with_value(content, place, value)))
            with suppress(OutputError):
                assert read_merged(tmp_path)
    (tmp_path / MERGED).write_text(json.dumps(content | {"files": {"../x": 1}}))
    with pytest.raises(OutputError, match="plain name of a file"):
        read_merged(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_wrong_transposed_field_is_found(kind: str, checkpoint: Built, tmp_path: Path) -> None:
    """The weight is square, so its shape shows nothing; only the model does."""
    folder = tmp_path / "out"
    initialize(InitOptions(model=str(checkpoint(kind)), out=str(folder), rank=4, target=TARGETS[kind], device=("cpu",)))
    content = json.loads((folder / MANIFEST).read_text())
    place = next(i for i, w in enumerate(content["weights"]) if w["shape"] == [32, 32])
    now = content["weights"][place]["transposed"]
    content = with_value(content, ("weights", place, "transposed"), not now)
    content["adapter"]["fan_in_fan_out"] = False
    (folder / MANIFEST).write_text(json.dumps(content))
    config = folder / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": False}))
    verdict = verify(str(folder))
    assert verdict.code == "damaged"
    assert f"has transposed {not now} by the manifest, {now} in the model" in [d.what for d in verdict.differences]
    with pytest.raises(CheckpointError, match=f"has transposed {not now} by the manifest"):
        merge(str(folder), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tensor", "model.norm.weight", "has tensor model.norm.weight by the manifest"),
        ("tensor", "nothing", "is stored in nothing by the manifest, but the model has no such tensor"),
        ("dtype", "float16", "is float16"),
        ("shape", [64, 32], "[64, 32] by the manifest"),
    ],
)
def test_a_weight_record_that_differs_from_the_base_is_found(
    field: str, value: Any, says: str, out: Path, tmp_path: Path
) -> None:
    content = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(with_value(content, ("weights", 0, field), value)))
    found = [d.what for d in verify(str(out)).differences]
    assert says in "\n".join(found)
    with pytest.raises(CheckpointError, match="by the manifest"):
        merge(str(out), str(tmp_path / "merged"))


def test_a_valid_manifest_with_other_inputs_is_read(pair: Path, tmp_path: Path) -> None:
    shutil.copy(pair / MANIFEST, tmp_path)
    edit_inputs(tmp_path / MANIFEST, seed=5)
    read = read_manifest(tmp_path)
    assert read
    assert read.inputs["seed"] == 5
