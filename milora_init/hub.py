"""The Hub: the only file that touches the network.

Everything goes through huggingface_hub: its cache, its resuming downloads, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download

from milora_init.checkpoint import (
    PICKLE_INDEX,
    PICKLE_SINGLE,
    SAFETENSORS_INDEX,
    SAFETENSORS_SINGLE,
    WEIGHT_SUFFIXES,
)
from milora_init.errors import HubError


def fetch(model: str, *, revision: str | None, cache_dir: str | None, token: str | None) -> Path:
    """The snapshot of a model in the local cache; what is missing there is downloaded.

    The side files come first and fix the commit, which the folder is named after; then, of that commit, the weights
    that transformers would load and no other form of them. Without a way to the Hub, the cache is taken as it is.

    Raises:
        HubError: No such model or revision, no permission, no way to the Hub and nothing in the cache.
    """
    try:
        side = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]
        folder = Path(
            snapshot_download(model, revision=revision, cache_dir=cache_dir, token=token, ignore_patterns=side)
        )
        for single, index in ((SAFETENSORS_SINGLE, SAFETENSORS_INDEX), (PICKLE_SINGLE, PICKLE_INDEX)):
            names = _shards(folder / index, single)
            # Asked only for what is missing: a complete cache must serve without a network.
            if not all((folder / name).is_file() for name in names):
                # Numbered folders are sentence-transformers' own; their weights are side files of ours.
                patterns = [*names, "[0-9]_*/*"]
                snapshot_download(
                    model, revision=folder.name, cache_dir=cache_dir, token=token, allow_patterns=patterns
                )
            if (folder / names[0]).is_file():
                break
        return folder
    except hub.GatedRepoError as error:
        hint = f"accept its terms at https://huggingface.co/{model}, then `hf auth login`"
        raise HubError(f"{model} is gated", hint=hint) from error
    except hub.RevisionNotFoundError as error:
        raise HubError(f"{model} has no revision {revision!r}", hint="name a branch, a tag or a commit") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise HubError(
            f"{model!r} is neither a folder here nor a model on the Hub that this token may see",
            hint="check the name; for a private model `hf auth login`, or set HF_TOKEN",
        ) from error
    except hub.LocalEntryNotFoundError as error:
        what = repr(model) if revision is None else f"{model!r} at revision {revision!r}"
        raise HubError(
            f"{what} is neither a folder here nor in the local cache, and the Hub cannot be reached",
            hint=f"name an existing folder, or, with a network, fetch it first: hf download {model}",
        ) from error
    except Exception as error:  # huggingface_hub lets its HTTP library's errors through, and changes that library
        reason = " ".join(str(error).split())[:300]
        raise HubError(f"the Hub failed over {model}: {reason}", hint="try again; what was fetched is kept") from error


def _shards(index: Path, single: str) -> list[str]:
    if not index.is_file():
        return [single]
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError):
        return [single]  # a broken index is named where checkpoints are opened
