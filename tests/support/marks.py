"""Marks of single parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def wide(*values: object, id: str | None = None) -> Any:  # pytest's type of a parameter with a mark is private
    """A further case of a test that has others; `make test-wide` runs it."""
    return pytest.param(*values, marks=pytest.mark.wide, id=id)


def mostly_wide(values: Iterable[Any], *kept: object) -> list[Any]:
    """All values as parameters: those that `make test` keeps, and the further ones."""
    return [value if value in kept else wide(value) for value in values]
