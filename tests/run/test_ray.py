"""`--ray` with a real Ray: the nodes of a cluster make the bytes of one machine, whatever is lost meanwhile."""

from __future__ import annotations

import json
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
from support.hub_server import Hub, environment
from support.interruptions import shards
from support.tiny_models import contents

from milora_init import api
from milora_init.errors import MiloraError, PlanError, SolveError, UsageError
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest
from milora_init.options import InitOptions
from milora_init.run import ray_makers, ray_node
from milora_init.run.progress import Progress

Built = Callable[..., Path]
Start = Callable[..., Manifest]
TIMEOUT_S = 90
ROOT = Path(__file__).parents[2]


class TestCluster:
    """With a real Ray: two nodes, which are processes of this machine."""

    pytestmark = pytest.mark.ray

    @pytest.fixture(scope="class")
    @classmethod
    def hub(cls) -> Iterator[Hub]:
        with Hub() as server:
            yield server

    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(hub, tmp_path_factory.mktemp("nodes")).items():
                patch.setenv(name, value)
            patch.delenv("HF_TOKEN")  # that of the command is sent
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
        real = ray_node.make_file

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

        def kill() -> None:
            os.kill(int(wait_for(flags / worker_victim)["pid"]), signal.SIGKILL)
            node_id = wait_for(flags / node_victim)["node"]
            killed.append(next(node for node in cluster.worker_nodes if node.node_id == node_id))
            cluster.remove_node(killed[0], allow_graceful=False)

        class AddNode(Progress):
            added = False

            def shard(self, *_: Any) -> None:
                if not self.added:
                    self.added = True
                    cluster.add_node(num_cpus=1)  # a node that joins during the run is used

        killed: list[Any] = []
        monkeypatch.setattr(ray_makers, "make_file", hang_once(flags, worker_victim, node_victim))
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
        words = [
            "-m",
            os.path.relpath(source, tmp_path),
            "-o",
            "out",
            "-r",
            "4",
            "--device",
            "cpu",
            "--ray",
            cluster.address,
        ]
        with Fork(fork_server.command_line, *words, cwd=tmp_path) as driver:
            wait_for_entry(journal, "", driver)
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
        victim, real = shards(source)[4], ray_node.make_file

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

    def test_nodes_that_do_not_see_the_output_upload_it_whatever_is_lost_meanwhile(
        self, cluster: Any, hub: Hub, checkpoint: Built, start: Start, tmp_path: Path
    ) -> None:
        """A worker is killed, then the command; an upload is lost before it is started again."""
        source, out, flags = checkpoint("llama"), tmp_path / "out", tmp_path / "flags"
        journal = out / WORK_FOLDER / "journal.jsonl"
        flags.mkdir()
        hub.publish("tiny/llama", source)
        words = ["-m", "tiny/llama", "-o", "/proc/self/cwd/out", "-r", "4", "--device", "cpu", "--ray", cluster.address]
        words += ["--push-to-hub", "me/out"]
        home = {**environment(hub, tmp_path / "home"), "HF_TOKEN": hub.token}
        victim = shards(source)[0]
        with Fork(hang_once_and_run, str(flags), victim, *words, cwd=tmp_path, environment=home) as driver:
            lost = wait_for(flags / victim)
            os.kill(lost["pid"], signal.SIGKILL)
            wait_for_entry(journal, victim, driver)
            driver.kill()
            driver.wait(TIMEOUT_S)
        assert not Path(lost["in"]).exists()  # what the killed worker has left
        entries = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
        assert not list(out.glob("*.safetensors"))  # the shards are on the Hub alone
        sent, gone = dict(hub.uploads), hub.stored.pop(entries[0]["pushed"])
        done = fork_server.milora(*words, cwd=tmp_path, environment=home, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        again = {digest: hub.uploads[digest] - sent[digest] for digest in (entry["pushed"] for entry in entries)}
        assert again == {entry["pushed"]: len(gone) if entry is entries[0] else 0 for entry in entries}
        assert len(hub.repositories["me/out"].commits) == 2  # the empty repository, and the output
        assert not out.exists()
        start(source)
        own = {MANIFEST, "lora/adapter_config.json"}  # they name the source and the folder
        expected = {name: content for name, content in contents(out).items() if name not in own}
        assert {name: hub.repositories["me/out"].files[name] for name in expected} == expected

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


def hang_once(flags: Path, *victims: str) -> Callable[..., Any]:
    """A `make_file` whose first attempt at each of these files writes to a file who it is, and hangs."""

    def make_file(job: Any, *rest: Any) -> Any:
        import ray

        flag, node = flags / job.target, ray.get_runtime_context().get_node_id()

        def hang(attempt: Path, *_: Any, **__: Any) -> None:
            flag.with_suffix(".new").write_text(
                json.dumps({"pid": os.getpid(), "node": node, "in": str(attempt.parent)})
            )
            flag.with_suffix(".new").rename(flag)
            time.sleep(TIMEOUT_S)

        if job.target in victims and not flag.exists():
            ray_node.make_in = hang  # type: ignore[assignment]
        return ray_node.make_file(job, *rest)

    return make_file


def hang_once_and_run(flags: str, victim: str, *words: str) -> None:
    pytest.MonkeyPatch().setattr(ray_makers, "make_file", hang_once(Path(flags), victim))
    fork_server.command_line(*words)


def wait_for(path: Path) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)
    return json.loads(path.read_text())


def wait_for_entry(journal: Path, shard: str, driver: Fork) -> None:
    """Wait until the journal has an entry of this shard."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (journal.exists() and any(shard in line for line in journal.read_text().split("\n")[1:-1])):
        assert time.monotonic() < deadline, driver.stderr
        assert driver.returncode is None, driver.stderr
        time.sleep(0.01)
