"""A Hub id as PAIR and as --adapter: the record first, then the files that it names, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hub_server import Command, Hub, client
from support.marks import wide
from support.runs import make_outputs

Built = Callable[..., Path]
COMMANDS = {
    "verify": ("verify", "{}"),
    "report": ("report", "{}"),
    "merge": ("merge", "{}", "--out", "x", "--adapter", "trained"),
    "convert": ("convert", "{}", "--out", "x", "--adapter", "trained"),
}


@pytest.fixture(scope="module")
def outputs(checkpoint: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    make_outputs(checkpoint("llama"), folder, "out")
    return folder


@pytest.fixture
def hub(outputs: Path) -> Iterator[Hub]:
    """Repositories me/out, me/trained, me/merged and me/plain, each with one file more."""
    with Hub() as server:
        for path in outputs.iterdir():
            server.publish(f"me/{path.name}", path)
            repository = server.repositories[f"me/{path.name}"]
            repository.commit({**repository.files, "notes.bin": b"somebody's", "extra/notes.txt": b"somebody's"})
        yield server


@pytest.fixture
def milora(hub: Hub, outputs: Path, tmp_path: Path) -> Command:
    shutil.copytree(outputs / "trained", tmp_path / "trained")
    return client(hub, tmp_path)


def words(command: str, pair: str) -> list[str]:
    return [word.format(pair) for word in COMMANDS[command]]


def served(hub: Hub, repo: str) -> set[str]:
    return {name.removeprefix(f"{repo}/") for name, count in hub.served.items() if count and name.startswith(repo)}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_command_fetches_what_it_needs_and_nothing_else(
    hub: Hub, milora: Command, outputs: Path, tmp_path: Path
) -> None:
    lora = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    needed = {"report": {"milora_init.json"}, "convert": lora, "merge": files(outputs / "out"), "verify": set()}
    for command, names in needed.items():  # the cache keeps what was fetched
        hub.served.clear()
        done = milora(*words(command, "me/out"))
        assert done.returncode == 0, done.stderr
        before = {"merge": {"milora_init.json", *lora}}.get(command, set())
        assert served(hub, "me/out") == names - before, command
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


@pytest.mark.parametrize("name", ["merged", "plain"])
def test_verify_fetches_the_other_outputs_too(name: str, hub: Hub, milora: Command, outputs: Path) -> None:
    done = milora("verify", f"me/{name}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["code"] == {"merged": "merged", "plain": "converted"}[name]
    assert served(hub, f"me/{name}") == files(outputs / name)


def test_a_revision_is_fetched_and_the_commit_is_kept(hub: Hub, milora: Command, outputs: Path) -> None:
    first, last = (commit for commit, _ in hub.repositories["me/out"].commits)
    hub.repositories["me/out"].commit({"README.md": b"removed"})
    for revision in (first, last):
        assert milora("verify", f"me/out@{revision}").returncode == 0
    gone = milora("verify", "me/out")
    assert gone.returncode == 1
    assert "me/out is no output of milora-init: the repository has none of milora_init.json" in gone.stderr
    unknown = milora("verify", "me/out@v9")
    assert unknown.returncode == 1
    assert "me/out has no revision 'v9'" in unknown.stderr


def test_without_a_network_the_cache_is_used_and_what_is_not_in_it_is_named(hub: Hub, milora: Command) -> None:
    assert milora("report", "me/out").returncode == 0
    assert milora("report", "me/out", HF_HUB_OFFLINE="1").returncode == 0
    partly = milora("verify", "me/out", HF_HUB_OFFLINE="1")
    assert partly.returncode == 1
    assert "cache" in partly.stderr
    assert "differs" not in partly.stderr  # the output is not damaged, only not here
    reached = milora("verify", "me/out")
    assert reached.returncode == 0
    assert "not reached" not in reached.stderr
    commit = hub.repositories["me/out"].commits[-1][0]
    requests = len(hub.requests)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = milora("verify", "me/out", **environment)
        assert done.returncode == 0, done.stderr
        assert f"note: the Hub was not reached: me/out is read from the cache, at commit {commit[:12]}" in done.stderr
        assert "not reached" not in milora("verify", "me/out", "--quiet", **environment).stderr
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        nowhere = milora("verify", "me/merged", **environment)
        assert nowhere.returncode == 1
        assert "cache" in nowhere.stderr
        assert "Retrying" not in nowhere.stderr
    assert len(hub.requests) == requests


def test_a_folder_that_is_here_is_not_looked_for_on_the_hub(hub: Hub, milora: Command, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "trained", tmp_path / "me" / "out")
    assert "me/out is an adapter, and no output of milora-init" in milora("report", "me/out").stderr
    assert not hub.requests


def test_the_lines_of_a_report_load_the_revision_that_was_named(hub: Hub, milora: Command, outputs: Path) -> None:
    for commit, _ in hub.repositories["me/out"].commits:
        said = json.loads(milora("report", f"me/out@{commit}", "--json").stdout)["load"]
        assert f'from_pretrained("me/out", dtype="auto", revision="{commit}")' in said
        assert f'"me/out", subfolder="lora", is_trainable=True, revision="{commit}")' in said


@pytest.mark.parametrize(
    "name", ["absent", "./me/out", "a/b/c", "me/out@", *map(wide, ("/me/out", "../out", "me/..", ""))]
)
def test_what_is_no_folder_and_no_hub_id_is_a_usage_error_in_every_command(
    name: str, hub: Hub, milora: Command
) -> None:
    texts = set()
    for command in COMMANDS:
        done = milora(*words(command, name))
        assert done.returncode == 2, (command, done.stderr)
        texts.add(done.stderr.partition("error: ")[2].splitlines()[0])
    assert texts == {f"{name}: no such folder" if name else "PAIR is empty"}
    assert not hub.requests


@pytest.mark.parametrize("name", ["me/absent", "me/trained"])
def test_what_the_hub_does_not_have_is_the_same_error_in_every_command(name: str, hub: Hub, milora: Command) -> None:
    texts = set()
    for command in COMMANDS:
        done = milora(*words(command, name))
        assert done.returncode == 1, (command, done.stderr)
        texts.add(done.stderr.partition("error: ")[2])
    assert len(texts) == 1
    text = texts.pop()
    assert ("'me/absent'" if name == "me/absent" else "me/trained is no output of milora-init") in text


@pytest.mark.parametrize(("name", "what"), [("merged", "a merged model"), ("plain", "a converted adapter")])
def test_another_kind_of_output_is_refused_before_its_files_are_fetched(
    name: str, what: str, hub: Hub, milora: Command
) -> None:
    for command in ("report", "merge", "convert"):
        done = milora(*words(command, f"me/{name}"))
        assert done.returncode == 1
        assert f"me/{name} is {what}, not a pair" in done.stderr
    assert len(served(hub, f"me/{name}")) == 1


def test_the_trained_adapter_may_be_on_the_hub(hub: Hub, milora: Command, outputs: Path, tmp_path: Path) -> None:
    for command, record in (("merge", "milora_merge.json"), ("convert", "milora_convert.json")):
        done = milora(command, str(outputs / "out"), "--adapter", "me/trained", "--out", command)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / command / record).read_text())["adapter"] == "me/trained"
    assert milora("verify", str(outputs / "out"), "--adapter", "me/trained").returncode == 0
    assert served(hub, "me/trained") == {"adapter_config.json", "adapter_model.safetensors"}
    for name in ("me/absent", "me/out"):
        done = milora("merge", str(outputs / "out"), "--adapter", name, "--out", "x")
        assert done.returncode == 1
        assert name in done.stderr


@pytest.mark.parametrize("repo", ["out", "merged", "plain"])
@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", *map(wide, ("a/../../evil", ".git/evil", "a\\evil"))])
def test_a_record_that_names_a_file_outside_fetches_nothing(
    name: str, repo: str, hub: Hub, milora: Command, tmp_path: Path
) -> None:
    repository = hub.repositories[f"me/{repo}"]
    record = next(file for file in repository.files if file.startswith("milora_"))
    content = json.loads(repository.files[record])
    content["files"][name] = 1
    content["hashes"][name] = "0" * 64
    repository.commit({**repository.files, record: json.dumps(content).encode(), name: b"evil"})
    done = milora("verify", f"me/{repo}")
    assert done.returncode == 1
    assert "that this version reads" in done.stderr
    assert served(hub, f"me/{repo}") == {record}
    assert not list(tmp_path.rglob("*evil*"))


def test_a_name_with_wildcards_fetches_that_file_only(hub: Hub, milora: Command) -> None:
    repository = hub.repositories["me/merged"]
    content = json.loads(repository.files["milora_merge.json"])
    content["files"]["*"] = 1
    content["hashes"]["*"] = "0" * 64
    repository.commit({**repository.files, "milora_merge.json": json.dumps(content).encode()})
    done = milora("verify", "me/merged")
    assert done.returncode == 1
    assert "*: missing" in done.stderr
    assert not {"notes.bin", "extra/notes.txt"} & served(hub, "me/merged")


def test_a_file_that_the_repository_lacks_is_a_damaged_output(hub: Hub, milora: Command) -> None:
    repository = hub.repositories["me/out"]
    repository.commit({name: data for name, data in repository.files.items() if "00003-of" not in name})
    done = milora("verify", "me/out")
    assert done.returncode == 1
    assert "model-00003-of-00010.safetensors: missing" in done.stderr


def test_a_hint_names_the_repository_and_not_a_folder_of_the_cache(hub: Hub, milora: Command) -> None:
    repository = hub.repositories["me/out"]
    repository.commit({**repository.files, "config.json": repository.files["config.json"] + b" "})
    done = milora(*words("merge", "me/out"))
    assert done.returncode == 1
    assert "error: me/out: config.json was changed or removed\n\nhint: milora-init verify me/out\n" in done.stderr


def test_a_private_repository_needs_a_token(hub: Hub, milora: Command) -> None:
    hub.repositories["me/out"].private = True
    assert milora("report", "me/out").returncode == 0
    refused = milora("report", "me/out@main", HF_TOKEN="hf_wrongwrongwrong", HF_HUB_CACHE="empty")
    assert refused.returncode == 1
    assert "hf auth login" in refused.stderr
    assert "hf_wrong" not in refused.stderr
