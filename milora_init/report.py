"""What a person or a program reads of a run: tables, warnings and the lines that load the pair."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from milora_init.manifest import Manifest, WeightRecord
from milora_init.untrusted import printable

LEAK_LINE = 0.1
_CURED = 0.8 * LEAK_LINE  # other dtypes are measured on some of the rows only


@dataclass(frozen=True, slots=True)
class Kind:
    """All weights of one name and shape, taken together."""

    suffix: str
    shape: tuple[int, int]
    count: int
    rank: int
    energy: float
    leak: float
    certificate: float
    elapsed_s: float


def kinds(weights: Iterable[WeightRecord]) -> list[Kind]:
    """Weights by suffix, shape and rank: mean share of energy, worst leak, worst certificate, seconds together."""
    groups: dict[tuple[str, tuple[int, int], int], list[WeightRecord]] = {}
    for weight in weights:
        groups.setdefault((weight.suffix, weight.shape, weight.rank), []).append(weight)
    return [
        Kind(
            suffix=suffix,
            shape=shape,
            count=len(group),
            rank=rank,
            energy=sum(weight.energy for weight in group) / len(group),
            leak=max(weight.rounding.leak for weight in group),
            certificate=max(component_error(weight) for weight in group),
            elapsed_s=sum(weight.elapsed_s for weight in group),
        )
        for (suffix, shape, rank), group in groups.items()
    ]


def component_error(weight: WeightRecord) -> float:
    """The certified relative error of a component; infinite where the cut falls in a cluster and none is *the* one."""
    error = weight.certificate.component_error
    return math.inf if error is None else error


def warnings(manifest: Manifest) -> list[str]:
    """What a person should know of this output before training on it."""
    found = list(manifest.notices)
    worst = max(manifest.weights, key=lambda weight: weight.rounding.leak)
    leak = worst.rounding.leak
    if leak > LEAK_LINE:
        left = {dtype: _worst_if(dtype, manifest.weights) for dtype in worst.rounding.leak_if}
        cures = [f"--dtype {dtype} ({value:.1e})" for dtype, value in left.items() if value < _CURED]
        count = sum(weight.rounding.leak > LEAK_LINE for weight in manifest.weights)
        others = f", and more than {LEAK_LINE:.0%} in {count - 1} more" if count > 1 else ""
        found.append(
            f"rounding to {worst.dtype} leaves {leak:.0%} of the component of {worst.module} in the base{others}"
            + (f"; instead: {' or '.join(cures)}" if cures else "")
        )
    idle = [weight for weight in manifest.weights if weight.untrainable]
    if idle:
        found.append(
            f"{sum(w.untrainable for w in idle)} directions in {len(idle)} weights have a singular value of almost zero"
            f" and can hardly train, {idle[0].module} first"
        )
    return found


def _worst_if(dtype: str, weights: Iterable[WeightRecord]) -> float:
    """The most that rounding to a dtype would leave of a weight's component in the base; infinite if one overflows."""
    found = [weight.rounding.leak_if.get(dtype) for weight in weights]
    return max(math.inf if value is None else value for value in found)


def loading_lines(manifest: Manifest) -> str:
    """Python that loads the pair for training. People run it: what comes out of a file is a name or a string in it."""
    architecture = str(manifest.source["architecture"])
    other_by_auto = manifest.source.get("other_class") and not manifest.inputs.get("text_only")
    causal = manifest.adapter["task_type"] == "CAUSAL_LM" and not other_by_auto
    cls = architecture if architecture.isidentifier() and not causal else "AutoModelForCausalLM"
    out = printable(json.dumps(manifest.out, ensure_ascii=False))  # its escapes are Python's too
    branch = manifest.adapter.get("revision")
    of_branch = f", revision={printable(json.dumps(branch))}" if branch else ""
    trusted = ", trust_remote_code=True" if manifest.source.get("trust_remote_code") else ""
    return (
        f"from peft import PeftModel\n"
        f"from transformers import {cls}\n\n"
        f'base = {cls}.from_pretrained({out}, dtype="auto"{of_branch}{trusted})\n'
        f'model = PeftModel.from_pretrained(base, {out}, subfolder="lora", is_trainable=True{of_branch})'
    )


def summary(manifest: Manifest, *, unchanged: bool) -> dict[str, Any]:
    """The one object that `--json` prints: the manifest and what follows from it."""
    return {
        "status": "unchanged" if unchanged else "done",
        **manifest.to_json(),
        "warnings": warnings(manifest),
        "load": loading_lines(manifest),
    }


def share(part: float) -> str:
    """A share of a whole for people: 12.16%, 2.1e-06."""
    return f"{part:.2%}" if part > 1e-4 else f"{part:.1e}"


def size(size_bytes: float) -> str:
    """Bytes for people: 13.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def duration(elapsed_s: float) -> str:
    """Seconds for people: 1 h 02 min, 3 min 05 s, 4.2 s."""
    if elapsed_s < 60:
        return f"{elapsed_s:.1f} s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
