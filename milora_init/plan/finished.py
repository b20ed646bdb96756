"""Answer a request that was finished before, or that an earlier output refuses, without torch and transformers.

It takes half a second instead of the seconds that building the model class takes. Whatever is not certain here is left
to the full plan: `run.output_folder` compares the same fingerprint again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora_init import __version__
from milora_init.checkpoint.folder import Checkpoint, RemoteFiles, open_model
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.quantisation import HF_QUANT_CONFIG
from milora_init.checkpoint.side_files import side_files
from milora_init.errors import MiloraError, OutputError
from milora_init.manifest import WORK_FOLDER, Manifest, read_manifest
from milora_init.methods import recorded_method
from milora_init.options import InitOptions, local_path
from milora_init.untrusted import path_inside


def finished_output(options: InitOptions, folder: Path, remote: RemoteFiles | None) -> Manifest | None:
    """The manifest of `options.out` if the same request was finished there; None if that is not certain.

    Args:
        options: The request.
        folder: The folder of the model, or its snapshot in the Hub's cache.
        remote: What the Hub knows of the model.

    Raises:
        OutputError: The folder holds the output of another request, or a file of it has another size.
    """
    out = local_path(options.out)
    if options.overwrite or options.push_to_hub or (out / WORK_FOLDER).exists():
        return None
    try:
        manifest = read_manifest(out)
        if manifest is None or out.resolve() == folder.resolve():
            return None
        inputs = _known_inputs(options, folder, remote)
    except (MiloraError, OSError):
        return None  # the full plan raises it, with the checks that come before it
    if any(manifest.inputs.get(name) != value for name, value in inputs.items()):
        raise another_request(out, manifest.inputs, inputs)
    if dict(manifest.request) != request(options):
        return None  # the same weights may be meant in other words
    require_intact(out, manifest.files)
    return manifest


def request(options: InitOptions) -> dict[str, Any]:
    """The options that decide the output together with the model's structure, in a form that JSON keeps."""
    return {
        "target": None if options.target is None else list(options.target),
        "exclude": list(options.exclude),
        "rank_pattern": dict(options.rank_pattern),
        "alpha_pattern": dict(options.alpha_pattern),
        "dropout": options.dropout,
        "task_type": options.task_type,
        "trust_remote_code": options.trust_remote_code,
    }


def _known_inputs(options: InitOptions, folder: Path, remote: RemoteFiles | None) -> dict[str, Any]:
    """Those entries of `Plan.inputs` that need no model class."""
    checkpoint = open_model(folder, remote)
    copied = copied_side_files(checkpoint) if options.effective_method.writes_base else ()
    return {
        "version": __version__,
        "source": dict(checkpoint.digest),
        "side_files": {name: sha256(folder / name) for name in copied},
        **option_inputs(options),
    }


def copied_side_files(checkpoint: Checkpoint) -> list[str]:
    """The files that are copied from the model's folder, see `side_files`; not ModelOpt's file on its quantisation."""
    return [name for name in side_files(checkpoint.folder) if name != HF_QUANT_CONFIG or not checkpoint.quantisation]


def option_inputs(options: InitOptions) -> dict[str, Any]:
    """The entries of `Plan.inputs` that are options as they were given."""
    return {
        "rank": options.rank,
        "method": options.effective_method.name,
        "mode": options.effective_method.mode,
        "alpha": options.lora_alpha,
        "rslora": options.rslora,
        "text_only": options.text_only,
        "dtype": options.dtype,
        "base": options.base,
        "nf4": options.nf4,
        "seed": options.seed,
    }


def another_request(
    out: Path, recorded: Mapping[str, Any], inputs: Mapping[str, Any], *, may_replace: bool = True
) -> OutputError:
    """The error for a folder with the output of another request: it names the inputs that differ from the recorded.

    `may_replace` is False for a part, which excludes --overwrite.
    """
    changed = [name for name, value in inputs.items() if recorded.get(name) != value]
    named = [name for name in changed if name != "config"] or changed  # the config follows from the other inputs
    differences = "; ".join(_difference(name, recorded.get(name), inputs[name]) for name in named)
    hint = "choose another --out, or replace it with --overwrite"
    earlier, now = recorded_method(recorded), recorded_method(inputs)
    if not may_replace or (earlier and now and earlier.writes_base != now.writes_base):
        hint = "choose another --out, or remove the folder"  # --overwrite replaces no pair by an adapter alone
    return OutputError(f"{out} holds the output of another request: {differences}", hint=hint)


def require_intact(out: Path, files: Mapping[str, int], *, may_replace: bool = True) -> None:
    """Raise OutputError unless every file of a finished output is there with its size; see `another_request`."""
    for name, size_bytes in files.items():
        try:
            path = path_inside(out, name)
        except ValueError as error:
            raise OutputError(f"--out {out}: {error}", hint="remove the link, or choose another --out") from error
        if not path.is_file() or path.stat().st_size != size_bytes:
            raise OutputError(
                f"{out} was finished, but {name} has since been changed or removed",
                hint="make it again with --overwrite" if may_replace else "remove the folder, and make it again",
            )


_IN_WORDS: Mapping[str, str] = {  # inputs of merge and convert whose values are hashes, or tables of many modules
    "adapter": "it was made of another adapter",
    "initial": "it was made of another initial adapter",
    "scales": "the scales of the adapter differ",
    "config": "the config of the adapter differs",
    "tokenizer": "the tokenizer differs",
}


def _difference(key: str, before: Any, now: Any) -> str:
    """What changed in one of the inputs, as text."""
    if key in _IN_WORDS:
        return _IN_WORDS[key]
    if key == "source" and isinstance(now, str):
        return "it was made of another pair"
    if key not in ("source", "side_files"):
        return f"{key} was {_short(before)}, now {_short(now)}"
    if isinstance(before, dict) and isinstance(now, dict):
        first = min(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        return f"the model's files differ, {first} first"
    return "the model's files differ"


def _short(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, str) and len(value) > 60:
        return json.dumps(f"{value[:57]}...")
    text = json.dumps(value)
    return text if len(text) <= 62 else f"{text[:59]}..."
