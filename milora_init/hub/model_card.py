"""Write the model card of an output, and the job summary of a CI run, from the manifest.

Both are Markdown that a browser renders. Names and sentences in a manifest can come from a downloaded file, so they are
escaped or written as code: they cannot become links, images or HTML.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from milora_init.lora.peft_versions import PEFT_FOR_EXPERTS, PEFT_FOR_MODULES
from milora_init.manifest import Manifest
from milora_init.report import duration, loading_lines, notes, percent, size, warnings, weight_groups
from milora_init.untrusted import printable

_METHODS = {
    "milora": "[MiLoRA](https://arxiv.org/abs/2406.09044): the minor singular components",
    "pissa": "[PiSSA](https://arxiv.org/abs/2404.02948): the principal singular components",
    "olora-tail": "the directions of the minor singular components, without their singular values "
    "([arXiv 2606.02437](https://arxiv.org/abs/2606.02437))",
    "mid": "the middle singular components",
    "random": "singular components drawn at random",
}
_PLAIN_NAME = re.compile(r"(?!www\.)[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_MARKUP = re.compile(r"[\\*<>\[\]|&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_MAX_SUMMARY_BYTES = 1 << 20  # GitHub's limit for the summary of one step


def card_data(manifest: Manifest) -> dict[str, Any]:
    """Return the metadata of the card, without the fields that are copied from the card of the original model."""
    tags = ["lora", name if (name := manifest.method.name) in ("milora", "pissa") else "svd", "residual-base"]
    model = str(manifest.source["model"])
    data: dict[str, Any] = {"library_name": "peft", "tags": tags}
    if manifest.source["revision"] is not None:  # a local folder has none, and its path is not published
        data |= {"base_model": model, "base_model_relation": "finetune"}
    return data


def card_text(manifest: Manifest, repo: str) -> str:
    """Return the Markdown of the card for a repository.

    Args:
        manifest: The manifest as it is published, see `hub.upload`.
        repo: Id of the repository.
    """
    inputs, source = manifest.inputs, manifest.source
    commit = f" at commit {_code(source['revision'])}" if source["revision"] else ""
    model = str(source["model"])
    is_safe_link = all(_PLAIN_NAME.fullmatch(part) for part in model.split("/"))
    model_link = f"[{model}](https://huggingface.co/{model})" if is_safe_link else _code(model)
    name = model_link if source["revision"] else "a local model"
    peft = PEFT_FOR_EXPERTS if manifest.adapter.get("target_parameters") else PEFT_FOR_MODULES
    return f"""
# {_escape(repo.rpartition("/")[2])}

A residual base and the LoRA adapter that completes it, both made from {name}{commit}, ready for training.
Each targeted weight W was taken apart: scale * B A is in `lora/`, W - scale * B A is the base.
What was taken out: {_METHODS[manifest.method.name]}.

> **The base alone is not the original model.** Always load it together with the adapter in `lora/`, or one trained from
> it. The adapter fits no other base.

## Load it

```python
{loading_lines(manifest)}
```

It needs PEFT {peft} or later. Before training, the pair computes what {name} computes, up to rounding.

For DPO or GRPO the reference model is the original, not this base with its adapter switched off.

## How it was made

`milora-init` {_name(manifest.versions["milora_init"])}: method {manifest.method.name}, mode {_code(inputs["mode"])}, \
rank {_name(inputs["rank"])}, \
alpha {_name(inputs["alpha"])}{", rsLoRA" if inputs["rslora"] else ""}, residuals in \
{", ".join(sorted({_name(w.dtype) for w in manifest.weights}))}, \
dropout {_name(manifest.adapter["lora_dropout"])} for training.

{_weight_table(manifest)}

*energy*: the component's share of the weight's squared norm. *leak*: the part of the component that rounding leaves in
the base. *step-0 error*: the distance of base and component from the weight, relative to the weight. *certified*: a
proven bound of the component's relative error. `milora_init.json` has the figures of every weight, and the SHA-256 of
every file; `milora-init verify` reads them.

{"".join(f"- {_escape(text)}{chr(10)}" for text in [*warnings(manifest), *notes(manifest)])}
## After training

`milora-init merge` makes one plain model of this base and a trained adapter; `milora-init convert` makes a plain LoRA
for the original model.

## Citation

```bibtex
@inproceedings{{wang2025milora,
  title     = {{{{MiLoRA}}: Harnessing Minor Singular Components for Parameter-Efficient {{LLM}} Finetuning}},
  author    = {{Wang, Hanqing and Li, Yixia and Wang, Shuo and Chen, Guanhua and Chen, Yun}},
  booktitle = {{Proceedings of NAACL}},
  year      = {{2025}},
  url       = {{https://arxiv.org/abs/2406.09044}}
}}
```
"""


def write_step_summary(manifest: Manifest) -> None:
    """Append `step_summary` to the file that GITHUB_STEP_SUMMARY names; do nothing if the variable is not set.

    A summary that cannot be written is not an error. GitHub drops a summary that is too long, so it is cut.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with suppress(OSError), Path(path).open("a", encoding="utf-8") as file:
            free_bytes = max(0, _MAX_SUMMARY_BYTES - 1 - file.tell())
            file.write(step_summary(manifest).encode()[:free_bytes].decode(errors="ignore"))


def step_summary(manifest: Manifest) -> str:
    """Return the Markdown that a CI job shows about a run."""
    remarks = "".join(f"- {_escape(text)}\n" for text in [*warnings(manifest), *notes(manifest)])
    files = size(sum(manifest.files.values()))
    return f"""### milora-init: {_escape(manifest.out)}

{len(manifest.weights)} weights of {_code(manifest.source["model"])}, method {manifest.method.name}, \
mode {_code(manifest.inputs["mode"])}, rank \
{_name(manifest.inputs["rank"])}: {files} in {duration(manifest.elapsed_s)}. \
Fingerprint {_code(manifest.fingerprint[:12])}.

{_weight_table(manifest)}

{remarks}
```python
{loading_lines(manifest)}
```
"""


def _weight_table(manifest: Manifest) -> str:
    """Return a table with a row for each group of weights."""
    lines = [
        "| module | shape | weights | rank | energy | leak | step-0 error | certified |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {_name(group.suffix)} | {group.shape[0]} x {group.shape[1]} | {group.count} | {group.rank} "
        f"| {percent(group.energy)} | {percent(group.leak)} | {percent(group.rounding_error)} "
        f"| {group.certificate:.0e} |"
        for group in weight_groups(manifest.weights)
    ]
    return "\n".join(lines)


def _code(value: object) -> str:
    """Return text as a code span, in which Markdown has no markup; it may be in a table."""
    text = printable(str(value)).replace("`", "'").replace("|", "\\x7c")
    return f"`{text}`" if text.strip() else ""


def _name(value: object) -> str:
    """Return a name or a number unchanged if it has no markup, and as a code span otherwise."""
    return str(value) if _PLAIN_NAME.fullmatch(str(value)) else _code(value)


def _escape(text: str) -> str:
    """Return one line of text with its markup escaped, except code spans."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))
