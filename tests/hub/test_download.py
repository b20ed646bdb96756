"""From a Hub to an output: the real huggingface_hub, over HTTP, against a server that can misbehave."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.hub_server import Command, Hub
from support.marks import wide
from support.tiny_models import contents
from support.tiny_models import tensors as load

Built = Callable[..., Path]


@pytest.fixture
def hub(checkpoint: Built) -> Iterator[Hub]:
    """A Hub with the tiny llama as `tiny/llama`."""
    with Hub() as server:
        server.publish("tiny/llama", checkpoint("llama"))
        yield server


INIT = ("--model", "tiny/llama", "--out", "out", "--rank", "4", "--device", "cpu")


def shards(hub: Hub) -> dict[str, int]:
    return {n: len(data) for n, data in hub.repositories["tiny/llama"].files.items() if n.endswith(".safetensors")}


def test_a_dry_run_downloads_no_weights(hub: Hub, milora: Command, tmp_path: Path) -> None:
    done = milora(*INIT, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["source"]["revision"] == hub.repositories["tiny/llama"].commits[0][0]
    assert plan["download_bytes"] == sum(shards(hub).values())
    served = {name: hub.served[f"tiny/llama/{name}"] for name in shards(hub)}
    assert all(0 < served[name] <= size for name, size in shards(hub).items())
    assert not list((tmp_path / "home").rglob("*.safetensors"))  # only ranges were read, and nothing kept


def test_the_output_is_that_of_the_same_folder(
    hub: Hub, milora: Command, checkpoint: Built, start: Callable[..., Any], tmp_path: Path
) -> None:
    done = milora(*INIT, "--json")
    assert done.returncode == 0, done.stderr
    commit = hub.repositories["tiny/llama"].commits[0][0]
    assert json.loads(done.stdout)["source"] == {"model": "tiny/llama", "revision": commit}
    start(checkpoint("llama"), out=str(tmp_path / "local"))
    here, there = contents(tmp_path / "local"), contents(tmp_path / "out")
    different = {"milora_init.json", "lora/adapter_config.json"}  # they name the source and the folder
    assert {n: c for n, c in here.items() if n not in different} == {
        n: c for n, c in there.items() if n not in different
    }
    again = milora(*INIT, "--json", HF_HUB_OFFLINE="1")  # the cache is complete now
    assert json.loads(again.stdout)["status"] == "unchanged"
    assert f"the Hub was not reached: tiny/llama is read from the cache, at commit {commit[:12]}" in again.stderr
    assert "not reached" not in done.stderr
    verified = milora("verify", "out", "--against", "tiny/llama")
    assert verified.returncode == 0, verified.stdout
    copied = milora("verify", "out", "--against", str(checkpoint("llama")))  # the same weights, not from the Hub
    assert copied.returncode == 0, copied.stdout


def test_a_commit_that_moves_during_the_run_changes_nothing(hub: Hub, milora: Command) -> None:
    """Every file is of the commit that the run began with."""
    repository = hub.repositories["tiny/llama"]
    first = repository.commits[0][0]

    def move(method: str, path: str) -> None:
        if method == "GET" and path.endswith("00002-of-00010.safetensors") and len(repository.commits) == 1:
            repository.commit(dict.fromkeys(repository.files, b"changed"))

    hub.fault = move
    done = milora(*INIT, "--json")
    assert done.returncode == 0, done.stderr
    assert len(repository.commits) == 2
    assert json.loads(done.stdout)["source"]["revision"] == first
    assert all(first in path for method, path in hub.requests if "/resolve/" in path and ".safetensors" in path)


@pytest.mark.parametrize("status", [wide(401), 404, wide(503)])
def test_a_complete_cache_is_used_where_the_hub_refuses_the_model(status: int, hub: Hub, milora: Command) -> None:
    assert milora(*INIT).returncode == 0
    hub.fault = lambda *_: status
    again = milora(*INIT, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "unchanged"
    assert "the Hub refused it: tiny/llama is read from the cache, at commit" in again.stderr


def test_a_connection_cut_in_the_middle_of_a_shard_is_taken_up(hub: Hub, milora: Command) -> None:
    cut: list[str] = []

    def fault(method: str, path: str) -> str | None:
        whole = method == "GET" and path.endswith("00003-of-00010.safetensors")
        if whole and len(cut) < 2:
            cut.append(path)
            return "cut"
        return None

    planned = milora(*INIT, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    hub.fault = fault
    done = milora(*INIT)
    assert done.returncode == 0, done.stderr
    assert len(cut) == 2
    assert milora("verify", "out", "--against", "tiny/llama").returncode == 0


def test_the_next_shard_is_fetched_while_this_one_is_worked_on(hub: Hub, milora: Command) -> None:
    """Before the first shard's line is printed, the second was asked for."""
    done = milora(*INIT)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("fetching model", "["))]
    fetched = [n for n, line in enumerate(lines) if line.startswith("fetching")]
    finished = [n for n, line in enumerate(lines) if line.startswith("[")]
    assert len(fetched) == len(finished) == len(shards(hub))
    assert fetched[2] < finished[0]


