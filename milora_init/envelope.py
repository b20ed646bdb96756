"""The JSON object that every command prints with `--json`, and `to_json()` of every result returns.

docs/json.md describes it; docs/output.schema.json is its JSON Schema, which a test compares with what is printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

SCHEMA = 1  # increased when a field is removed or changes its meaning
Status = Literal["planned", "done", "part", "unchanged", "ok", "differs", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)


def envelope(
    command: str,
    status: Status,
    *,
    out: str | None = None,
    fingerprint: str | None = None,
    source: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    **fields: Any,
) -> dict[str, Any]:
    """One JSON object, with the fields that all commands have first.

    Args:
        command: The command: `init`, `verify`, ...
        status: `planned` (--dry-run), `done`, `part` (--part: the output is not finished), `unchanged` (it was done
            before), `ok` and `differs` (verify), `failed`.
        out: The folder or repository that was written or read.
        fingerprint: Hash of all that determines the bytes of the output.
        source: `model` and `revision` of the original model.
        warnings: What the user should know before using the output.
        fields: The command's own fields.
    """
    return {
        "schema": SCHEMA,
        "command": command,
        "status": status,
        "out": out,
        "fingerprint": fingerprint,
        "source": None if source is None else {"model": source.get("model"), "revision": source.get("revision")},
        "warnings": list(warnings),
        **fields,
    }
