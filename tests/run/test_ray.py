"""`--ray`: the nodes of a cluster make the bytes of one machine, whatever is lost meanwhile."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fork_server
from support.fork_server import Fork
from support.interruptions import shards
from support.tiny_models import contents

from milora_init import api
from milora_init.checkpoint.files import stamp
from milora_init.errors import CheckpointError, MiloraError, OutputError, PlanError, SolveError, UsageError
from milora_init.manifest import MANIFEST, WORK_FOLDER
from milora_init.options import InitOptions
from milora_init.run import ray_makers
from milora_init.run.progress import Progress
from milora_init.run.ray_makers import Request, Versions, check

Built = Callable[..., Path]
TIMEOUT_S = 90
ROOT = Path(__file__).parents[2]


def request(folder: Path) -> Request:
    """The request of a run whose probe file is in a folder."""
    (folder / "probe").write_text("token")
    return Request(folder, "token", Versions.here(), False, InitOptions(model="m", out="o"), None)


def test_a_node_that_sees_everything_is_accepted(tmp_path: Path) -> None:
    node = check(request(tmp_path), {tmp_path / "probe": stamp(tmp_path / "probe"), tmp_path / "on the Hub": None})
    assert node.free_bytes > 0


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


class TestCluster:
    """With a real Ray: two nodes, which are processes of this machine."""

    pytestmark = pytest.mark.ray

    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls) -> Iterator[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
            patch.setenv("RAY_health_check_period_ms", "500")
            patch.setenv("RAY_health_check_failure_threshold", "2")
            from ray.cluster_utils import Cluster

            made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
            for _ in range(2):
                made.add_node(num_cpus=1)
            yield made
            made.shutdown()

    @pytest.fixture
    def whole(self, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        """Compares `out` with the output of one machine, and looks for what is left."""

        def compare() -> None:
            found = contents(tmp_path / "out")
            (tmp_path / "one").mkdir()
            monkeypatch.chdir(tmp_path / "one")
            options = InitOptions(model=str(checkpoint("llama")), out="out", rank=4, device=("cpu",))
            api.run(options, progress=False)
            expected = contents(tmp_path / "one" / "out")
            assert found.keys() == expected.keys()  # no work folder either
            different = (MANIFEST, "lora/adapter_config.json")  # times, and the path of the folder
            for name in expected.keys() - set(different):
                assert found[name] == expected[name], name

        return compare

    def start(self, cluster: Any, source: Path, out: Path, progress: Any = False) -> Any:
        options = InitOptions(model=str(source), out=str(out), rank=4, device=("cpu",), ray=cluster.address)
        return api.run(options, progress=progress)

    def test_two_nodes_make_the_bytes_of_one_and_a_file_that_is_made_twice_is_used_once(
        self, cluster: Any, checkpoint: Built, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A zombie: the first attempt of each file ends too, and nobody waits for it."""
        real = ray_makers.make_file

        def twice(*arguments: Any) -> Any:
            real(*arguments)
            return real(*arguments)

        monkeypatch.setattr(ray_makers, "make_file", twice)
        seen: list[str] = []

        class Tensors(Progress):
            def tensor(self, name: str, size_bytes: int) -> None:
                seen.append(name)

        result = self.start(cluster, checkpoint("llama"), tmp_path / "out", Tensors())
        assert result.status == "done"
        assert len(set(seen)) == len(seen) > 20
        assert {record.device for record in result.manifest.weights} == {"cpu"}
        whole()

    def test_a_killed_worker_and_a_killed_node_are_replaced_while_others_work(
        self, cluster: Any, checkpoint: Built, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two files hang in their first attempt. The worker of one is killed, then the node of the other."""
        source, flags = checkpoint("llama"), tmp_path / "flags"
        flags.mkdir()
        worker_victim, node_victim = shards(source)[2], shards(source)[5]
        real = ray_makers.make_file

        def hanging(job: Any, *rest: Any) -> Any:
            import ray

            flag = flags / job.target
            if job.target in (worker_victim, node_victim) and not flag.exists():
                flag.with_suffix(".new").write_text(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}")
                flag.with_suffix(".new").rename(flag)
                time.sleep(TIMEOUT_S)
            return real(job, *rest)

        def kill() -> None:
            pid, _ = wait_for_text(flags / worker_victim).split()
            os.kill(int(pid), signal.SIGKILL)
            _worker, node_id = wait_for_text(flags / node_victim).split()
            killed.append(next(node for node in cluster.worker_nodes if node.node_id == node_id))
            cluster.remove_node(killed[0], allow_graceful=False)

        class AddNode(Progress):
            added = False

            def shard(self, *_: Any) -> None:
                if not self.added:
                    self.added = True
                    cluster.add_node(num_cpus=1)  # a node that joins during the run is used

        killed: list[Any] = []
        monkeypatch.setattr(ray_makers, "make_file", hanging)
        killer = threading.Thread(target=kill)
        killer.start()
        self.start(cluster, source, tmp_path / "out", AddNode())
        killer.join()
        assert killed
        whole()

    def test_a_driver_that_is_killed_is_resumed_and_prints_nothing_of_rays_own(
        self, cluster: Any, checkpoint: Built, whole: Any, tmp_path: Path
    ) -> None:
        source, journal = checkpoint("llama"), tmp_path / "out" / WORK_FOLDER / "journal.jsonl"
        words = ["-m", str(source), "-o", str(tmp_path / "out"), "-r", "4", "--device", "cpu", "--ray", cluster.address]
        with Fork(fork_server.command_line, *words, cwd=tmp_path) as driver:
            deadline = time.monotonic() + TIMEOUT_S
            while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
                assert time.monotonic() < deadline, driver.stderr
                assert driver.returncode is None, driver.stderr
                time.sleep(0.01)
            driver.kill()
            driver.wait(TIMEOUT_S)
        done = fork_server.milora(*words, cwd=tmp_path, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        for line in done.stderr.splitlines():
            assert line.startswith(("reading headers", "resuming:", "[")), line
            assert "logging.cc" not in line
        whole()

    def test_an_error_of_a_task_ends_the_run_and_is_not_tried_again(
        self, cluster: Any, checkpoint: Built, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, calls = checkpoint("llama"), tmp_path / "calls"
        calls.mkdir()
        victim, real = shards(source)[4], ray_makers.make_file

        def failing(job: Any, *rest: Any) -> Any:
            if job.target == victim:
                (calls / os.urandom(8).hex()).touch()
                raise SolveError("the fifth file", hint="repair it")
            return real(job, *rest)

        monkeypatch.setattr(ray_makers, "make_file", failing)
        with pytest.raises(SolveError, match="the fifth file") as caught:
            self.start(cluster, source, tmp_path / "out")
        assert caught.value.hint == "repair it"
        assert len(list(calls.iterdir())) == 1
        monkeypatch.setattr(ray_makers, "make_file", real)
        self.start(cluster, source, tmp_path / "out")
        whole()

    def test_a_node_that_is_refused_ends_the_run_before_anything_is_made(
        self, cluster: Any, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch, "__version__", "0.0.1")  # of this machine: so the nodes have another one
        with pytest.raises(PlanError, match=r"node .* with torch") as caught:
            self.start(cluster, checkpoint("llama"), tmp_path / "out")
        assert isinstance(caught.value, MiloraError)
        assert not (tmp_path / "out").exists()

    def test_no_cluster_is_one_clear_error(
        self, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_makers, "_ANSWER_S", 5)
        options = InitOptions(model=str(checkpoint("llama")), out=str(tmp_path / "out"), rank=4, ray="127.0.0.1:1")
        with pytest.raises(UsageError, match=r"no Ray cluster answers at 127\.0\.0\.1:1") as caught:
            api.run(options, progress=False)
        assert "ray start --head" in caught.value.hint
        assert "RAY_AUTH_MODE=token" in caught.value.hint
        assert not (tmp_path / "out").exists()


def wait_for_text(path: Path) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)
    return path.read_text()
