"""What `verify` returns: findings, and the verdict that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from milora_init.envelope import envelope
from milora_init.report import counted
from milora_init.result import Result

Code = Literal[
    "pair",
    "trained_pair",
    "adapter",
    "trained_adapter",
    "foreign_adapter",
    "original_with_adapter",
    "residual_alone",
    "replaced_adapter",
    "adapter_misfit",
    "other_model",
    "damaged",
    "no_manifest",
    "merged",
    "damaged_merged",
    "converted",
    "damaged_converted",
    "unfinished",
    "unknown",
]
TEXTS: Mapping[Code, str] = {
    "pair": "a matching pair: a residual base and its adapter",
    "trained_pair": "a matching pair: a residual base and an adapter trained on it",
    "adapter": "an adapter of an original model, as milora-init made it",
    "trained_adapter": "an adapter of an original model, and one that was trained from it",
    "foreign_adapter": "an output of milora-init, with an adapter that was not trained from it",
    "original_with_adapter": "an original model with a residual's adapter",
    "residual_alone": "a residual base alone, which is not the original model",
    "replaced_adapter": "an output of milora-init whose initial adapter was trained in place, or replaced",
    "adapter_misfit": "an output of milora-init, and a trained adapter that does not fit it as it is",
    "other_model": "an output that was made from another source",
    "damaged": "an output of milora-init that was changed",
    "no_manifest": "a residual base and its adapter, by their tensors; its manifest is gone",
    "merged": "a merged model: it needs no adapter",
    "damaged_merged": "a merged model that was changed",
    "converted": "a converted adapter: a plain LoRA of the original model",
    "damaged_converted": "a converted adapter that was changed",
    "unfinished": "an unfinished output",
    "unknown": "not an output of milora-init, as far as can be told",
}

# What a finding says about the folder; `verdict_code` decides by these.
Problem = Literal[
    "changed",  # something differs from the manifest
    "changed_weights",  # a file of the base's weights does
    "missing_adapter",  # adapter_config.json or the adapter's weights
    "original_weights",  # the folder has the files of the original model
    "replaced_adapter",  # lora/ holds an adapter with other singular values than recorded
    "adapter_misfit",  # the trained adapter does not fit this base
    "foreign_adapter",  # the trained adapter is of another base
    "other_model",  # the model that was given is not the one that the pair was made from
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found.

    Attributes:
        where: The file, tensor or module.
        what: What is wrong with it.
        hint: What the user can do.
        problem: What it means for the verdict; None for a note, which is worth knowing but not wrong.
    """

    where: str
    what: str
    hint: str = ""
    problem: Problem | None = "changed"


def note(where: str, what: str) -> Finding:
    """A finding that is not a difference."""
    return Finding(where, what, problem=None)


@dataclass(frozen=True, slots=True, repr=False)
class Verdict(Result):
    """The answer of `verify`.

    Attributes:
        folder: The folder, as it was given.
        code: What the folder is.
        findings: Differences and notes, in the order of the checks.
        checked: What was compared: the number of files and modules, and of tensors with which model.
        fingerprint: Of the output, as its record has it; None without a record.
        source: The original model, as the record names it.
    """

    folder: str
    code: Code
    findings: tuple[Finding, ...]
    checked: Mapping[str, Any]
    fingerprint: str | None = None
    source: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """What the folder is, in one line."""
        return TEXTS[self.code]

    @property
    def differences(self) -> tuple[Finding, ...]:
        """All that is wrong; empty if the folder is what it should be."""
        return tuple(finding for finding in self.findings if finding.problem)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not wrong, but worth knowing."""
        return tuple(f"{found.where}: {found.what}" for found in self.findings if found.problem is None)

    @property
    def ok(self) -> bool:
        """Whether there are no differences."""
        return not self.differences

    @property
    def compared(self) -> str:
        """What the verdict rests on, as text."""
        if self.code in ("merged", "converted"):
            parts = [f"{counted(self.checked['files'], 'file')} with the record"]
        else:
            files, modules = counted(self.checked["files"], "file"), counted(self.checked["modules"], "module")
            parts = [f"{files} and {modules} with the manifest"]
        if "components" in self.checked:
            which = "all components" if self.checked["components"] == "all" else "a sample of the components"
            tensors = f"{counted(self.checked['tensors'], 'tensor')} and " if "tensors" in self.checked else ""
            parts.append(f"{tensors}{which} with {self.checked['model']}")
        elif "tensors" in self.checked:
            parts.append(f"{counted(self.checked['tensors'], 'tensor')} with {self.checked['model']}")
        elif "model" in self.checked:
            parts.append(f"the recorded hashes of the original with {self.checked['model']}")
        if "adapter" in self.checked:
            parts.append(f"{self.checked['adapter']} with the initial adapter")
        return ", ".join(parts)

    def summary(self) -> Mapping[str, object]:
        return {"ok": self.ok, "folder": self.folder, "code": self.code, "differences": len(self.differences)}

    def to_json(self) -> dict[str, Any]:
        return envelope(
            "verify",
            "ok" if self.ok else "differs",
            out=self.folder,
            fingerprint=self.fingerprint,
            source=self.source,
            code=self.code,
            text=self.text,
            differences=[{"where": d.where, "what": d.what, "hint": d.hint} for d in self.differences],
            notes=list(self.notes),
            checked=dict(self.checked),
        )


def verdict_code(findings: Iterable[Finding], *, trained: bool, has_base: bool = True) -> Code:
    """The verdict on a folder that has a manifest: the most specific one that its findings allow.

    Args:
        findings: Of all checks.
        trained: Whether a trained adapter was checked too.
        has_base: Whether the output has a residual base, and is not an adapter of an original model.
    """
    problems = {finding.problem for finding in findings}
    if "foreign_adapter" in problems:
        return "foreign_adapter"
    if "original_weights" in problems:
        return "original_with_adapter"
    if has_base and "missing_adapter" in problems and "changed_weights" not in problems:
        return "residual_alone"
    if "replaced_adapter" in problems:
        return "replaced_adapter"
    if problems & {"changed", "changed_weights", "missing_adapter"}:
        return "damaged"
    if "adapter_misfit" in problems:
        return "adapter_misfit"
    if "other_model" in problems:
        return "other_model"
    if not has_base:
        return "trained_adapter" if trained else "adapter"
    return "trained_pair" if trained else "pair"
