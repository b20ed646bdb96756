"""The job files of docs/scale.md do what the page says, with stand-ins for Slurm and Kubernetes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import shell_commands

from milora_init.manifest import MANIFEST, WORK_FOLDER

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "scripts" / "jobs"
Files = Callable[[Path], None]

# Does what the array job and the job that depends on it would do, one after the other.
SBATCH = """#!/bin/sh
array=
while :; do
  case "$1" in
    --parsable) echo 17 ;;
    --array=1-*) array="${1#--array=1-}" ;;
    --dependency=afterok:17) ;;
    *) break ;;
  esac
  shift
done
[ -n "$array" ] || exec "$@"
for id in $(seq "$array"); do
  SLURM_ARRAY_TASK_ID=$id SLURM_ARRAY_TASK_MIN=1 SLURM_ARRAY_TASK_COUNT=$array SLURM_CPUS_PER_TASK=1 "$@" >&2 || exit 1
done
"""


@pytest.fixture
def folder(example_files: Files, tmp_path: Path) -> Iterator[Path]:
    """A folder with the example files, and a `commands` with milora-init and sbatch in it."""
    example_files(tmp_path)
    with shell_commands.served(tmp_path) as commands:
        (commands / "sbatch").write_text(SBATCH)
        (commands / "sbatch").chmod(0o755)
        yield tmp_path


def shell(command: str, folder: Path, **environment: str) -> None:
    places = {"PATH": f"{folder / 'commands'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env={**os.environ, **places, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def blocks(word: str) -> str:
    """The code block of the page that contains a word."""
    (code,) = [
        code for code in (ROOT / "docs" / "scale.md").read_text().split("```bash\n")[1:] if word in code.split("```")[0]
    ]
    return code.split("```")[0]


def test_the_slurm_commands_make_the_parts_and_finish(folder: Path) -> None:
    command = blocks("sbatch").replace("--array=1-16", "--array=1-2").replace("scripts/jobs", str(JOBS))
    shell(command.replace("./svd_init", "./by_slurm"), folder)
    assert (folder / "by_slurm" / MANIFEST).is_file()
    assert not (folder / "by_slurm" / WORK_FOLDER).exists()


def test_the_kubernetes_jobs_are_jobs_and_their_commands_make_the_parts_and_finish(folder: Path) -> None:
    parts, finish = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text())
    for job, step in ((parts, "parts"), (finish, "finish")):
        assert (job["apiVersion"], job["kind"], job["metadata"]["labels"]) == ("batch/v1", "Job", {"step": step})
        assert f"--selector=step={step}" in blocks("kubectl")
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert f"job/{parts['metadata']['name']}" in blocks("kubectl")
    assert (parts["spec"]["completionMode"], parts["spec"]["completions"]) == ("Indexed", parts["spec"]["parallelism"])
    for index in range(parts["spec"]["completions"]):
        shell(_command(parts), folder, JOB_COMPLETION_INDEX=str(index))
    shell(_command(finish), folder)
    assert (folder / "by_kubernetes" / MANIFEST).is_file()


def _command(job: Mapping[str, Any]) -> str:
    """The command of a job's container, with the folders of the example."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    places = [word.replace("/shared/svd_init", "./by_kubernetes").replace("/shared/", "./") for word in words]
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in places)
