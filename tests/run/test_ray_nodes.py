"""`--ray` without Ray: what is asked of it, what a node checks, and a node that does not see the output folder."""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import fake_ray, quantised
from support.fake_ray import FakeRay
from support.hub_server import Hub, client
from support.tiny_models import contents

from milora_init.checkpoint.files import stamp
from milora_init.checkpoint.folder import RemoteFiles
from milora_init.errors import CheckpointError, OutputError, PlanError, UsageError
from milora_init.manifest import MANIFEST, Manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import Plan, make_plan
from milora_init.run import ray_makers, ray_node
from milora_init.run.progress import Progress, ShardResult
from milora_init.run.ray_makers import RayMakers
from milora_init.run.ray_node import Request, Versions, check

Built = Callable[..., Path]
Start = Callable[..., Manifest]
GB = 10**9


def request(folder: Path) -> Request:
    """The request of a run whose probe file is in a folder."""
    (folder / "probe").write_text("token")
    return Request(folder, "token", Versions.here(), on_gpu=False, shared=True, options=InitOptions(model="m", out="o"))


def test_a_node_that_sees_everything_is_accepted(tmp_path: Path) -> None:
    node = check(request(tmp_path), {tmp_path / "probe": stamp(tmp_path / "probe")})
    assert node.output_bytes is not None
    assert node.output_bytes > 0 < node.own_bytes


@pytest.mark.parametrize("field", ["milora_init", "torch"])
def test_a_node_with_another_version_is_refused(field: str, tmp_path: Path) -> None:
    other = dataclasses.replace(Versions.here(), **{field: "0.0.1"})
    with pytest.raises(PlanError, match=rf"node .* has milora_init .* this machine .*{'0.0.1'}") as caught:
        check(dataclasses.replace(request(tmp_path), versions=other), {})
    assert "install the same versions" in caught.value.hint


def test_a_node_that_does_not_see_the_output_or_sees_another_one_is_refused(tmp_path: Path) -> None:
    asked = request(tmp_path)
    (tmp_path / "probe").write_text("of another machine")
    with pytest.raises(OutputError, match="sees another folder as"):
        check(asked, {})
    (tmp_path / "probe").unlink()
    with pytest.raises(OutputError, match="does not see") as caught:
        check(asked, {})
    assert "mount the same file system" in caught.value.hint
    assert check(dataclasses.replace(asked, shared=False), {}).output_bytes is None


def test_a_node_that_does_not_see_the_model_or_sees_another_version_is_refused(tmp_path: Path) -> None:
    asked, source = request(tmp_path), tmp_path / "model.safetensors"
    source.write_bytes(b"new")
    size_bytes, modified = stamp(source)
    with pytest.raises(CheckpointError, match="sees another version of"):
        check(asked, {source: (size_bytes, modified - 1)})
    source.unlink()
    with pytest.raises(CheckpointError, match=r"does not see .*model\.safetensors"):
        check(asked, {source: (size_bytes, modified)})


def test_ray_is_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ray and part exclude each other"):
        InitOptions(model="m", out="o", ray="auto", part="1/2")
    with pytest.raises(UsageError, match="low_disk and ray exclude each other"):
        InitOptions(model="m", out="o", ray="auto", low_disk=True)
    with pytest.raises(UsageError, match="--ray is empty"):
        InitOptions(model="m", out="o", ray="")


def test_flow_keeps_a_bounded_number_of_tasks_in_flight() -> None:
    """With a stand-in for Ray whose tasks end in the reverse order."""

    class FakeRay:
        most, running = 0, 0

        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 3.0}

        def wait(self, references: list[int], **_: Any) -> tuple[list[int], list[int]]:
            self.most = max(self.most, len(references))
            return references[-1:], references[:-1]

        def get(self, reference: int) -> int:
            return -reference

    fake = FakeRay()
    found = list(ray_makers.flow(fake, range(20), lambda job: job))
    assert sorted(found) == [(job, -job) for job in range(20)]
    assert fake.most == ray_makers.IN_FLIGHT * 3


def plan_of(source: Path, out: Path, *, on_hub: bool = False, **changes: Any) -> Plan:
    """A plan for a cluster. A model on the Hub is one whose files are in this machine's cache."""
    options = InitOptions(model="tiny/model" if on_hub else str(source), out=str(out), rank=4, ray="auto", **changes)
    hashes = {path.name: "0" * 64 for path in source.glob("*.safetensors")}
    return make_plan(options, source, RemoteFiles("tiny/model", "0" * 40, hashes, {}) if on_hub else None)


