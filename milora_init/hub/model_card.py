"""Write the model card of an output, and the job summary of a CI run, from the manifest.

Both are Markdown that a browser renders. Names and sentences in a manifest can come from a downloaded file, so they are
escaped or written as code: they cannot become links, images or HTML.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from milora_init.lora.peft_versions import PEFT_FOR_EXPERTS, PEFT_FOR_MODULES, TESTED_WITH_MICA
from milora_init.manifest import Manifest
from milora_init.records import CONVERTED, MERGED, ORIGINAL_MODEL, ConvertResult, MergeResult
from milora_init.report import counted, duration, loading_lines, notes, percent, size, warnings, weight_groups
from milora_init.spectra import ScanResult
from milora_init.untrusted import printable

PICTURE = "milora_init.png"
_PICTURE = """
![Heat maps by layer and module: {}]({})
"""
_METHODS = {
    "milora": "[MiLoRA](https://arxiv.org/abs/2406.09044): the minor singular components",
    "pissa": "[PiSSA](https://arxiv.org/abs/2404.02948): the principal singular components",
    "olora-tail": "the directions of the minor singular components, without their singular values "
    "([arXiv 2606.02437](https://arxiv.org/abs/2606.02437))",
    "rlmo": "A has the directions of the r smallest singular values "
    "([RLMO, arXiv 2606.31813](https://arxiv.org/abs/2606.31813))",
    "rlpo": "A has the directions of the r largest singular values "
    "([RLPO, arXiv 2606.31813](https://arxiv.org/abs/2606.31813))",
    "mica": "B has the directions of the r smallest singular values "
    "([MiCA, arXiv 2604.01694](https://arxiv.org/abs/2604.01694))",
    "mid": "the middle singular components",
    "random": "singular components drawn at random",
}
_CITATION = """```bibtex
@inproceedings{wang2025milora,
  title     = {{MiLoRA}: Harnessing Minor Singular Components for Parameter-Efficient {LLM} Finetuning},
  author    = {Wang, Hanqing and Li, Yixia and Wang, Shuo and Chen, Guanhua and Chen, Yun},
  booktitle = {Proceedings of NAACL},
  year      = {2025},
  url       = {https://arxiv.org/abs/2406.09044}
}
```
"""
_PLAIN_NAME = re.compile(r"(?!www\.)[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_MARKUP = re.compile(r"[\\*<>\[\]|&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_MOST_NAMES = 8  # of tensors in a sentence
_MAX_SUMMARY_BYTES = 1 << 20  # GitHub's limit for the summary of one step


def card_data(manifest: Manifest) -> dict[str, Any]:
    """Return the metadata of the card, without the fields that are copied from the card of the original model."""
    tags = ["lora", name if (name := manifest.method.name) in ("milora", "pissa") else "svd"]
    if manifest.method.writes_base:
        tags.append("residual-base")
    model = str(manifest.source["model"])
    data: dict[str, Any] = {"library_name": "peft", "tags": tags}
    if manifest.source["revision"] is not None:  # a local folder has none, and its path is not published
        relation = "finetune" if manifest.method.writes_base else "adapter"
        data |= {"base_model": model, "base_model_relation": relation}
    return data


def card_text(manifest: Manifest, repo: str, *, picture: bool = False) -> str:
    """Return the Markdown of the card for a repository.

    Args:
        manifest: The manifest as it is published, see `hub.upload`.
        repo: Id of the repository.
        picture: Show the file PICTURE, which lies beside the card.
    """
    source = manifest.source
    commit = f" at commit {_code(source['revision'])}" if source["revision"] else ""
    name = _model_name(source)
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

{_settings(manifest)}, residuals in {", ".join(sorted({_name(w.dtype) for w in manifest.weights}))}.

{_for_what(manifest)}

{_weight_table(manifest)}

*energy*: the component's share of the weight's squared norm. *leak*: the part of the component that rounding leaves in
the base. *step-0 error*: the distance of base and component from the weight, relative to the weight. *certified*: a
proven bound of the component's relative error. `milora_init.json` has the figures of every weight, and the SHA-256 of
every file; `milora-init verify` reads them.
{_PICTURE.format("energy, leak, step-0 error, and time to solve", PICTURE) if picture else ""}
{"".join(f"- {_escape(text)}{chr(10)}" for text in [*warnings(manifest), *notes(manifest)])}
## After training

`milora-init merge` makes one plain model of this base and a trained adapter; `milora-init convert` makes a plain LoRA
for the original model.

## Citation

{_CITATION}"""


