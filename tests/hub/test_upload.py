"""From an output to a Hub: the real huggingface_hub, over HTTP, against a server that can misbehave."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support import fork_server
from support.hub_server import Command, Hub, client, fetched
from support.marks import wide
from support.training import load, logits

from milora_init import InitOptions, initialize
from milora_init.manifest import Manifest
from milora_init.verification.verify import verify

Built = Callable[..., Path]
Start = Callable[..., Manifest]
INIT = ("--model", "tiny/llama", "--out", "out", "--rank", "4", "--device", "cpu")


def test_a_pushed_output_is_whole_names_its_repository_and_leaves_the_folder_alone(
    hub: Hub, milora: Command, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    start(source)
    before = (tmp_path / "out" / "lora" / "adapter_config.json").read_bytes()
    done = milora("push", "out", "me/tiny-milora", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.url}/me/tiny-milora"
    assert (tmp_path / "out" / "lora" / "adapter_config.json").read_bytes() == before
    repository = hub.repositories["me/tiny-milora"]
    assert repository.private
    there = fetched(hub, "me/tiny-milora", tmp_path / "there")
    config = json.loads((there / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/tiny-milora"
    assert verify(str(there), model=str(source)).ok
    pair = logits(load(there, there / "lora"))
    torch.testing.assert_close(pair, logits(load(source)), rtol=1e-4, atol=1e-4)
    everything = b"".join(repository.files.values())
    assert str(tmp_path).encode() not in everything  # nobody's folders are published
    assert hub.token.encode() not in everything


def test_the_card_says_what_it_is_and_how_to_load_it(
    hub: Hub, milora: Command, checkpoint: Built, own: Built, tmp_path: Path
) -> None:
    source = own("llama")
    (source / "README.md").write_text("---\nlicense: llama2\nlanguage: [en]\n---\n# Tiny\n")
    commit = hub.publish("tiny/llama", source)
    done = milora("--model", "tiny/llama", "--out", "out", "--rank", "4", "--push-to-hub", "me/card", "--public")
    assert done.returncode == 0, done.stderr
    assert not hub.repositories["me/card"].private
    card = ModelCard(hub.repositories["me/card"].files["README.md"].decode())
    data = dict(vars(card.data))
    assert data["base_model"] == "tiny/llama"
    assert (data["license"], data["language"], data["library_name"]) == ("llama2", ["en"], "peft")
    assert "milora" in data["tags"]
    for part in (
        commit, "The base alone is not the original model", "DPO or GRPO", 'from_pretrained(base, "me/card"',
        "| q_proj | 32 x 32 | 2 | 4 |", "wang2025milora", "rank 4",
    ):  # fmt: skip
        assert part in card.text, part


def test_a_push_that_was_cut_off_sends_only_what_is_missing_the_next_time(hub: Hub, milora: Command, out: Path) -> None:
    hub.fault = lambda method, _: 400 if method == "PUT" and len(hub.stored) >= 6 else None
    first = milora("push", "out", "me/tiny")
    assert first.returncode == 1
    assert "a request to the Hub for me/tiny failed" in first.stderr
    assert "Traceback" not in first.stderr
    assert set(hub.repositories["me/tiny"].files) == {".gitattributes"}  # nobody sees half of a model
    sent = dict(hub.uploads)
    assert len(sent) == 6
    hub.fault = lambda *_: None
    assert milora("push", "out", "me/tiny").returncode == 0
    assert all(hub.uploads[oid] == size for oid, size in sent.items())
    assert "milora_init.json" in hub.repositories["me/tiny"].files
    commits = len(hub.repositories["me/tiny"].commits)
    assert milora("push", "out", "me/tiny").returncode == 0
    assert all(count == len(hub.stored[oid]) for oid, count in hub.uploads.items())
    assert len(hub.repositories["me/tiny"].commits) == commits


def test_a_repository_of_something_else_is_written_to_only_when_it_is_said(
    hub: Hub, milora: Command, checkpoint: Built, out: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"somebody's")
    (other / "notes.txt").write_bytes(b"somebody's")
    hub.publish("me/other", other)
    refused = milora("push", "out", "me/other")
    assert refused.returncode == 1
    assert "me/other exists and is not an output of milora-init: it contains model.safetensors" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert len(hub.repositories["me/other"].commits) == 1
    before_the_work = milora("--model", str(checkpoint("llama")), "--out", "late", "--push-to-hub", "me/other")
    assert before_the_work.returncode == 1
    assert not (tmp_path / "late").exists()
    assert milora("push", "out", "me/other", "--yes").returncode == 0
    files = hub.repositories["me/other"].files
    assert "model.safetensors" not in files  # it would be loaded instead of the shards
    assert files["notes.txt"] == b"somebody's"
    assert verify(str(fetched(hub, "me/other", tmp_path / "there"))).ok


def test_another_output_of_ours_is_replaced_as_a_whole(
    hub: Hub, milora: Command, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    start(checkpoint("llama"), out=str(tmp_path / "one"))
    start(checkpoint("gpt2"), out=str(tmp_path / "two"), target=("c_attn",))
    assert milora("push", "one", "me/x").returncode == 0
    refused = milora("push", "two", "me/x")
    assert refused.returncode == 1
    assert "me/x holds another output of milora-init: a pair of " in refused.stderr
    assert milora("push", "two", "me/x", "--overwrite").returncode == 0
    assert verify(str(fetched(hub, "me/x", tmp_path / "there"))).ok
    start(checkpoint("gpt2"), out=str(tmp_path / "three"), target=("c_attn",), rank=2)
    third = milora("push", "three", "me/x")  # of the same model
    assert "has the output; an earlier one is in the repository's history" in third.stdout
    assert "earlier" not in milora("push", "three", "me/x").stdout


def test_from_hub_to_hub_a_model_larger_than_the_disk(
    hub: Hub, milora: Command, checkpoint: Built, tmp_path: Path
) -> None:
    """Measured from outside: what of source and output lies on the disk at any moment."""
    hub.publish("tiny/llama", checkpoint("llama"))
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.0005):
            try:
                most[0] = max(most[0], sum(p.stat().st_size for p in tmp_path.rglob("model-*")))
            except OSError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    command = ("--model", "tiny/llama", "--out", "out", "--rank", "4", "--low-disk", "--push-to-hub", "me/through")
    done = milora(*command)
    over.set()
    watcher.join()
    assert done.returncode == 0, done.stderr
    assert 'from_pretrained("me/through"' in done.stdout  # nothing is here to be loaded
    assert f"{hub.url}/me/through has the output" in done.stdout
    sizes = sorted(len(c) for n, c in hub.repositories["tiny/llama"].files.items() if n.endswith(".safetensors"))
    assert 0 < most[0] < sum(sizes)  # of both together twice that would be needed
    assert not (tmp_path / "out").exists()
    there = fetched(hub, "me/through", tmp_path / "there")
    assert verify(str(there), model=str(checkpoint("llama")), all_components=True).ok
    assert not [name for name in hub.repositories["me/through"].files if "unfinished" in name]
    again = milora(*command, "--json")
    assert json.loads(again.stdout)["status"] == "unchanged"


def die_before_the_folder_is_removed(*words: str) -> None:
    from milora_init.run.output_folder import OutputFolder

    OutputFolder.discard = lambda *_: os._exit(9)  # type: ignore[method-assign]
    fork_server.command_line(*words)


@pytest.mark.wide
def test_what_a_run_that_was_killed_after_its_commit_has_left_goes(
    hub: Hub, milora: Command, checkpoint: Built, tmp_path: Path
) -> None:
    hub.publish("tiny/llama", checkpoint("llama"))
    command = ("--model", "tiny/llama", "--out", "out", "--rank", "4", "--low-disk", "--push-to-hub", "me/through")
    assert client(hub, tmp_path, die_before_the_folder_is_removed)(*command).returncode == 9
    commits = len(hub.repositories["me/through"].commits)
    assert (tmp_path / "out").exists()
    done = milora(*command)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    assert len(hub.repositories["me/through"].commits) == commits


def test_a_push_of_shards_that_was_cut_off_goes_on(
    hub: Hub, milora: Command, checkpoint: Built, tmp_path: Path
) -> None:
    hub.publish("tiny/llama", checkpoint("llama"))
    command = ("--model", "tiny/llama", "--out", "out", "--rank", "4", "--low-disk", "--push-to-hub", "me/through")
    hub.fault = lambda _, path: 403 if path.endswith("/commit/main") and len(hub.stored) >= 5 else None
    first = milora(*command)
    assert first.returncode == 1
    half = hub.repositories["me/through"].files
    assert "config.json" not in half  # no model yet, for nobody
    assert "unfinished-by-milora-init" in half
    hub.fault = lambda *_: None
    sent = dict(hub.uploads)
    done = milora(*command)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert all(hub.uploads[oid] == size for oid, size in sent.items())
    assert verify(str(fetched(hub, "me/through", tmp_path / "there")), model=str(checkpoint("llama"))).ok


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("push", "nowhere", "me/x"), "nowhere: no such folder", 2),
        (("push", "out/lora", "me/x"), "out/lora is a part of a pair", 2),
        (("push", "out", "me/not a name"), "is no repository on the Hub that this token can access", 1),
    ],
)
def test_what_cannot_be_pushed_is_named(
    arguments: tuple[str, ...], message: str, status: int, milora: Command, out: Path
) -> None:
    done = milora(*arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_token_that_may_write_nothing_is_made(hub: Hub, milora: Command, out: Path) -> None:
    done = milora("push", "out", "me/x", HF_TOKEN="hf_wrongwrongwrong")
    assert done.returncode == 1
    assert "hf auth login" in done.stderr
    assert "hf_wrong" not in done.stderr
    assert not hub.repositories


def test_a_folder_that_was_changed_since_is_not_pushed(hub: Hub, milora: Command, out: Path) -> None:
    (out / "model-00002-of-00010.safetensors").unlink()
    done = milora("push", "out", "me/x")
    assert done.returncode == 1
    assert "model-00002-of-00010.safetensors was changed or removed" in done.stderr
    assert not hub.repositories


def test_a_file_whose_bytes_were_changed_is_not_pushed(hub: Hub, milora: Command, out: Path) -> None:
    path = out / "model-00002-of-00010.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = milora("push", "out", "me/x")
    assert done.returncode == 1
    assert "model-00002-of-00010.safetensors was changed after the run" in done.stderr
    assert "me/x" not in hub.repositories


@pytest.mark.parametrize("repo", ["mine", "/mine", "me/", "me/mine/too"])
def test_a_repository_without_an_owner_is_a_usage_error_and_nothing_is_made(
    repo: str, hub: Hub, milora: Command, out: Path
) -> None:
    for done in (milora("push", "out", repo), milora(*INIT, "--push-to-hub", repo)):
        assert done.returncode == 2
        assert "name it org/name" in done.stderr
    assert not hub.repositories


def test_an_output_that_is_finished_here_goes_to_the_hub_all_the_same(
    hub: Hub, milora: Command, checkpoint: Built, tmp_path: Path
) -> None:
    hub.publish("tiny/llama", checkpoint("llama"))
    assert milora(*INIT).returncode == 0
    done = milora(*INIT, "--low-disk", "--push-to-hub", "me/late", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"]["repo"] == "me/late"
    assert verify(str(fetched(hub, "me/late", tmp_path / "there")), model=str(checkpoint("llama"))).ok


def test_a_run_that_goes_on_with_another_repository_leaves_both_honest(
    hub: Hub, milora: Command, checkpoint: Built, tmp_path: Path
) -> None:
    """The first is no model and says so; the second is whole, whatever had gone to the first."""
    hub.publish("tiny/llama", checkpoint("llama"))
    hub.fault = lambda _, path: 403 if path.endswith("/commit/main") and len(hub.stored) >= 4 else None
    assert milora(*INIT, "--low-disk", "--push-to-hub", "me/first").returncode == 1
    hub.fault = lambda *_: None
    done = milora(*INIT, "--low-disk", "--push-to-hub", "me/second")
    assert done.returncode == 0, done.stderr
    assert "config.json" not in hub.repositories["me/first"].files
    assert verify(str(fetched(hub, "me/second", tmp_path / "there")), model=str(checkpoint("llama"))).ok


def test_an_earlier_output_is_no_model_while_a_run_that_began_without_a_push_replaces_it(
    hub: Hub, milora: Command, checkpoint: Built, start: Start, tmp_path: Path
) -> None:
    hub.publish("tiny/llama", checkpoint("llama"))
    start(checkpoint("llama"), rank=3)
    assert milora("push", "out", "me/x").returncode == 0
    assert "config.json" in hub.repositories["me/x"].files
    command = ("--model", "tiny/llama", "--out", "other", *INIT[-4:], "--low-disk", "--yes")
    hub.fault = lambda _, path: 403 if "00006-of" in path and len(hub.served) > 12 else None
    milora(*command)
    assert (tmp_path / "other" / ".milora-init" / "journal.jsonl").exists()
    stored = len(hub.stored)
    hub.fault = lambda _, path: 403 if path.endswith("/commit/main") and len(hub.stored) >= stored + 2 else None
    assert milora(*command, "--push-to-hub", "me/x").returncode == 1
    assert "config.json" not in hub.repositories["me/x"].files
    hub.fault = lambda *_: None
    done = milora(*command, "--push-to-hub", "me/x")
    assert done.returncode == 0, done.stderr
    assert verify(str(fetched(hub, "me/x", tmp_path / "there")), model=str(checkpoint("llama"))).ok


def test_what_an_earlier_output_had_and_this_one_has_not_goes(
    hub: Hub, milora: Command, own: Built, start: Start, tmp_path: Path
) -> None:
    source = own("llama")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    start(source, out=str(tmp_path / "with"))
    (source / "chat_template.jinja").unlink()
    (source / "README.md").write_text("---\nlicense: [unclosed\n---\n")  # a card that is broken costs its licence only
    start(source, out=str(tmp_path / "without"))
    assert milora("push", "with", "me/x").returncode == 0
    hub.repositories["me/x"].commit({**hub.repositories["me/x"].files, "notes.txt": b"somebody's"})
    done = milora("push", "without", "me/x")
    assert done.returncode == 0, done.stderr
    assert "chat_template.jinja" not in hub.repositories["me/x"].files
    assert "notes.txt" in hub.repositories["me/x"].files


def push_by_the_api(model: str, *through: str) -> None:
    options = InitOptions(
        model=model, out="out", rank=4, device=("cpu",), push_to_hub="me/api", low_disk="--low-disk" in through
    )
    print(initialize(options).out)


@pytest.mark.parametrize("through", [[], wide(["--low-disk"])])
def test_python_pushes_what_it_was_told_to_push(
    through: list[str], hub: Hub, checkpoint: Built, tmp_path: Path
) -> None:
    push = client(hub, tmp_path, push_by_the_api)
    for _ in range(2):
        done = push(str(checkpoint("llama")), *through)
        assert done.returncode == 0, done.stderr
        assert verify(str(fetched(hub, "me/api", tmp_path / "there"))).ok
        assert done.stdout.split()[0] == ("me/api" if through else "out")
    assert (tmp_path / "out").exists() == (not through)


def tell_whether_bars_are_drawn(*words: str) -> None:
    """Run the command line in a process that has not imported huggingface_hub yet."""
    fork_server.forget("huggingface_hub", "milora_init")
    from huggingface_hub.utils import are_progress_bars_disabled

    from milora_init.cli.main import run

    sys.stderr.isatty = lambda: "--terminal" in words  # type: ignore[method-assign]
    status = run([word for word in words if word != "--terminal"])

    print("bars", not are_progress_bars_disabled(), file=sys.stderr)
    sys.exit(status)


@pytest.mark.parametrize(
    ("words", "bars"),
    [wide(["-q", "--terminal"], False), (["--json", "--terminal"], False), wide([], False), (["--terminal"], True)],
)
def test_a_push_shows_bars_to_people_only(words: list[str], bars: bool, hub: Hub, out: Path, tmp_path: Path) -> None:
    push = client(hub, tmp_path, tell_whether_bars_are_drawn)
    done = push("push", "out", "me/bars", *words, HF_HUB_DISABLE_PROGRESS_BARS=None)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(f"bars {bars}\n")


def test_a_push_that_fails_does_not_speak_of_downloads(hub: Hub, milora: Command, out: Path) -> None:
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        done = milora("push", "out", "me/x", **environment)
        assert done.returncode == 1
        assert "error: " in done.stderr
        for word in ("download", "fetch", "cache", "please report"):
            assert word not in done.stderr, word


@pytest.mark.parametrize("low_disk", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_parts_upload_their_files_and_the_last_command_commits_once(
    low_disk: bool, hub: Hub, milora: Command, checkpoint: Built, tmp_path: Path
) -> None:
    """Each part fetches the files that it needs from the Hub, and no other ones. With --low-disk it keeps no shard."""
    hub.publish("tiny/llama", checkpoint("llama"))
    words = [*INIT, "--push-to-hub", "me/parts", "--quiet", *(["--low-disk"] if low_disk else [])]
    shards = {name for name in hub.repositories["tiny/llama"].files if name.endswith(".safetensors")}
    assert milora(*INIT, "--dry-run").returncode == 0
    headers = {name: hub.served[f"tiny/llama/{name}"] for name in shards}
    fetched_by = []
    for part in ("1/2", "2/2"):
        before = dict(hub.served)
        done = milora(*words, "--part", part)
        assert done.returncode == 0, done.stderr
        served = {name: hub.served[f"tiny/llama/{name}"] - before[f"tiny/llama/{name}"] for name in shards}
        fetched_by.append({name for name in shards if served[name] > headers[name]})
    assert fetched_by[0] | fetched_by[1] == shards
    assert not fetched_by[0] & fetched_by[1]
    repository = hub.repositories["me/parts"]
    commits = len(repository.commits)
    assert not shards & repository.files.keys()
    uploaded = dict(hub.uploads)
    assert len(uploaded) == len(shards)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (0 if low_disk else len(shards))
    done = milora(*words)
    assert done.returncode == 0, done.stderr
    assert len(repository.commits) == commits + 1
    assert (tmp_path / "out").exists() != low_disk
    assert verify(str(fetched(hub, "me/parts", tmp_path / "there")), model=str(checkpoint("llama"))).ok
    assert shards < repository.files.keys()
    assert {digest: hub.uploads[digest] for digest in uploaded} == uploaded  # none was sent again