def makers(plan: Plan, folder: Path) -> RayMakers:
    return RayMakers("auto", plan, plan.jobs, folder / "attempts", Progress())


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_file_with_weights_asks_for_one_gpu_or_for_as_many_cores_as_it_has_weights(
    device: str, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPUs are pretended: the tasks are not run."""
    cluster = FakeRay({"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0, "memory": 64.0 * GB}, {"CPU": 0.0})
    monkeypatch.setattr(ray_makers, "connect", lambda _: cluster)
    requests: dict[str, Request] = {}

    def make_file(job: Any, request: Request, *_: Any) -> Any:
        requests[job.target] = request
        return ShardResult(job.target, {}, (), {}, ""), None

    monkeypatch.setattr(ray_makers, "make_file", make_file)
    plan = plan_of(checkpoint("llama"), tmp_path / "out", device=(device,))
    with makers(plan, tmp_path) as on_nodes:
        made = [job.target for job, _ in on_nodes.run(plan.jobs)]
    assert sorted(made) == sorted(job.target for job in plan.jobs)
    probes = [asked for asked in cluster.asked if asked["function"] is check]
    assert [asked["num_cpus"] for asked in probes] == [0, 0]  # not of the third node, which can run no task
    tasks = {asked["name"]: asked for asked in cluster.asked if asked["function"] is make_file}
    weights = {job.target: len(job.splits) for job in plan.jobs}
    assert {0, 1, 2} <= set(weights.values())
    for name, asked in tasks.items():
        on_gpu = device == "auto" and weights[name] > 0
        assert (asked["num_gpus"], asked["num_cpus"]) == ((1, 1) if on_gpu else (0, max(1, min(weights[name], 3))))
        assert requests[name].on_gpu == on_gpu
        assert asked["max_retries"] == ray_makers.RETRIES
        assert 0 < asked["memory"] <= 64 * GB


def test_a_gpu_that_the_cluster_has_not_is_a_usage_error(
    checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_makers, "connect", lambda _: FakeRay({"CPU": 8.0}))
    on_nodes = makers(plan_of(checkpoint("llama"), tmp_path / "out", device=("cuda",)), tmp_path)
    with pytest.raises(UsageError, match="has no GPU"), on_nodes:
        pass


@pytest.mark.parametrize(("on_hub", "sees_output"), [(False, True), (True, True), (True, False)])
def test_a_node_whose_disk_is_too_small_is_named_before_anything_is_made(
    on_hub: bool, sees_output: bool, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output's disk needs all files; a node's own disk what it has at a time, here two files."""
    push = {"push_to_hub": "me/model"} if on_hub else {}
    plan = plan_of(checkpoint("llama"), tmp_path / "out", on_hub=on_hub, device=("cpu",), **push)
    made = [job.base_bytes + plan.factor_bytes(job) for job in plan.jobs]
    fetched = [plan.checkpoint.headers[job.source.name].file_bytes for job in plan.jobs]
    two = sum(sorted(map(sum, zip(made, fetched, strict=True)) if not sees_output else fetched)[-2:])
    most_threads = max(len(job.splits) for job in plan.jobs)
    monkeypatch.setattr(ray_makers, "connect", lambda _: FakeRay({"CPU": 2.0 * most_threads}))
    if not sees_output:
        monkeypatch.setattr(ray_node, "PROBE", "another")
    needs = {tmp_path / "attempts": sum(made) if sees_output else 0, Path(tempfile.gettempdir()): two if on_hub else 0}

    def start(free: dict[Path, int]) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[Path(folder)]))
        with makers(plan, tmp_path):
            pass

    start(needs)
    for disk, words in zip(needs, ("--out .* needs .* free on node", "node .* needs .* temporary folder"), strict=True):
        if needs[disk]:
            with pytest.raises(OutputError, match=words):
                start({**needs, disk: needs[disk] - 1})


def test_a_nodes_own_folder_is_removed_also_after_a_process_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used, foreign = (tmp_path / f"milora-init-{name}" for name in ("left", "used", "foreign"))
    for folder in (left, used, foreign):
        folder.mkdir()
    (left / "lock").touch()
    (left / "model.safetensors").touch()
    with (used / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ray_node.own_folder() as own:
            (own / "model.safetensors").touch()
            with ray_node.own_folder() as another:
                assert own != another
            assert sorted(path for path in tmp_path.iterdir() if path != own) == sorted([used, foreign])
            assert (own / "model.safetensors").exists()
    assert sorted(tmp_path.iterdir()) == sorted([used, foreign])


class TestOnTheHub:
    """A model whose scales are in another file than its codes; nodes whose `out` is another folder."""

    OUT = "/proc/self/cwd/out"

    @pytest.fixture
    def source(self, hub: Hub, tmp_path: Path) -> Path:
        source = quantised.save_fp8(tmp_path / "fp8", files=quantised.codes_apart)
        hub.publish("tiny/fp8", source)
        return source

    def test_nodes_upload_what_they_make_and_the_bytes_are_those_of_one_machine(
        self, hub: Hub, source: Path, start: Start, tmp_path: Path
    ) -> None:
        milora = client(hub, tmp_path, fake_ray.command_line)
        words = ("-m", "tiny/fp8", "-o", self.OUT, "-r", "4", "--device", "cpu", "--ray", "auto", "--json")
        refused = milora(*words)
        assert refused.returncode == 1
        assert "does not see /proc/self/cwd/out" in refused.stderr
        assert "--push-to-hub needs no such folder" in refused.stderr
        assert not (tmp_path / "out").exists()
        done = milora(*words, "--push-to-hub", "me/out")
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["me/out"]
        assert len(repository.commits) == 2  # the empty repository, and the output
        assert not (tmp_path / "out").exists()
        start(source)
        own = {MANIFEST, "lora/adapter_config.json"}  # they name the source and the folder
        expected = {name: content for name, content in contents(tmp_path / "out").items() if name not in own}
        assert {name: repository.files[name] for name in expected} == expected
        shutil.rmtree(tmp_path / "out")
        again = milora(*words, "--push-to-hub", "me/out")
        assert '"status": "unchanged"' in again.stdout
        assert len(repository.commits) == 2

    def test_factors_without_a_base_come_back(self, hub: Hub, source: Path, start: Start, tmp_path: Path) -> None:
        milora = client(hub, tmp_path, fake_ray.command_line)
        words = ("-m", "tiny/fp8", "-r", "4", "--device", "cpu", "--method", "rlmo", "--target", "q_proj")
        done = milora(*words, "-o", self.OUT, "--ray", "auto")
        assert done.returncode == 0, done.stderr
        start(source, out=str(tmp_path / "one"), method="rlmo", target=("q_proj",))
        name = "adapter_model.safetensors"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