def adapter_card(manifest: Manifest, repo: str, branch: str | None = None, *, picture: bool = False) -> str:
    """The card's text of an adapter of an original model, for the branch of the repository that it is written for.

    Args:
        manifest: The manifest as it is published, see `hub.upload`.
        repo: Id of the repository.
        branch: Its branch; None for `main`.
        picture: Show the file PICTURE, which lies beside the card.
    """
    source, method = manifest.source, manifest.method
    commit = f" at commit {_code(source['revision'])}" if source["revision"] else ""
    name = _model_name(source)
    local = "" if source["revision"] else f"\nReplace {_code(source['model'])} by the place of that model.\n"
    if method.init_lora_weights is True:
        peft = PEFT_FOR_EXPERTS if manifest.adapter.get("target_parameters") else PEFT_FOR_MODULES
        needs = f"It needs PEFT {peft} or later."
    else:
        needs = (
            f"It needs a PEFT that knows `init_lora_weights={_quoted(str(method.init_lora_weights))}`, such as "
            f"{TESTED_WITH_MICA}, which freezes B."
        )
    return f"""
# {_escape(repo.rpartition("/")[2])}

A LoRA adapter for {name}{commit}, not trained yet. {_METHODS[method.name]}.

The model itself is not changed, and B A is zero before training: the adapter on its model computes what the model
computes. PEFT trains {method.trained}.

## Load it

```python
{loading_lines(manifest, branch)}
```
{local}
{needs} For DPO or GRPO the model with the adapter switched off is the reference.

## How it was made

{_settings(manifest)}: {_code(method.formulas)} for each weight W = U S V^T.

{_for_what(manifest)}

{_weight_table(manifest)}

*energy*: the share of these triplets in the weight's squared norm. *certified*: a proven bound of the relative error of
U S V^T. `milora_init.json` has the figures of every weight, and the SHA-256 of every file; `milora-init verify` reads
them.
{_PICTURE.format("energy, and time to solve", PICTURE) if picture else ""}
{"".join(f"- {_escape(text)}{chr(10)}" for text in [*warnings(manifest), *notes(manifest)])}
## After training

The trained adapter is a plain LoRA of the same model. `milora-init merge` merges it, `milora-init convert` copies it
or cuts its rank.

## Citation

{_CITATION}"""


def _model_name(source: Mapping[str, Any]) -> str:
    """The original model in a sentence: a link to the Hub, or that it is local."""
    if not source["revision"]:
        return "a local model"
    model = str(source["model"])
    is_safe_link = all(_PLAIN_NAME.fullmatch(part) for part in model.split("/"))
    return f"[{model}](https://huggingface.co/{model})" if is_safe_link else _code(model)


def _settings(manifest: Manifest) -> str:
    """Version and options of the run, for a card."""
    inputs = manifest.inputs
    return (
        f"`milora-init` {_name(manifest.versions['milora_init'])}: method {manifest.method.name}, mode "
        f"{_code(inputs['mode'])}, rank {_name(inputs['rank'])}, alpha {_name(inputs['alpha'])}"
        f"{', rsLoRA' if inputs['rslora'] else ''}, dropout {_name(manifest.adapter['lora_dropout'])} for training"
    )


def _for_what(manifest: Manifest) -> str:
    """What the method is for, and what others report of it."""
    return f"The method is for {manifest.method.use}. Reported by others: {manifest.method.reported}"


def plain_card_data(record: MergeResult | ConvertResult) -> dict[str, Any]:
    """The metadata of a merged model's or a converted adapter's card, without licence and language."""
    adapter = isinstance(record, ConvertResult)
    data: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    data["tags"] = ["lora", "milora-init"] if adapter else ["milora-init"]
    if record.from_hub:  # and not a folder of somebody's
        data |= {"base_model": record.model, "base_model_relation": "adapter" if adapter else "finetune"}
    return data