REFUSALS: dict[str, tuple[Callable[[Hub], object], tuple[str, ...], str, str]] = {
    "missing": (lambda h: h.repositories.clear(), (), "neither a local folder nor a model on the Hub", "hf auth login"),
    "private": (
        lambda h: setattr(h.repositories["tiny/llama"], "private", True), (),
        "neither a local folder nor a model on the Hub", "HF_TOKEN",
    ),
    "gated": (
        lambda h: setattr(h.repositories["tiny/llama"], "gated", True), (),
        "tiny/llama is gated", "accept its terms",
    ),
    "wrong revision": (lambda _: None, ("--revision", "nope"), "tiny/llama has no revision 'nope'", "name a branch"),
    "rate limited": (lambda h: setattr(h, "fault", lambda *_: 429), (), "too many requests", "wait a few minutes"),
    "forbidden": (
        lambda h: setattr(h, "fault", lambda _, path: 403 if ".safetensors" in path else None), (),
        "gives no access to tiny/llama (status 403)", "hf auth login",
    ),
    "no weights": (
        lambda h: h.repositories["tiny/llama"].commit({"config.json": b"{}", "pytorch_model.gguf": b""}), (),
        "no weights: neither model.safetensors nor", "converted to safetensors",
    ),
    "a residual": (
        lambda h: h.repositories["tiny/llama"].commit(
            {**h.repositories["tiny/llama"].files, "milora_init.json": b'{"source": {"model": "tiny/original"}}'}
        ), (),
        "tiny/llama holds milora_init.json: it is a residual base", "--model tiny/original",
    ),
    "an adapter beside the weights": (
        lambda h: h.repositories["tiny/llama"].commit(
            {**h.repositories["tiny/llama"].files, "adapter_config.json": b"{}"}
        ), (),
        "transformers would load this adapter", "merge it first",
    ),
    "no index": (
        lambda h: h.repositories["tiny/llama"].commit(
            {n: c for n, c in h.repositories["tiny/llama"].files.items() if "index" not in n}
        ), (),
        "tiny/llama: shards such as model-00001-of-00010.safetensors, but no model.safetensors.index.json", "fetch",
    ),
    "a shard is missing": (
        lambda h: h.repositories["tiny/llama"].commit(
            {n: c for n, c in h.repositories["tiny/llama"].files.items() if "00002-of" not in n}
        ), (),
        "a file of tiny/llama is missing on the Hub", "another revision",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_refuses_is_one_clear_error(name: str, hub: Hub, milora: Command, tmp_path: Path) -> None:
    prepare, more, message, hint = REFUSALS[name]
    prepare(hub)
    done = milora(*INIT, *more, "--json", HF_TOKEN="hf_wrongwrongwrong")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = json.loads(done.stdout)
    assert message in said["error"]
    assert hint in said["hint"]
    assert "hf_wrong" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def put_up_a_large_model(hub: Hub, folder: Path) -> None:
    """One shard of 64 MB, of which planning needs the header."""
    files = hub.repositories["tiny/llama"].files
    tensors = {**load(folder), "unused.weight": torch.zeros(1 << 24)}
    small = {name: data for name, data in files.items() if "safetensors" not in name}
    hub.repositories["tiny/llama"].commit({**small, "model.safetensors": save(tensors, metadata={"format": "pt"})})


@pytest.mark.parametrize("ranges", ["elsewhere", "unnamed"])
def test_a_server_that_does_not_send_the_range_is_refused_and_not_read(
    ranges: str, hub: Hub, milora: Command, checkpoint: Built
) -> None:
    put_up_a_large_model(hub, checkpoint("llama"))
    hub.ranges = ranges
    done = milora(*INIT, "--dry-run")
    assert done.returncode == 1
    assert "of model.safetensors of tiny/llama, the Hub answered with status" in done.stderr
    assert "hf download" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.sent < 16 << 20  # what the sockets between the two hold, and no more


@pytest.mark.parametrize("ranges", [wide("whole"), "ignored"])
def test_a_server_that_sends_more_than_the_range_is_read_to_its_end(
    ranges: str, hub: Hub, milora: Command, checkpoint: Built
) -> None:
    put_up_a_large_model(hub, checkpoint("llama"))
    hub.ranges = ranges
    done = milora(*INIT, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert hub.sent < 16 << 20


def test_a_connection_cut_in_the_middle_of_a_header_is_taken_up(hub: Hub, milora: Command) -> None:
    cut: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if method == "GET" and path.endswith("00003-of-00010.safetensors") and len(cut) < 2:
            cut.append(path)
            return "cut"
        return None

    hub.fault = fault
    done = milora(*INIT, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert len(cut) == 2


ENTRIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no oid": lambda entry: entry.pop("oid"),
    "no path": lambda entry: entry.pop("path"),
    "an oid of null": lambda entry: entry["lfs"].update(oid=None),
    "an oid that is none": lambda entry: entry["lfs"].update(oid="../../x"),
    "a size of null": lambda entry: entry.update(size=None),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_a_listing_that_lacks_something_is_one_clear_error(what: str, hub: Hub, milora: Command) -> None:
    hub.entry = ENTRIES[what]
    done = milora(*INIT)
    assert done.returncode == 1
    assert "the Hub's" in done.stderr
    assert "tiny/llama" in done.stderr
    assert "report" not in done.stderr


def test_without_a_network_it_is_said(milora: Command) -> None:
    done = milora(*INIT, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the Hub cannot be reached" in done.stderr


def test_a_token_opens_a_private_model_and_is_written_nowhere(hub: Hub, milora: Command, tmp_path: Path) -> None:
    hub.repositories["tiny/llama"].private = True
    done = milora(*INIT, "--json", "--verbose", HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    assert hub.token in hub.tokens
    assert hub.token not in done.stdout + done.stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and hub.token.encode() in p.read_bytes()]


def test_low_disk_keeps_a_few_shards_at_a_time(hub: Hub, milora: Command, tmp_path: Path) -> None:
    """Measured from outside while the run goes on: what of the source lies on the disk at any moment."""
    most, over = [0], threading.Event()
    folder = tmp_path / "out" / ".milora-init" / "attempts.source"

    def watch() -> None:
        while not over.wait(0.0005):
            try:
                most[0] = max(most[0], sum(p.stat().st_size for p in folder.rglob("*.safetensors*")))
            except OSError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = milora(*INIT, "--low-disk")
    over.set()
    watcher.join()
    assert done.returncode == 0, done.stderr
    sizes = sorted(shards(hub).values())
    assert 0 < most[0] <= sum(sizes[-4:])
    assert most[0] < sum(sizes) / 2
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "out" / ".milora-init").exists()
    assert milora("verify", "out", "--against", "tiny/llama").returncode == 0


def test_a_run_that_was_cut_off_fetches_only_what_is_missing(hub: Hub, milora: Command, tmp_path: Path) -> None:
    hub.fault = lambda _, path: 403 if "00006-of" in path and len(hub.served) > 12 else None
    first = milora(*INIT, "--low-disk")
    assert first.returncode == 1
    assert (tmp_path / "out" / ".milora-init" / "journal.jsonl").exists()
    hub.fault = lambda *_: None
    before = dict(hub.served)
    again = milora(*INIT, "--low-disk")
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    name = "tiny/llama/model-00001-of-00010.safetensors"
    assert hub.served[name] - before[name] <= shards(hub)["model-00001-of-00010.safetensors"]  # its header at most
    assert milora("verify", "out", "--against", "tiny/llama").returncode == 0


def test_a_token_with_its_line_end_is_a_token_and_what_cannot_be_one_is_not_repeated(hub: Hub, milora: Command) -> None:
    hub.repositories["tiny/llama"].private = True
    done = milora(*INIT, "--dry-run", "--json", HF_TOKEN=f"{hub.token}\n")
    assert done.returncode == 0, done.stderr
    for odd in ("hf_secret\nhf_secret", "hf_sécret"):
        done = milora(*INIT, "--dry-run", "--token", odd)
        assert done.returncode == 2
        assert "hf_s" not in done.stdout + done.stderr


def test_a_model_that_is_pickled_on_the_hub_is_refused_before_anything_is_fetched(
    hub: Hub, milora: Command, pickled: Callable[[int], Path], tmp_path: Path
) -> None:
    hub.publish("tiny/pickle", pickled(3))
    done = milora("--model", "tiny/pickle", *INIT[2:], "--dry-run")
    assert done.returncode == 1
    assert "tiny/pickle has only pickled weights" in done.stderr
    assert "hf download tiny/pickle" in done.stderr
    assert not list((tmp_path / "home").rglob("*.bin"))


def test_a_shard_that_arrives_with_another_byte_is_not_used(hub: Hub, milora: Command) -> None:
    repository = hub.repositories["tiny/llama"]
    name = "model-00003-of-00010.safetensors"
    whole = repository.files[name]
    hub.damaged = {f"tiny/llama/{name}": whole[:-1] + bytes([whole[-1] ^ 1])}
    done = milora(*INIT)
    assert done.returncode == 1
    assert f"{name} of tiny/llama was damaged during the download" in done.stderr
    hub.damaged = {}
    done = milora(*INIT)
    assert done.returncode == 0, done.stderr
    # Judged by the commit that it was made of, wherever main has gone since.
    repository.commit({**repository.files, name: whole[:-1] + bytes([whole[-1] ^ 1])})
    assert milora("verify", "out", "--against", "tiny/llama").returncode == 0
    assert milora("verify", "out", "--against", "tiny/llama", "--revision", "main").returncode == 1


def test_a_folder_has_no_revision(milora: Command, checkpoint: Built) -> None:
    done = milora("--model", str(checkpoint("llama")), *INIT[2:], "--revision", "v2")
    assert done.returncode == 2
    assert "which has no --revision v2" in done.stderr


@pytest.mark.parametrize("name", ["../../../../evil.txt", "../evil.txt", "a/../../evil.txt"])
def test_a_hub_that_lists_a_file_outside_the_model_writes_nothing_there(
    name: str, hub: Hub, milora: Command, tmp_path: Path
) -> None:
    hub.repositories["tiny/llama"].commit({**hub.repositories["tiny/llama"].files, name: b"evil"})
    done = milora(*INIT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("evil.txt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors"])
def test_an_index_on_the_hub_that_names_a_file_outside_is_refused(name: str, hub: Hub, milora: Command) -> None:
    files = dict(hub.repositories["tiny/llama"].files)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"] |= dict.fromkeys(list(index["weight_map"])[:1], name)
    hub.repositories["tiny/llama"].commit({**files, "model.safetensors.index.json": json.dumps(index).encode()})
    done = milora(*INIT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "outside the folder" in done.stderr or "is missing on the Hub" in done.stderr


RLMO = (*INIT, "--method", "rlmo", "--target", "q_proj,down_proj")


def targeted_bytes(hub: Hub, targets: tuple[str, ...] = ("q_proj", "down_proj")) -> Counter[str]:
    """By file: the bytes of the header and of the tensors that are adapted."""
    found: Counter[str] = Counter()
    for name, data in hub.repositories["tiny/llama"].files.items():
        if name.endswith(".safetensors"):
            length = int.from_bytes(data[:8], "little")
            for tensor, info in json.loads(data[8 : 8 + length]).items():
                if any(f".{target}." in tensor for target in targets):
                    found[name] += info["data_offsets"][1] - info["data_offsets"][0]
    return found


def test_without_a_base_only_the_tensors_that_are_adapted_are_downloaded(
    hub: Hub, milora: Command, checkpoint: Built, start: Callable[..., Any], tmp_path: Path
) -> None:
    planned = json.loads(milora(*RLMO, "--dry-run", "--json").stdout)
    needed = targeted_bytes(hub)
    assert {shard["source"] for shard in planned["shards"]} == needed.keys()
    assert len(needed) < len(shards(hub))
    headers = Counter(dict(hub.served))  # the dry run has read them, each at the start of its file
    assert 0 <= planned["download_bytes"] - needed.total() < 2000 * len(needed)  # each part has a header
    assert planned["base_bytes"] == 0
    hub.served.clear()
    done = milora(*RLMO, "--json")
    assert done.returncode == 0, done.stderr
    for name in shards(hub):
        path = f"tiny/llama/{name}"
        assert hub.served[path] == headers[path] + needed[name], name
    assert not list((tmp_path / "home").rglob("*.safetensors"))  # nothing is kept, in the cache or beside the output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "milora_init.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    commit = hub.repositories["tiny/llama"].commits[0][0]
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/llama", commit)
    assert f'from_pretrained("tiny/llama", dtype="auto", revision="{commit}")' in json.loads(done.stdout)["load"]
    start(checkpoint("llama"), out=str(tmp_path / "local"), method="rlmo", target=("q_proj", "down_proj"))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "local" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_a_part_is_a_fraction_of_a_large_file(hub: Hub, milora: Command, checkpoint: Built) -> None:
    put_up_a_large_model(hub, checkpoint("llama"))
    done = milora(*RLMO)
    assert done.returncode == 0, done.stderr
    assert hub.served["tiny/llama/model.safetensors"] < 1 << 20


def test_a_connection_cut_in_the_middle_of_a_tensor_is_taken_up_there(hub: Hub, milora: Command) -> None:
    assert milora(*RLMO, "--dry-run").returncode == 0
    cut: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if method == "GET" and path.endswith(".safetensors") and len(cut) < 2:
            cut.append(path)
            return "cut"
        return None

    hub.fault = fault
    done = milora(*RLMO)
    assert done.returncode == 0, done.stderr
    assert len(cut) == 2
    assert milora("verify", "out", "--model", "tiny/llama", "--all").returncode == 0


def test_a_server_that_ignores_ranges_sends_the_whole_files_with_one_note(
    hub: Hub, milora: Command, tmp_path: Path
) -> None:
    hub.ranges = "ignored"
    done = milora(*RLMO)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: ") == 1
    assert "the Hub sends the whole file: the files are downloaded as a whole" in done.stderr
    assert {path.name for path in (tmp_path / "home").rglob("*.safetensors")} == targeted_bytes(hub).keys()
    assert milora("verify", "out", "--model", "tiny/llama", "--all").returncode == 0


@pytest.mark.parametrize("ranges", ["whole", "elsewhere", "unnamed"])
def test_an_answer_with_another_range_of_a_tensor_is_refused(
    ranges: str, hub: Hub, milora: Command, tmp_path: Path
) -> None:
    hub.fault = lambda *_: setattr(hub, "ranges", ranges if len(hub.served) >= len(shards(hub)) else "right")
    done = milora(*RLMO)
    assert done.returncode == 1
    assert "the Hub answered with status" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_part_that_does_not_fit_the_disk_is_refused_before_it_is_fetched(hub: Hub, milora: Command) -> None:
    """A listing and a header that claim a tensor of some petabytes."""
    name = "model-00003-of-00010.safetensors"
    data = hub.repositories["tiny/llama"].files[name]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    last = max(header, key=lambda tensor: header[tensor]["data_offsets"][1])
    header[last]["shape"] = [1 << 26, 1 << 26]
    header[last]["data_offsets"][1] = header[last]["data_offsets"][0] + (1 << 54)
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    files = {**hub.repositories["tiny/llama"].files, name: len(text).to_bytes(8, "little") + text}
    hub.repositories["tiny/llama"].commit(files)
    size = 8 + len(text) + header[last]["data_offsets"][1]
    hub.entry = lambda entry: entry.update(size=size) if entry["path"] == name else None
    done = milora(*RLMO)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert hub.served[f"tiny/llama/{name}"] <= len(text) + 8
