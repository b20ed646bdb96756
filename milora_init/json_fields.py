"""Read a JSON object that somebody else may have written, and check the type and range of its fields.

A check is a function of a value; `...` stands for a field that is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from milora_init.untrusted import MOST_JSON_BYTES, read_text, relative_name

Check = Callable[[Any], bool]
_MOST = 2**63  # of a whole number


def read_object(path: Path, *, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any] | None:
    """The JSON object in a file, its numbers finite; None where there is no file.

    Raises:
        OSError, ValueError, RecursionError: It is something else, or too large.
    """
    try:
        text = read_text(path, most_bytes=most_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    content = json.loads(text, parse_float=_finite, parse_constant=_finite, parse_int=_whole)
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -_MOST < (number := int(text)) < _MOST:
        raise ValueError(f"{text[:20]}... is too large a number")
    return number


def require_fields(content: Any, fields: Mapping[str, Check], where: str) -> None:
    """See that an object has fields of the kinds that they should be of.

    Raises:
        ValueError: One is not, or is missing. It is named.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where.rstrip('.')} is no object")
    for name, check in fields.items():
        if name not in content and not check(...):
            raise ValueError(f"{where}{name} is missing")
        if name in content and not check(content[name]):
            raise ValueError(f"{where}{name} is {str(content[name])[:60]!r}")


def text(value: Any) -> bool:
    return isinstance(value, str)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def sha256_text(value: Any) -> bool:
    return text(value) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def or_absent(check: Check) -> Check:
    return lambda value: value is ... or check(value)


def each(key: Check, check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(key(k) and check(v) for k, v in value.items())


def all_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


def file_name(value: Any) -> bool:
    if any(part.startswith(".") for part in relative_name(value).split("/")):  # its ValueError tells more
        raise ValueError(f"{value!r} is hidden")
    return True


def non_empty(value: Any) -> bool:
    return text(value) and bool(value)


def at_least_1(value: Any) -> bool:
    return count(value) and value >= 1


def positive(value: Any) -> bool:
    return number(value) and value > 0


def anything(value: Any) -> bool:
    return value is not ...


def an_object(value: Any) -> bool:
    return isinstance(value, dict)