def merged_card(record: MergeResult, config: Mapping[str, Any], repo: str) -> str:
    """The card's text of a merged model, for the repository that it is written for."""
    name = _original(record)
    tuned = f"A fine-tuned {name}" if record.from_hub else f"{name[0].upper()}{name[1:]}, fine-tuned"
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else ""
    remote = bool(config.get("auto_map"))
    causal = str(architecture).endswith(("ForCausalLM", "LMHeadModel"))
    cls = architecture if _is_class(architecture) and not causal and not remote else "AutoModelForCausalLM"
    trusted = ", trust_remote_code=True" if remote else ""
    what = (
        f"{name} again, up to rounding: the initial adapter was merged into its residual base."
        if record.initial
        else f"{tuned}: an adapter that was trained on a residual base was merged into that base."
    )
    added_to = "residual"
    if record.inputs.get("base") == ORIGINAL_MODEL:
        added_to = "W"
        again = f"{name} again, unchanged: the initial adapter, which adds nothing, was merged into it."
        what = again if record.initial else f"{tuned}: a LoRA adapter was merged into it."
    return f"""
# {_escape(repo.rpartition("/")[2])}

{what}

It is a plain model. It needs neither PEFT nor an adapter.

## Load it

```python
from transformers import {cls}

model = {cls}.from_pretrained({_quoted(repo)}, dtype="auto"{trusted})
```

## How it was made

`milora-init merge` {_name(record.inputs.get("merge", ""))}, from {_inputs(record)}: \
W' = round({added_to} + scale * B A) in {counted(record.modules, "weight")}. {_other_tensors(record)}

`{MERGED}` has the SHA-256 of every file; `milora-init verify` reads them.
"""


def _other_tensors(record: MergeResult) -> str:
    """A sentence on the tensors without merged factors."""
    names = [_code(name) for name in record.retrained]
    retrained = (
        f"Retrained: {', '.join(names[:_MOST_NAMES])}{' and more' * (len(names) > _MOST_NAMES)}. " if names else ""
    )
    dtype = record.inputs.get("dtype")
    rest = f"cast to {_code(dtype)}" if dtype else "the original's, byte for byte"
    return f"{retrained}All other tensors are {rest}."


def converted_card(record: ConvertResult, config: Mapping[str, Any], repo: str) -> str:
    """The card's text of a converted adapter, for the repository that it is written for."""
    name = _original(record)
    cls = _AUTO_CLASSES.get(str(config.get("task_type")), "AutoModel")
    ranks = sorted({module.rank for module in record.modules})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    worst = max(module.lost for module in record.modules)
    lost = f" At most {worst:.2e} of a module's update was lost (Frobenius norm)." if record.cut else ""
    of_commit = f", revision={_quoted(record.revision)}" if record.revision else ""
    local = "" if record.from_hub else f"\nReplace {_code(record.model)} by the place of the original model.\n"
    how = "the adapter was trained on a residual base, and residual + s B A = W + s [B, -B0] [A; A0]."
    not_on_base = " Do not load it on a residual base."
    if record.inputs.get("base") == ORIGINAL_MODEL:
        how = "the adapter was trained on the original model, and copied" + (", cut to a rank." if record.cut else ".")
        not_on_base = ""
    load = f"""## Load it

```python
from peft import PeftModel
from transformers import {cls}

base = {cls}.from_pretrained({_quoted(record.model)}, dtype="auto"{of_commit})
model = PeftModel.from_pretrained(base, {_quoted(repo)})
```"""
    if record.serve:
        serve = dataclasses.replace(record, out=repo).serve
        load = (
            f"## Serve it\n\nIts tensors are in the form that {record.form} reads.\n\n```bash\n{printable(serve)}\n```"
        )
    notices = "".join(f"\n- {_escape(line)}" for line in record.notices)
    return f"""
# {_escape(repo.rpartition("/")[2])}

A LoRA adapter for {name}: {rank} in {len(record.modules)} modules.{lost}

It is a plain LoRA of the original model.{not_on_base}

{load}
{notices}{local}
## How it was made

`milora-init convert` {_name(record.inputs.get("convert", ""))}, from {_inputs(record)}: \
{how}

`{CONVERTED}` has the SHA-256 of every file; `milora-init verify` reads them.
"""


