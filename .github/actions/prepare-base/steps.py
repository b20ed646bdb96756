"""The steps of the action prepare-base. Inputs come from the environment, and no shell reads them.

    python3 steps.py plan | init | push

Uses only the standard library, so that any python3 of a runner works; milora-init is a command on PATH.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_USAGE = 2  # the exit status of milora-init for wrong options

NAMED = ("rank", "recipe", "method", "mode", "dtype", "revision")


def init_command(env: Mapping[str, str]) -> list[str]:
    """The words of `milora-init init` for the inputs. Raises ValueError for an open quote in the input `options`."""
    words = ["milora-init", "init", f"--model={env['MODEL']}", f"--out={env['OUT']}"]
    words += [f"--{name}={value}" for name in NAMED if (value := env.get(name.upper(), "").strip())]
    words += [f"--fail-on={limit}" for limit in env.get("FAIL_ON", "").split()]
    options = env.get("OPTIONS", "")
    try:
        return words + shlex.split(options)
    except ValueError as error:
        raise ValueError(f"the input options, {options!r}: {error}") from None


def plan(env: Mapping[str, str]) -> int:
    """Plan the run; write its commit and fingerprint to GITHUB_OUTPUT."""
    status, text = _run([*init_command(env), "--dry-run", "--json"])
    if status == 0:
        planned = json.loads(text)
        revision = (planned["source"] or {}).get("revision") or ""
        _set_outputs(env, {"revision": revision, "fingerprint": planned["fingerprint"]})
    return status


def init(env: Mapping[str, str]) -> int:
    """Make the output, or find it finished; write its report to a file, and the name of the file to GITHUB_OUTPUT."""
    made = subprocess.run(init_command(env), check=False).returncode  # its table goes to the log
    if made == _USAGE:  # the message is about these options, and nothing was made
        return made
    status, text = _run(["milora-init", "report", "--json", "--", env["OUT"]])
    if status == 0:  # also for an output that exceeds a limit, which is complete
        result = Path(env["RUNNER_TEMP"]) / "milora-init-report.json"
        result.write_text(text, encoding="utf-8")
        _set_outputs(env, {"result": str(result)})
    return made or status


def push(env: Mapping[str, str]) -> int:
    """Push the output."""
    if env["PUBLIC"] not in ("true", "false"):
        raise ValueError(f"public is {env['PUBLIC']!r}, expected true or false")
    visible = "--public" if env["PUBLIC"] == "true" else "--private"
    return subprocess.run(["milora-init", "push", visible, "--", env["OUT"], env["REPOSITORY"]], check=False).returncode


def _run(words: list[str]) -> tuple[int, str]:
    """Run a command; return its exit status and its stdout. stderr goes to the log."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    return done.returncode, done.stdout


def _set_outputs(env: Mapping[str, str], outputs: Mapping[str, Any]) -> None:
    """Append outputs to GITHUB_OUTPUT. Raises ValueError for a value that could start a line of its own."""
    for name, value in outputs.items():
        if not isinstance(value, str) or len(value.splitlines()) > 1 or not value.isprintable():
            raise ValueError(f"the output {name} is {value!r}, expected one line of text")
    with Path(env["GITHUB_OUTPUT"]).open("a", encoding="utf-8") as file:
        file.writelines(f"{name}={value}\n" for name, value in outputs.items())


if __name__ == "__main__":
    try:
        sys.exit({"plan": plan, "init": init, "push": push}[sys.argv[1]](os.environ))
    except ValueError as error:
        line = " ".join(str(error).split()).replace("%", "%25")
        sys.exit(f"::error title=prepare-base::{line}")
