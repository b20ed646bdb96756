"""Settings for every test: one CPU thread, no Hub. The fixtures are those of support/fixtures.py."""

from __future__ import annotations

import os

# More threads make tiny matrices slower, most of all on a shared machine. torch reads this when it is imported: here,
# in every pytest worker and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, except into the process that only hands out tests to workers: it need not import torch."""
    hands_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("support.fixtures")
