"""Make the report on a run: a table of the weights, the warnings, and Python code that loads the pair.

Everything is computed from the manifest, so that a finished output can be reported again without the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from milora_init.manifest import Manifest, WeightRecord
from milora_init.untrusted import printable

LEAK_LIMIT = 0.1  # a larger `Rounding.leak` gives a warning
# The leak of other dtypes is measured on some of the rows only, so it must be lower before they are suggested.
_SUGGESTION_LIMIT = 0.8 * LEAK_LIMIT


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """All weights with the same last part of their name, shape and rank.

    Attributes:
        suffix: The last part of the name.
        shape: The shape (m, n) of each weight.
        count: The number of weights.
        rank: The rank of each component.
        energy: Mean share of the component in the squared Frobenius norm.
        leak: The largest `Rounding.leak`.
        certificate: The largest certified relative error of a component.
        elapsed_s: Seconds for solving all of them.
    """

    suffix: str
    shape: tuple[int, int]
    count: int
    rank: int
    energy: float
    leak: float
    certificate: float
    elapsed_s: float


def weight_groups(weights: Iterable[WeightRecord]) -> list[WeightGroup]:
    """The rows of the table: weights by suffix, shape and rank, in the model's order."""
    groups: dict[tuple[str, tuple[int, int], int], list[WeightRecord]] = {}
    for weight in weights:
        groups.setdefault((weight.suffix, weight.shape, weight.rank), []).append(weight)
    return [
        WeightGroup(
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
    """The certified relative error of a component; infinite if it is not unique (the cut falls in a cluster)."""
    error = weight.certificate.component_error
    return math.inf if error is None else error


def warnings(manifest: Manifest) -> list[str]:
    """What the user should know before training: the notices of the manifest, large leaks, untrainable directions."""
    found = list(manifest.notices)
    worst = max(manifest.weights, key=lambda weight: weight.rounding.leak)
    leak = worst.rounding.leak
    if leak > LEAK_LIMIT:
        leaks = {dtype: _largest_leak_if(dtype, manifest.weights) for dtype in worst.rounding.leak_if}
        options = [f"--dtype {dtype} ({value:.1e})" for dtype, value in leaks.items() if value < _SUGGESTION_LIMIT]
        count = sum(weight.rounding.leak > LEAK_LIMIT for weight in manifest.weights)
        in_others = f", and more than {LEAK_LIMIT:.0%} in {count - 1} more" if count > 1 else ""
        found.append(
            f"rounding to {worst.dtype} leaves {leak:.0%} of the component of {worst.module} in the base{in_others}"
            + (f"; use instead: {' or '.join(options)}" if options else "")
        )
    affected = [weight for weight in manifest.weights if weight.untrainable]
    if affected:
        found.append(
            f"{sum(w.untrainable for w in affected)} directions in {len(affected)} weights have a singular value near "
            f"zero and get almost no gradient; the first of these weights is {affected[0].module}"
        )
    return found


def _largest_leak_if(dtype: str, weights: Iterable[WeightRecord]) -> float:
    """The largest leak of all weights, if they were rounded to this dtype; infinite if one of them overflows."""
    found = [weight.rounding.leak_if.get(dtype) for weight in weights]
    return max(math.inf if value is None else value for value in found)


def loading_lines(manifest: Manifest) -> str:
    """Python code that loads the pair for training.

    Users run this code. Therefore text from a file enters it only as a valid identifier or as a quoted string.
    """
    architecture = str(manifest.source["architecture"])
    auto_builds_other = manifest.source.get("other_class") and not manifest.inputs.get("text_only")
    causal = manifest.adapter["task_type"] == "CAUSAL_LM" and not auto_builds_other
    cls = architecture if architecture.isidentifier() and not causal else "AutoModelForCausalLM"
    out = printable(json.dumps(manifest.out, ensure_ascii=False))  # JSON's escapes are valid in Python
    branch = manifest.adapter.get("revision")
    revision = f", revision={printable(json.dumps(branch))}" if branch else ""
    trust = ", trust_remote_code=True" if manifest.source.get("trust_remote_code") else ""
    return (
        f"from peft import PeftModel\n"
        f"from transformers import {cls}\n\n"
        f'base = {cls}.from_pretrained({out}, dtype="auto"{revision}{trust})\n'
        f'model = PeftModel.from_pretrained(base, {out}, subfolder="lora", is_trainable=True{revision})'
    )


def summary(manifest: Manifest, *, unchanged: bool) -> dict[str, Any]:
    """The object that `--json` prints: the manifest, its status, the warnings and the loading lines."""
    return {
        "status": "unchanged" if unchanged else "done",
        **manifest.to_json(),
        "warnings": warnings(manifest),
        "load": loading_lines(manifest),
    }


def share(part: float) -> str:
    """A share of 1 as text: 12.16%, 2.1e-06."""
    return f"{part:.2%}" if part > 1e-4 else f"{part:.1e}"


def size(size_bytes: float) -> str:
    """A number of bytes as text: 13.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def duration(elapsed_s: float) -> str:
    """Seconds as text: 1 h 02 min, 3 min 05 s, 4.2 s."""
    if elapsed_s < 60:
        return f"{elapsed_s:.1f} s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
