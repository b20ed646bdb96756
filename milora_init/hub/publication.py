"""What is uploaded of an output: its files, and those that are written anew for the repository.

A record is rewritten to name the repository instead of local folders; so is the base in an adapter_config.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_init.checkpoint.files import read_json_object
from milora_init.checkpoint.hashing import sha256
from milora_init.errors import OutputError
from milora_init.hub.model_card import (
    PICTURE,
    adapter_card,
    card_data,
    card_text,
    converted_card,
    merged_card,
    plain_card_data,
)
from milora_init.hub.source import is_repository
from milora_init.lora.folder import CONFIG_FILE, adapter_files, read_config
from milora_init.manifest import MANIFEST, Manifest, fingerprint
from milora_init.options import local_path
from milora_init.pictures import plots
from milora_init.records import CONVERTED, MERGED, ConvertResult, MergeResult, Output


@dataclass(frozen=True, slots=True)
class Publication:
    """An output as it is uploaded.

    Attributes:
        record: File name of its record.
        output: The rewritten record.
        contents: The files that are written anew, except the card.
        card_data, card_text: Metadata and text of the model card.
        model, revision: The original model, whose card has the licence; the revision is None for a folder.
        message: Of the commit.
    """

    record: str
    output: Output
    contents: Mapping[str, bytes]
    card_data: Mapping[str, Any]
    card_text: str
    model: str
    revision: str | None
    message: str


def publication(folder: Path, output: Output, repo: str, branch: str | None) -> Publication:
    """What to upload of the output in a folder. Raises OutputError, CheckpointError for a file that was changed."""
    if isinstance(output, Manifest):
        return _of_pair(output, repo, branch)
    model = output.model if output.from_hub else Path(output.model).name
    pair, adapter = _named_elsewhere(output.pair), _named_elsewhere(output.adapter)
    published = dataclasses.replace(output, out=repo, pair=pair, adapter=adapter, model=model, unchanged=False)
    if isinstance(published, MergeResult):
        config = read_json_object(folder / "config.json")
        contents: dict[str, bytes] = {}
        record, text = MERGED, merged_card(published, config, repo)
        message = "A merged model, by milora-init"
    else:
        published, contents = _with_base(folder, published)
        record, text = CONVERTED, converted_card(published, read_config(folder / CONFIG_FILE), repo)
        message = "A LoRA adapter, by milora-init"
    contents[record] = _json(published.content(), indent=1)
    revision = (output.revision or "main") if output.from_hub else None
    return Publication(
        record, published, contents, plain_card_data(published), text, output.model, revision, message
    )  # fmt: skip


def _named_elsewhere(given: str) -> str:
    """What a record names, as it is named outside this machine: a Hub id, and of a folder its last part."""
    is_here = local_path(given).exists()
    return given if is_repository(given.partition("@")[0]) and not is_here else Path(given).name


def _of_pair(manifest: Manifest, repo: str, branch: str | None) -> Publication:
    published = as_published(manifest, repo, branch)
    config_name = adapter_files(manifest.method)[0]
    contents = {config_name: _json(published.adapter, indent=2), MANIFEST: _json(published.to_json(), indent=1)}
    if picture := _picture(published):
        contents[PICTURE] = picture
    if manifest.method.writes_base:
        text = card_text(published, repo, picture=PICTURE in contents)
        message = "A residual base and its adapter, by milora-init"
    else:
        text = adapter_card(published, repo, branch, picture=PICTURE in contents)
        message = "A LoRA adapter before training, by milora-init"
    source = manifest.source
    return Publication(
        MANIFEST, published, contents, card_data(manifest), text, str(source["model"]), source["revision"], message
    )


def _picture(manifest: Manifest) -> bytes | None:
    """The picture beside the card; None without a working matplotlib, and where MILORA_PICTURE is 0."""
    if os.environ.get("MILORA_PICTURE") == "0" or not plots.has_matplotlib():
        return None
    try:
        return plots.report_plot(manifest)
    except ImportError:
        return None


def _with_base(folder: Path, published: ConvertResult) -> tuple[ConvertResult, dict[str, bytes]]:
    """The record and the adapter_config.json with the published name of the original model."""
    if sha256(folder / CONFIG_FILE) != published.hashes[CONFIG_FILE]:
        raise OutputError(f"{folder}: {CONFIG_FILE} was changed", hint=f"milora-init verify {folder}")
    config = {**read_config(folder / CONFIG_FILE), "base_model_name_or_path": published.model}
    content = _json(config, indent=2)
    inputs = dict(published.inputs)
    if isinstance(inputs.get("config"), dict):
        inputs["config"] = {**inputs["config"], "base_model_name_or_path": published.model}
    renamed = dataclasses.replace(
        published,
        inputs=inputs,
        fingerprint=fingerprint(inputs),
        files={**published.files, CONFIG_FILE: len(content)},
        hashes={**published.hashes, CONFIG_FILE: hashlib.sha256(content).hexdigest()},
    )
    return renamed, {CONFIG_FILE: content}


def as_published(manifest: Manifest, repo: str, branch: str | None = None) -> Manifest:
    """The manifest as it stands in the repository, which is where the output is now, and not in somebody's folder.

    The base of an adapter is the repository; that of an adapter of an original model is that model, of a local one the
    name of its folder.
    """
    source = dict(manifest.source)
    if source["revision"] is None:
        source["model"] = Path(source["model"]).name
    adapter_config = {**manifest.adapter}
    if manifest.method.writes_base:
        adapter_config["base_model_name_or_path"] = repo
        if branch:
            adapter_config["revision"] = branch
    else:
        adapter_config["base_model_name_or_path"] = source["model"]
    encoded = _json(adapter_config, indent=2)
    config_name = adapter_files(manifest.method)[0]
    return dataclasses.replace(
        manifest,
        source=source,
        out=repo,
        adapter=adapter_config,
        files={**manifest.files, config_name: len(encoded)},
        hashes={**manifest.hashes, config_name: hashlib.sha256(encoded).hexdigest()},
    )


def _json(content: Mapping[str, Any], *, indent: int) -> bytes:
    return (json.dumps(content, indent=indent) + "\n").encode()
