"""`milora-init env`: versions, devices and settings, for a bug report."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from milora_init import __version__
from milora_init.cli import output
from milora_init.cli.params import Json, Quiet
from milora_init.envelope import envelope

_PACKAGES = (
    "torch", "transformers", "safetensors", "huggingface_hub", "typer", "rich", "PyYAML",
    "peft", "trl", "accelerate", "datasets", "ray",
)  # fmt: skip
_VARIABLES = (
    "MILORA_DEBUG",
    "MILORA_PICTURE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "RANK",
    "WORLD_SIZE",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_ARRAY_TASK_MIN",
    "SLURM_ARRAY_TASK_STEP",
    "SLURM_ARRAY_TASK_COUNT",
    "SKYPILOT_NODE_RANK",
    "SKYPILOT_NUM_NODES",
    "NO_COLOR",
    "FORCE_COLOR",
    "GITHUB_ACTIONS",
    "GITHUB_STEP_SUMMARY",
)  # fmt: skip  HF_TOKEN is a secret: only whether it is set


def env(as_json: Json = False, quiet: Quiet = False) -> None:
    """Print versions, devices and settings, for a bug report.

    No token is printed.

    [bold]Example[/bold]

    milora-init env
    """
    facts = _facts()
    if as_json:
        output.json_output.give(envelope("env", "done", **facts))
    elif not quiet:
        output.print_facts({**facts["versions"], **facts["machine"], **facts["environment"]})


def _facts() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    set_variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {
        "versions": {"milora-init": __version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "devices": ", ".join(gpus) or "cpu",
            "cuda": torch.version.cuda or "not in this build of torch",
            "python_executable": sys.executable,
        },
        "environment": {**set_variables, "HF_TOKEN": "set" if os.environ.get("HF_TOKEN") else "not set"},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
