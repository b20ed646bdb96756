"""Make the report on a run: a table of the weights, the warnings, and Python code that loads the pair.

Everything is computed from the manifest, so that a finished output can be reported again without the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from milora_init.envelope import envelope
from milora_init.manifest import Manifest, WeightRecord
from milora_init.options import local_path
from milora_init.untrusted import printable

LEAK_LIMIT = 0.1  # above it a note is given; see `Rounding.leak`
_LEAK_OF_OTHER_DTYPES = 0.8 * LEAK_LIMIT  # their leak is measured on a sample of the rows
# The largest relative error of one rounding to a dtype: half of its machine epsilon.
_UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """All weights with the same last part of their name, shape and rank.

    Attributes:
        suffix: The last part of the name.
        shape: The shape (m, n) of each weight.
        count: The number of weights.
        rank: The rank of each component.
        energy: Mean share of the component in the squared Frobenius norm.
        leak: The largest part of a component that rounding left in the base.
        rounding_error: The largest distance of base and component from the weight, relative to the weight.
        certificate: The largest certified relative error of a component.
        elapsed_s: Seconds for solving all of them.
        leak_in_nf4: The largest leak if the base were quantised to NF4 (QLoRA); None if it was not measured.
    """

    suffix: str
    shape: tuple[int, int]
    count: int
    rank: int
    energy: float
    leak: float
    rounding_error: float
    certificate: float
    elapsed_s: float
    leak_in_nf4: float | None


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
            rounding_error=max(weight.rounding.error for weight in group),
            certificate=max(component_error(weight) for weight in group),
            elapsed_s=sum(weight.elapsed_s for weight in group),
            leak_in_nf4=_largest_in_nf4(group),
        )
        for (suffix, shape, rank), group in groups.items()
    ]


def _largest_in_nf4(weights: Iterable[WeightRecord]) -> float | None:
    """The largest leak if the residuals were quantised to NF4; None for an older manifest."""
    found = [weight.rounding.leak_if.get("nf4") for weight in weights]
    return max((value for value in found if value is not None), default=None)


def component_error(weight: WeightRecord) -> float:
    """The certified relative error of a component; infinite if it is not unique (the cut falls in a cluster)."""
    error = weight.certificate.component_error
    return math.inf if error is None else error


def warnings(manifest: Manifest) -> list[str]:
    """What can hurt the training or the use of a pair: the notices of the plan, and figures out of range."""
    found = list(manifest.notices)
    inexact = [weight for weight in manifest.weights if weight.rounding.error > _UNIT_ROUNDOFF.get(weight.dtype, 0.0)]
    if inexact and not manifest.inputs.get("nf4"):  # a note gives the error of NF4
        worst = max(inexact, key=lambda weight: weight.rounding.error)
        found.append(
            f"base and component of {worst.module} differ from the weight by {percent(worst.rounding.error)}, more "
            f"than one rounding to {worst.dtype}{_and_more(inexact)}: initialise with --dtype float32"
        )
    affected = [weight for weight in manifest.weights if weight.untrainable]
    if affected:
        found.append(
            f"{counted(sum(w.untrainable for w in affected), 'direction')} of {counted(len(affected), 'weight')} will "
            f"hardly train, because the singular values are near zero; the first weight is {affected[0].module}"
        )
    return found


def notes(manifest: Manifest) -> list[str]:
    """What is worth knowing and does not change the training: how much of the components stayed in the base."""
    if manifest.inputs.get("nf4"):
        error = max(weight.rounding.error for weight in manifest.weights)
        return [f"base and adapter differ from the weights by up to {percent(error)} a weight, which NF4 rounds away"]
    leaking = [weight for weight in manifest.weights if weight.rounding.leak > LEAK_LIMIT]
    if not leaking:
        return []
    worst = max(leaking, key=lambda weight: weight.rounding.leak)
    error = max(weight.rounding.error for weight in manifest.weights)
    dtypes = worst.rounding.leak_if.keys() - {"nf4"}
    leaks = {dtype: _largest_leak_if(dtype, manifest.weights) for dtype in sorted(dtypes)}
    others = [f"--dtype {dtype} ({percent(leak)})" for dtype, leak in leaks.items() if leak < _LEAK_OF_OTHER_DTYPES]
    return [
        f"rounding to {worst.dtype} leaves up to {percent(worst.rounding.leak)} of a component in the base "
        f"({worst.module}{_and_more(leaking)}); the base is frozen, so this does not change the training, and the pair "
        f"computes the original's function within {percent(error)} a weight"
        + (f"; smaller with {' or '.join(others)}" if others else "")
    ]


def counted(number: int, what: str) -> str:
    """A number of things as text: 1 weight, 2 weights."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def _and_more(weights: list[WeightRecord]) -> str:
    more = len(weights) - 1
    return f", and {more} more weight{'s' if more > 1 else ''}" if more else ""