_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}  # fmt: skip


def _inputs(record: MergeResult | ConvertResult) -> str:
    """Return the names of the pair and of the adapter."""
    return f"{_code(record.pair)} and {_code(record.adapter)}"


def _original(record: MergeResult | ConvertResult) -> str:
    """The original model in a sentence: a link to the Hub, or that it is local."""
    if not record.from_hub:
        return "a local model"
    linked = all(_PLAIN_NAME.fullmatch(part) for part in record.model.split("/"))
    name = f"[{record.model}](https://huggingface.co/{record.model})" if linked else _code(record.model)
    return f"{name} at commit {_code(record.revision)}" if record.revision else name


def _quoted(value: str) -> str:
    """Text as a Python string; JSON's escapes are valid in Python."""
    return printable(json.dumps(value, ensure_ascii=False))


def _is_class(value: object) -> bool:
    return isinstance(value, str) and value.isidentifier() and value.isascii()


def write_step_summary(manifest: Manifest, exceeded: Sequence[str] = ()) -> None:
    """Append `step_summary` to the file that GITHUB_STEP_SUMMARY names; do nothing if the variable is not set.

    A summary that cannot be written is not an error. GitHub drops a summary that is too long, so it is cut.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with suppress(OSError), Path(path).open("a", encoding="utf-8") as file:
            free_bytes = max(0, _MAX_SUMMARY_BYTES - 1 - file.tell())
            file.write(step_summary(manifest, exceeded).encode()[:free_bytes].decode(errors="ignore"))


def step_summary(manifest: Manifest, exceeded: Sequence[str] = ()) -> str:
    """Return the Markdown that a CI job shows about a run; `exceeded` says which limits of `--fail-on` it exceeds."""
    remarks = "".join(f"- {_escape(text)}\n" for text in [*exceeded, *warnings(manifest), *notes(manifest)])
    files = size(sum(manifest.files.values()))
    return f"""### milora-init: {_escape(manifest.out)}

{counted(len(manifest.weights), "weight")} of {_code(manifest.source["model"])}, method {manifest.method.name}, \
mode {_code(manifest.inputs["mode"])}, rank \
{_name(manifest.inputs["rank"])}: {files} in {duration(manifest.elapsed_s)}. \
Fingerprint {_code(manifest.fingerprint[:12])}.

{_weight_table(manifest)}

{remarks}
```python
{loading_lines(manifest)}
```
"""


def scan_summary(result: ScanResult) -> str:
    """Return the Markdown of a scan: a table with a row for each group of weights."""
    rank = result.rank
    lines = [
        f"### Singular spectra of {_code(result.model)}",
        "",
        f"{counted(len(result.weights), 'weight')}, rank {rank}, scanned in {duration(result.elapsed_s)}.",
        "",
        "| module | shape | weights | s_max | condition | stable rank | effective rank "
        f"| energy of the {rank} smallest | energy of the {rank} largest | leak (estimate) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in result.groups():
        shares = ["" if v is None else percent(v) for v in (group.energy_min, group.energy_max, group.leak)]
        condition = "infinite" if group.condition is None else f"{group.condition:.2g}"
        lines.append(
            f"| {_name(group.suffix)} | {group.shape[0]} x {group.shape[1]} | {group.count} | {group.s_max:.3g} "
            f"| {condition} | {group.stable_rank:.3g} | {group.effective_rank:.3g} | {' | '.join(shares)} |"
        )
    lines += ["", *(f"- {_escape(note)}" for note in result.notes)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _weight_table(manifest: Manifest) -> str:
    """Return a table with a row for each group of weights; without a base, nothing was rounded."""
    columns = ["module", "shape", "weights", "rank", "energy", "leak", "step-0 error", "certified"]
    rows = [
        [
            _name(group.suffix), f"{group.shape[0]} x {group.shape[1]}", str(group.count), str(group.rank),
            percent(group.energy), percent(group.leak), percent(group.rounding_error), f"{group.certificate:.0e}",
        ]
        for group in weight_groups(manifest.weights)
    ]  # fmt: skip
    if not manifest.method.writes_base:
        columns, *rows = ([*line[:5], line[7]] for line in (columns, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows))


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
