"""`--part I/N`: any number of processes make one output together, and whatever happens to one harms no other."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import fork_server
from support.fork_server import Fork
from support.interruptions import ShardLog, shards
from support.tiny_models import contents

from milora_init import api
from milora_init.errors import CheckpointError, OutputError, UsageError
from milora_init.manifest import MANIFEST, WORK_FOLDER, Manifest
from milora_init.options import InitOptions
from milora_init.plan.plan import make_plan
from milora_init.run.progress import Progress

Built = Callable[..., Path]
Start = Callable[..., Manifest]
TIMEOUT_S = 120


def options(source: Path, out: Path, **changes: Any) -> InitOptions:
    return InitOptions(model=str(source), out=str(out), **{"rank": 4, "device": ("cpu",), **changes})


def make(source: Path, out: Path, part: str, progress: Progress | None = None, **changes: Any) -> Any:
    return api.run_part(options(source, out, part=part, **changes), progress=progress or False)


def files(out: Path) -> dict[str, bytes]:
    """All files except the manifest, which holds times."""
    return {name: content for name, content in contents(out).items() if name != MANIFEST}


def arguments(source: Path, part: str | None) -> list[str]:
    words = ["--model", str(source), "--out", "out", "--rank", "4", "--device", "cpu", "--quiet"]
    return words if part is None else [*words, "--part", part]


def hang_inside_the_last_file(flag: str, *words: str) -> None:
    """Make a part, and stop for ever while its last file is being made."""
    from milora_init.run.shard import ShardWriter

    real = ShardWriter.finish

    def finish(self: Any, *cancelled: Any) -> Any:
        if self.name == Path(flag).name:
            Path(flag).touch()
            while not Path(flag).with_suffix(".go").exists():
                time.sleep(0.01)
        return real(self, *cancelled)

    ShardWriter.finish = finish  # type: ignore[method-assign, assignment]
    fork_server.command_line(*words)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_four_parts_at_once_one_killed_one_stopped_make_the_bytes_of_one_run(
    checkpoint: Built, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, flags = checkpoint("llama", "bfloat16"), tmp_path / "out", tmp_path / "flags"
    flags.mkdir()
    plans = {n: make_plan(options(source, out, part=f"{n}/4"), source) for n in (2, 3)}
    last = {number: flags / plan.own_jobs[-1].target for number, plan in plans.items()}

    def begin(number: int) -> Fork:
        words = arguments(source, f"{number}/4")
        if number in last:
            return Fork(hang_inside_the_last_file, str(last[number]), *words, cwd=tmp_path)
        return Fork(fork_server.command_line, *words, cwd=tmp_path)

    with begin(1) as one, begin(2) as killed, begin(3) as stopped, begin(4) as four:
        assert [process.wait(TIMEOUT_S) for process in (one, four)] == [0, 0]
        for flag in last.values():
            wait_for(flag)
        stopped.send_signal(signal.SIGSTOP)
        before = contents(out)

        # Whatever begins now is refused, and changes nothing.
        with pytest.raises(OutputError, match=r"another milora-init is writing to .* at this moment"):
            start(source)
        with pytest.raises(OutputError, match=r"another milora-init is writing to .* at this moment"):
            start(source, rank=3, overwrite=True)
        with pytest.raises(OutputError, match=r"part 2/4 of .* is being made by another process"):
            make(source, out, "2/4")
        with pytest.raises(OutputError, match=r"parts I/4 of .* are being made; parts I/2 would make the same files"):
            make(source, out, "1/2")
        with pytest.raises(OutputError, match="another request: rank was 4, now 3"):
            make(source, out, "1/4", rank=3)
        again = make(source, out, "1/4")  # a part that has ended may be run again
        assert (again.status, again.made) == ("part", ())
        assert contents(out) == before

        killed.kill()
        killed.wait(TIMEOUT_S)
        with pytest.raises(OutputError, match="another milora-init is writing"):  # the stopped part is still there
            start(source)
        stopped.send_signal(signal.SIGCONT)
        last[3].with_suffix(".go").touch()
        assert stopped.wait(TIMEOUT_S) == 0, stopped.stderr
    assert MANIFEST not in contents(out)
    log = ShardLog()
    start(source, progress=log)
    assert log.made == [last[2].name]  # what the killed part has not finished
    assert not (out / WORK_FOLDER).exists()
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    start(source, out=str(tmp_path / "one" / "out"))
    different = "lora/adapter_config.json"  # it names the folder
    whole = files(tmp_path / "one" / "out")
    assert {n: c for n, c in files(out).items() if n != different} == {n: c for n, c in whole.items() if n != different}
    done = make(source, out, "2/4")
    assert (done.status, done.made) == ("unchanged", ())


def test_a_part_that_was_killed_leaves_its_attempt_to_itself_alone(checkpoint: Built, tmp_path: Path) -> None:
    """The next run of the same part removes it; another part does not, because the first one may still be at work."""
    source, out = checkpoint("llama"), tmp_path / "out"
    first = make(source, out, "1/2")
    assert (first.finished, first.of) == (len(first.made), len(shards(source)))
    with pytest.raises(CheckpointError, match="is an unfinished output of milora-init, not a model") as caught:
        api.scan(out, progress=False)
    assert "run its command again, without --part" in caught.value.hint
    attempts = {part: out / WORK_FOLDER / f"part-{part}-of-2.attempts" / "0123" for part in (1, 2)}
    for attempt in attempts.values():
        attempt.mkdir(parents=True)
        (attempt / "model-00001-of-00010.safetensors").write_bytes(b"zeros")
    second = make(source, out, "2/2")
    assert (attempts[1].exists(), attempts[2].exists()) == (True, False)
    assert sorted(first.made + second.made) == shards(source)
    api.run(options(source, out), progress=False)
    assert not (out / WORK_FOLDER).exists()


def test_a_part_is_refused_while_the_whole_is_made(checkpoint: Built, start: Start, tmp_path: Path) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    refused: list[bool] = []

    class Part(Progress):
        def shard(self, *_: Any) -> None:
            if not refused:
                with pytest.raises(OutputError, match=r"another milora-init is writing to .* at this moment"):
                    make(source, out, "1/4")
                refused.append(True)

    start(source, progress=Part())
    assert refused
    assert (out / MANIFEST).is_file()


def test_a_part_that_fails_leaves_nothing_of_its_own(
    checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"

    class Fails(Progress):
        def tensor(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(source, out, "1/2", Fails())
    assert not out.exists()
    made = make(source, out, "2/2").made
    before = contents(out)
    with pytest.raises(KeyboardInterrupt):
        make(source, out, "1/2", Fails())
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert sorted(name for name in after if name.endswith(".safetensors")) == sorted(made)


def test_the_parts_are_all_files_and_nearly_equal_work(checkpoint: Built, tmp_path: Path) -> None:
    source = checkpoint("llama")
    whole = make_plan(options(source, tmp_path / "out"), source)
    for count in (1, 3, 4, 25):
        plans = [make_plan(options(source, tmp_path / "out", part=f"{n}/{count}"), source) for n in range(1, count + 1)]
        targets = [job.target for plan in plans for job in plan.own_jobs]
        assert sorted(targets) == [job.target for job in whole.jobs]
        work = [sum(map(plan.cost, plan.own_jobs)) for plan in plans]
        assert max(work) - min(work) <= max(map(whole.cost, whole.jobs))
        assert {plan.fingerprint for plan in plans} == {whole.fingerprint}
        assert all(plan.required_disk_bytes < whole.required_disk_bytes for plan in plans)
    assert [job.target for job in plans[-1].own_jobs] == []  # more parts than files


@pytest.mark.parametrize(
    "part", ["", "0/4", "5/4", "1", "1/", "/4", "1/4/2", "-1/4", "1/0", "a/b", "1.0/2", 1, "\u0661/\u0664"]
)
def test_a_part_that_is_none_is_refused(part: Any) -> None:
    with pytest.raises(UsageError, match="part is"):
        InitOptions(model="m", out="o", part=part)


def test_a_part_does_not_overwrite() -> None:
    plain = InitOptions(model="m", out="o", part="1/4")
    with pytest.raises(UsageError, match="overwrite and part exclude each other"):
        replace(plain, overwrite=True)
    with pytest.raises(UsageError, match="not a part"):
        api.initialize(plain)
    with pytest.raises(UsageError, match="no part is given"):
        api.initialize_part("m", "o")


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"RANK": "0", "WORLD_SIZE": "8"}, "1/8"),
        ({"RANK": "7", "WORLD_SIZE": "8", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, "8/8"),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, "3/4"),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}, "1/4"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            "3/3",
        ),
        ({"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}, "2/2"),
    ],
    ids=str,
)  # fmt: skip
def test_auto_takes_the_part_of_the_launcher(
    environment: dict[str, str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SKYPILOT_NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="none of these is set: RANK and WORLD_SIZE"):
        InitOptions(model="m", out="o", part="auto")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert InitOptions(model="m", out="o", part="auto").part == part
    assert InitOptions(model="m", out="o").part is None  # only where it is asked for
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UsageError, match="RANK is 'first' and WORLD_SIZE is '8'"):
        InitOptions(model="m", out="o", part="auto")


def test_the_command_line_prints_what_a_part_has_made(checkpoint: Built, tmp_path: Path) -> None:
    source = checkpoint("llama")
    words = [word for word in arguments(source, "1/2") if word != "--quiet"]
    done = fork_server.milora(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count = len(make_plan(options(source, tmp_path / "out", part="1/2"), source).own_jobs)
    assert done.stdout.startswith(f"part 1/2: {count} files made in ")
    assert f"; out has {count} of {len(shards(source))}\nwhen all parts have ended" in done.stdout
    again = json.loads(fork_server.milora(*arguments(source, "1/2"), "--json", cwd=tmp_path).stdout)
    assert (again["status"], again["part"], again["made"]) == ("part", "1/2", [])
    assert (again["finished_files"], again["of_files"]) == (count, len(shards(source)))
    (found,) = api.verify(tmp_path / "out").differences
    assert found.what.endswith("this run has not finished, begun with --part 1/2")
    assert "run the same command without --part" in found.hint
    with pytest.raises(OutputError, match="is an unfinished output of milora-init, begun with --part 1/2") as caught:
        api.merge(tmp_path / "out", tmp_path / "merged", progress=False)
    assert caught.value.hint == found.hint
    other = fork_server.milora(*arguments(source, "1/2"), "--seed", "1", cwd=tmp_path)
    assert (other.returncode, "hint: choose another --out, or remove the folder" in other.stderr) == (1, True)
    wrong = fork_server.milora(*words, "--fail-on", "leak=0.1", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "--fail-on needs all weights" in wrong.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is '5' and WORLD_SIZE is '2'"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        ({"SLURM_ARRAY_TASK_COUNT": "4"}, "SLURM_ARRAY_TASK_COUNT is set and SLURM_ARRAY_TASK_ID is not"),
    ],
)
def test_numbers_of_a_launcher_that_cannot_be_are_named(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SKYPILOT_NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        InitOptions(model="m", out="o", part="auto")
