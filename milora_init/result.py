"""What the public functions return: frozen values with a short repr, a table in notebooks, and `to_json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from milora_init.envelope import envelope
from milora_init.untrusted import printable

if TYPE_CHECKING:
    from milora_init.hub.upload import Published
    from milora_init.manifest import Manifest


class Result:
    """Base class of the results of the public functions."""

    __slots__ = ()

    def summary(self) -> Mapping[str, object]:
        """The few figures that the repr shows."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The object that the command prints with `--json`; see `envelope`."""
        raise NotImplementedError

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.summary().items())
        return f"{type(self).__name__}({fields})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(printable(str(value)))}</td></tr>"
            for name, value in self.summary().items()
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{rows}</table>"


@dataclass(frozen=True, slots=True, repr=False)
class InitResult(Result):
    """What `initialize` returns.

    Attributes:
        out: The output folder as given, or the repository if nothing was kept on the disk.
        status: `done`, or `unchanged` if the same request was finished before.
        manifest: The content of milora_init.json: a record of every weight. Its `out` is that of the result.
        pushed: What was uploaded; None if nothing was.
    """

    out: str
    status: Literal["done", "unchanged"]
    manifest: Manifest
    pushed: Published | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of all that determines the bytes of the output."""
        return self.manifest.fingerprint

    @property
    def warnings(self) -> list[str]:
        """What the user should know before training."""
        from milora_init.report import warnings

        return warnings(self.manifest)

    @property
    def load(self) -> str:
        """Python lines that load the pair for training."""
        from milora_init.report import loading_lines

        return loading_lines(self.manifest)

    def summary(self) -> Mapping[str, object]:
        return {"status": self.status, "out": self.out, **_figures(self.manifest)}

    def to_json(self) -> dict[str, Any]:
        from milora_init.report import run_fields

        fields = run_fields(self.manifest)
        if self.pushed:
            fields["pushed"] = asdict(self.pushed)
        return envelope("init", self.status, **{**fields, "out": self.out})


@dataclass(frozen=True, slots=True, repr=False)
class PartResult(Result):
    """What `initialize_part` returns.

    Attributes:
        out: The output folder as given.
        status: `part`: the files of the part are made, and the same request without a part finishes the output. Or
            `unchanged`: the output was finished before.
        part: The part, `I/N`.
        fingerprint: Hash of all that determines the bytes of the output.
        made: The files that were made now.
        finished: How many files of weights are made, by all parts.
        of: How many files of weights the output has.
    """

    out: str
    status: Literal["part", "unchanged"]
    part: str
    fingerprint: str
    made: tuple[str, ...]
    finished: int
    of: int

    def summary(self) -> Mapping[str, object]:
        return {"status": self.status, "out": self.out, "part": self.part, "finished": f"{self.finished}/{self.of}"}

    def to_json(self) -> dict[str, Any]:
        return envelope(
            "init", "part", out=self.out, fingerprint=self.fingerprint, part=self.part, made=list(self.made),
            finished_files=self.finished, of_files=self.of, unchanged=self.status == "unchanged",
        )  # fmt: skip


def _figures(manifest: Manifest) -> dict[str, object]:
    from milora_init.report import size

    return {
        "weights": len(manifest.weights),
        "rank": manifest.inputs["rank"],
        "method": manifest.method.name,
        "mode": manifest.inputs["mode"],
        "size": size(sum(manifest.files.values())),
        "step_0_error": f"{max(weight.rounding.error for weight in manifest.weights):.1e}",
        "fingerprint": manifest.fingerprint[:12],
    }
