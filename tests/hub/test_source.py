"""hub.source: a complete cache needs no network, and an error names the model or revision that is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import contents

from milora_init.checkpoint.folder import open_checkpoint
from milora_init.errors import CheckpointError, HubError, UsageError
from milora_init.hub.source import is_hub_id, locate_model, open_snapshot
from milora_init.manifest import Manifest
from milora_init.options import InitOptions

Built = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(source: Path, cache: Path, *, revision: str = "main") -> Path:
    """Lay a checkpoint into a Hub cache as huggingface_hub does: links into blobs, under a commit, named by a ref."""
    repo = cache / "models--tiny--llama"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(COMMIT)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def get(cache: Path, **values: Any) -> Path:
    return open_snapshot("tiny/llama", **{"revision": None, "cache_dir": str(cache), "token": None, **values})[0]


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_model_in_the_cache_is_found_without_a_network(
    revision: str | None, checkpoint: Built, tmp_path: Path
) -> None:
    snapshot = cached(checkpoint("llama"), tmp_path)
    found = get(tmp_path, revision=revision)
    assert found == snapshot
    assert open_checkpoint(found).tensors.keys() == open_checkpoint(checkpoint("llama")).tensors.keys()


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        HubError,
        match="'tiny/llama' is neither a local folder nor complete in the local cache, and HF_HUB_OFFLINE is set",
    ) as caught:
        get(tmp_path)
    assert "hf download tiny/llama" in caught.value.hint


def test_a_revision_that_is_not_in_the_cache_is_an_error(checkpoint: Built, tmp_path: Path) -> None:
    cached(checkpoint("llama"), tmp_path)
    with pytest.raises(HubError, match="tiny/llama"):
        get(tmp_path, revision="another")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gpt2", True), ("org/name", True), ("org/name-7B_v0.1", True), ("a/b/c", False), ("no such model", False),
        ("./name", False), ("/name", False), ("~/name", False), ("org/..", False), ("org/", False), ("", False),
    ],
)  # fmt: skip
def test_what_has_the_form_of_a_hub_id(name: str, answer: bool) -> None:
    assert is_hub_id(name) == answer


@pytest.mark.parametrize("name", ["a/b/c", "no such model", "tiny/..", "-x/-y"])
def test_a_name_that_no_model_can_have_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(HubError) as caught:
        open_snapshot(name, revision=None, cache_dir=str(tmp_path), token=None)
    assert name in caught.value.message


def test_a_revision_inside_the_name_is_named_with_the_option_for_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tiny/llama@main: no such folder") as caught:
        locate_model(InitOptions(model="tiny/llama@main", out="out", cache_dir=str(tmp_path)))
    assert caught.value.hint.endswith("tiny/llama --revision main")


def test_the_main_job_records_the_commit_and_leaves_the_cache_alone(
    checkpoint: Built, start: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder tiny/llama stands
    cached(checkpoint("llama"), tmp_path / "cache")
    before = contents(tmp_path / "cache")
    manifest = start(Path("tiny/llama"), cache_dir=str(tmp_path / "cache"))
    assert manifest.source["revision"] == COMMIT
    assert manifest.source["model"] == "tiny/llama"
    assert contents(tmp_path / "cache") == before
    out = contents(tmp_path / "out")
    assert out["config.json"] == (checkpoint("llama") / "config.json").read_bytes()
    assert json.loads(out["milora_init.json"])["source"] == manifest.source
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_cached_file_that_links_to_another_repositorys_is_refused(
    checkpoint: Built, start: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = cached(checkpoint("llama"), tmp_path / "cache")
    other = tmp_path / "cache" / "models--my--private" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_bytes(b"mine")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(other / "secret")
    with pytest.raises(CheckpointError, match=r"'tokenizer\.json' leads out of"):
        start(Path("tiny/llama"), cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "out").exists()