def _largest_leak_if(dtype: str, weights: Iterable[WeightRecord]) -> float:
    """The largest leak of all weights, if they were rounded to this dtype; infinite if one of them overflows."""
    found = [weight.rounding.leak_if.get(dtype) for weight in weights]
    return max(math.inf if value is None else value for value in found)


def loading_lines(manifest: Manifest, branch: str | None = None) -> str:
    """Python code that loads the pair, or an adapter on its original model, for training.

    `branch` is that of the repository, where such an adapter was pushed to another one than `main`.

    Users run this code. Therefore text from a file enters it only as a valid identifier or as a quoted string.
    """
    architecture = str(manifest.source["architecture"])
    auto_builds_other = manifest.source.get("other_class") and not manifest.inputs.get("text_only")
    causal = manifest.adapter["task_type"] == "CAUSAL_LM" and not auto_builds_other
    cls = architecture if architecture.isidentifier() and not causal else "AutoModelForCausalLM"
    # `report` may have been given org/name@revision.
    repo, _, named = manifest.out.partition("@")
    is_at_revision = bool(named) and not local_path(manifest.out).exists()
    out = _quoted(repo if is_at_revision else manifest.out)
    branch = named if is_at_revision else branch
    trust = ", trust_remote_code=True" if manifest.source.get("trust_remote_code") else ""
    if not manifest.method.writes_base:
        model = _quoted(str(manifest.adapter["base_model_name_or_path"]))
        commit = manifest.adapter.get("revision")
        of_commit = f", revision={_quoted(str(commit))}" if commit else ""
        of_branch = f", revision={_quoted(branch)}" if branch else ""
        # Without it PEFT would compute its own factors of every weight first, by a full SVD.
        no_svd = ", low_cpu_mem_usage=True" if manifest.method.init_lora_weights is not True else ""
        return (
            f"from peft import PeftModel\n"
            f"from transformers import {cls}\n\n"
            f'base = {cls}.from_pretrained({model}, dtype="auto"{of_commit}{trust})\n'
            f"model = PeftModel.from_pretrained(base, {out}{of_branch}, is_trainable=True{no_svd})"
        )
    branch = branch or manifest.adapter.get("revision")
    revision = f", revision={_quoted(branch)}" if branch else ""
    more, config, quantised = "", "", ""
    if manifest.inputs.get("nf4"):  # the adapter makes up for the rounding of this format
        more, quantised = ", BitsAndBytesConfig", ", quantization_config=nf4"
        config = 'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")\n'
    return (
        f"from peft import PeftModel\n"
        f"from transformers import {cls}{more}\n\n"
        f"{config}"
        f'base = {cls}.from_pretrained({out}, dtype="auto"{quantised}{revision}{trust})\n'
        f'model = PeftModel.from_pretrained(base, {out}, subfolder="lora", is_trainable=True{revision})'
    )


def _quoted(text: str) -> str:
    """Text as a Python string."""
    return printable(json.dumps(text, ensure_ascii=False))  # JSON's escapes are valid in Python


def run_fields(manifest: Manifest) -> dict[str, Any]:
    """The fields of a run in the JSON of `init` and `report`; see `envelope`."""
    inputs = manifest.inputs
    return {
        "out": manifest.out,
        "fingerprint": manifest.fingerprint,
        "source": manifest.source,
        "warnings": warnings(manifest),
        "notes": notes(manifest),
        "method": manifest.method.name,
        "mode": inputs["mode"],
        "rank": inputs["rank"],
        "alpha": inputs["alpha"],
        "weight_count": len(manifest.weights),
        "bytes": sum(manifest.files.values()),
        "elapsed_s": manifest.elapsed_s,
        "worst_leak": max(weight.rounding.leak for weight in manifest.weights),
        "worst_step_0_error": max(weight.rounding.error for weight in manifest.weights),
        "groups": [_group_json(group) for group in weight_groups(manifest.weights)],
        "adapter_config": dict(manifest.adapter),
        "versions": dict(manifest.versions),
        "load": loading_lines(manifest),
    }


def _group_json(group: WeightGroup) -> dict[str, Any]:
    found = asdict(group)
    certified = found.pop("certificate")
    found["certified"] = certified if math.isfinite(certified) else None
    return {**found, "shape": list(group.shape)}


def report_json(manifest: Manifest) -> dict[str, Any]:
    """The object that `report --json` prints: that of `init`, and the manifest with every weight."""
    content = manifest.to_json()
    return envelope("report", "done", **run_fields(manifest), weights=content["weights"])


def percent(part: float) -> str:
    """A share as text, always in percent: 12%, 0.13%, 0.00021%, 4e-06%."""
    value = 100 * part
    if value == 0:
        return "0%"
    if value >= 9.5:
        return f"{value:.0f}%"
    return f"{value:.2g}%" if value >= 1e-4 else f"{value:.0e}%"


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


def rough(estimate_s: float) -> str:
    """An estimate of seconds as text: about 3 min 05 s, less than 1 s."""
    return f"about {duration(estimate_s)}" if estimate_s >= 1 else "less than 1 s"
