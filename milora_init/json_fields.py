"""Read a JSON object from an untrusted file, and check the types and ranges of its fields.

A check is a function that says whether a value is allowed. It gets `...` (Ellipsis) for a missing field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from milora_init.untrusted import MOST_JSON_BYTES, read_text, relative_name

Check = Callable[[Any], bool]
_INTEGER_LIMIT = 2**63


def read_object(path: Path, *, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file does not exist.

    Raises:
        OSError: The file is larger than `most_bytes`, is not a regular file, or cannot be read.
        ValueError: The content is not a JSON object in UTF-8, or a number is not finite or is too large.
        RecursionError: The content is nested too deeply.
    """
    try:
        text = read_text(path, most_bytes=most_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    content = json.loads(text, parse_float=_finite, parse_constant=_finite, parse_int=_bounded_integer)
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__}, not an object")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _bounded_integer(text: str) -> int:
    if len(text) > 20 or not -_INTEGER_LIMIT < (number := int(text)) < _INTEGER_LIMIT:
        raise ValueError(f"the number {text[:20]}... is too large")
    return number


def require_fields(content: Any, fields: Mapping[str, Check], where: str) -> None:
    """Check the fields of a JSON object. Fields that are not in `fields` are ignored.

    Args:
        content: The JSON object.
        fields: The check of each field, by name.
        where: The path of the object in the file, for the error message: empty, or ending with a dot.

    Raises:
        ValueError: A field is missing or has a value that is not allowed.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where.rstrip('.')} is not an object")
    for name, check in fields.items():
        if name not in content and not check(...):
            raise ValueError(f"{where}{name} is missing")
        if name in content and not check(content[name]):
            raise ValueError(f"{where}{name} has the invalid value {str(content[name])[:60]!r}")


def text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def count(value: Any) -> bool:
    """An integer that is 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def number(value: Any) -> bool:
    """A number that is 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def sha256_text(value: Any) -> bool:
    """A SHA-256 as 64 lower-case hexadecimal digits."""
    return text(value) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def or_none(check: Check) -> Check:
    """null, or a value that passes the check."""
    return lambda value: value is None or check(value)


def or_absent(check: Check) -> Check:
    """A field that may be missing, or a value that passes the check."""
    return lambda value: value is ... or check(value)


def each(key: Check, check: Check) -> Check:
    """An object whose keys pass the first check and whose values pass the second."""
    return lambda value: isinstance(value, dict) and all(key(k) and check(v) for k, v in value.items())


def all_of(check: Check) -> Check:
    """A list whose items pass the check."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def one_of(*values: str) -> Check:
    """One of these strings."""
    return lambda value: isinstance(value, str) and value in values


def file_name(value: Any) -> bool:
    """A relative name of a file that is not hidden.

    Raises:
        ValueError: See `relative_name`; or the name is hidden. This text says more than the one of `require_fields`.
    """
    if any(part.startswith(".") for part in relative_name(value).split("/")):
        raise ValueError(f"{value!r} is a hidden file")
    return True


def non_empty(value: Any) -> bool:
    """A string that is not empty."""
    return text(value) and bool(value)


def at_least_1(value: Any) -> bool:
    """An integer that is 1 or more."""
    return count(value) and value >= 1


def positive(value: Any) -> bool:
    """A number above 0."""
    return number(value) and value > 0


def anything(value: Any) -> bool:
    """Any value; the field must not be missing."""
    return value is not ...


def an_object(value: Any) -> bool:
    """A JSON object."""
    return isinstance(value, dict)
