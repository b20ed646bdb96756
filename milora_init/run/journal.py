"""The journal of an output folder: which run it belongs to, and which shards are finished.

One JSON object a line: first the `Head`, then an `Entry` for each finished shard, which may be recorded again. A line
is safe on disk before the next step of the run, so an interrupted run can be resumed from it. Text behind the last
newline was cut off while it was written, and is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from milora_init.checkpoint.writer import writing
from milora_init.errors import OutputError
from milora_init.manifest import WeightRecord
from milora_init.untrusted import plain_file, relative_name


@dataclass(frozen=True, slots=True)
class Head:
    """The run that the folder belongs to.

    Attributes:
        fingerprint: Hash of `inputs`.
        inputs: All that determines the output's bytes.
        files: Every file of the finished output, by the path relative to the folder.
    """

    fingerprint: str
    inputs: Mapping[str, Any]
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "inputs": self.inputs, "files": self.files}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Head:
        """Raises ValueError, TypeError or KeyError for an object of another form."""
        files = tuple(relative_name(name) for name in content["files"])
        return cls(content["fingerprint"], dict(content["inputs"]), files)


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished shard.

    Attributes:
        shard: Its name.
        files: Size in bytes of each file that was written for it, by the path relative to the folder.
        records: One for each of its weights that was split.
        hashes: SHA-256 of each of `files`.
        pushed: SHA-256 with which the shard was uploaded; None if it was not. It is not in the folder then.
    """

    shard: str
    files: Mapping[str, int]
    records: tuple[WeightRecord, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    pushed: str | None = None

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        if self.pushed is None:
            del content["pushed"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Entry:
        """Raises ValueError, TypeError or KeyError for an object of another form."""
        return cls(
            shard=relative_name(content["shard"]),
            files={relative_name(name): size for name, size in dict.items(content["files"])},
            records=tuple(WeightRecord.from_json(record) for record in content["records"]),
            hashes=dict(dict.items(content.get("hashes", {}))),
            pushed=content.get("pushed"),
        )


class Journal:
    """The journal file of one output folder.

    Raises:
        OutputError: The file cannot be read or written, or is damaged.
    """

    def __init__(self, path: Path, *, out: Path) -> None:
        self.path, self._out = path, out
        self._end: int | None = None  # behind the last whole line, once a line was appended

    def read(self) -> tuple[Head | None, tuple[Entry, ...]]:
        """The head and all entries, oldest first; None and no entries where there is no journal."""
        try:
            content = plain_file(self.path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None, ()
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from error
        try:
            lines = [json.loads(line) for line in content.decode().split("\n")[:-1]]
            if not lines:
                return None, ()
            return Head.from_json(lines[0]), tuple(Entry.from_json(line) for line in lines[1:])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            hint = f"choose another --out, or remove {self._out}"
            raise OutputError(f"{self.path} is damaged", hint=hint) from error

    def shards(self) -> dict[str, Entry]:
        """The last entry of each shard, by its name."""
        return {entry.shard: entry for entry in self.read()[1]}

    def append(self, line: Head | Entry) -> None:
        """Append a line; it is safe on disk when this returns."""
        with writing(self.path), self.path.open("a+b") as file:
            if self._end is None or file.tell() < self._end:  # not yet read, or removed meanwhile
                file.seek(0)
                self._end = file.read().rfind(b"\n") + 1
            file.truncate(self._end)  # remove a line that was cut off: it would damage this one
            self._end += file.write(json.dumps(line.to_json()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
