"""Marks of single parameters."""

from __future__ import annotations

from typing import Any

import pytest


def wide(*values: object) -> Any:  # pytest's type of a parameter with a mark is private
    """A further case of a test that has others; `make test-wide` runs it."""
    return pytest.param(*values, marks=pytest.mark.wide)
