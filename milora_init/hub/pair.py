"""Find what milora-init or a trainer wrote: a local folder, or a repository on the Hub, `org/name[@REVISION]`.

Of a repository only the record is fetched at first, which fixes the commit, and then the files that it names.
huggingface_hub's cache keeps them, so a second call needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from milora_init.errors import OutputError, PlanError, UsageError
from milora_init.hub.errors import hub_errors
from milora_init.hub.source import is_repository, require_no_address, tell_of_cache, why_not_reached
from milora_init.lora.folder import CONFIG_FILE, WEIGHTS_FILE, adapter_files
from milora_init.manifest import MANIFEST, Manifest
from milora_init.options import clean_token, local_path
from milora_init.records import CONVERTED, MERGED, RECORDS, Output, require_output, require_pair

_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)
_NO_FOLDER = "name a folder that milora-init wrote, or its Hub id: org/name"
_TRAINED = "name the folder that the trainer saved"


@dataclass(slots=True)
class _Repository:
    """A repository to read; `failure` is why the Hub does not answer: then only the cache is read."""

    repo: str
    revision: str | None
    cache_dir: str | None
    token: str | None
    failure: Exception | None = field(default=None, init=False)

    def fetch_first(self, names: Iterable[str], otherwise: OutputError) -> Path:
        """The snapshot folder with the first of these files that the repository has. Raises HubError, `otherwise`."""
        absent: EntryNotFoundError | None = None
        with hub_errors(self.repo, self.revision):
            # Asked once: without a network `hf_hub_download` would try for a minute.
            self.failure = why_not_reached(self.repo, self.revision, clean_token(self.token))
            if isinstance(self.failure, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
                raise self.failure
            for name in names:
                try:
                    snapshot = self._download(name, self.revision).parent
                except EntryNotFoundError as error:
                    absent = error
                    continue
                if self.failure:
                    tell_of_cache(self.repo, snapshot, self.failure)
                return snapshot
            if isinstance(absent, LocalEntryNotFoundError):
                raise self._cause(absent)
        raise otherwise

    def fetch(self, snapshot: Path, names: Iterable[str]) -> None:
        """Fetch files of the snapshot's commit. What the repository lacks is left out. Raises HubError."""
        with hub_errors(self.repo, self.revision):
            for name in names:
                try:
                    self._download(name, snapshot.name)
                except LocalEntryNotFoundError as error:
                    raise self._cause(error) from None
                except EntryNotFoundError:
                    continue

    def _cause(self, error: LocalEntryNotFoundError) -> Exception:
        """Why a file is neither on the Hub nor in the cache."""
        return self.failure if isinstance(self.failure, HfHubHTTPError | OfflineModeIsEnabled) else error

    def _download(self, name: str, revision: str | None) -> Path:
        return Path(
            hf_hub_download(
                self.repo, name, revision=revision, cache_dir=self.cache_dir, token=clean_token(self.token),
                local_files_only=self.failure is not None,
            )
        )  # fmt: skip


def locate_output(given: str, *, cache_dir: str | None = None, token: str | None = None) -> Path:
    """The folder of an output of any kind; of a Hub id, the snapshot with all files that its record names.

    Raises:
        UsageError: A folder that is not there.
        HubError: A Hub id that is not there; no permission, or no connection and not in the cache.
        OutputError: A repository that is no output, or whose record cannot be read.
    """
    found = _find(given, cache_dir=cache_dir, token=token)
    if isinstance(found, Path):
        return found
    snapshot = _fetch_record(found, given)
    output = require_output(snapshot, given)
    found.fetch(snapshot, dict.fromkeys((*output.files, *_adapter_files(output))))
    return snapshot


def locate_pair(
    given: str,
    *,
    only: Literal["record", "adapter", "adapter and config"] | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder of a pair, as `locate_output`; `only` is what to fetch of a Hub id: the manifest, or the adapter and
    config.json too.

    A local folder is not read here.

    Raises:
        UsageError, HubError, OutputError: As `locate_output`; also a repository of a merged model or an adapter alone.
    """
    found = _find(given, cache_dir=cache_dir, token=token)
    if isinstance(found, Path):
        return found
    snapshot = _fetch_record(found, given)
    manifest = require_pair(snapshot, given)
    if only != "record":
        more = ("config.json",) if only == "adapter and config" else () if only else tuple(manifest.files)
        found.fetch(snapshot, dict.fromkeys((*more, *_adapter_files(manifest))))
    return snapshot


def locate_adapter(given: str, *, cache_dir: str | None = None, token: str | None = None) -> Path:
    """The folder of a trained adapter; of a Hub id, the snapshot with its config and weights.

    Raises:
        UsageError: A folder that is not there.
        PlanError: A model, a pair or a converted adapter, which no pair can be used with.
        HubError: A Hub id that is not there; no permission, or no connection and not in the cache.
    """
    found = _find(given, name="--adapter", hint=_TRAINED, cache_dir=cache_dir, token=token)
    if isinstance(found, Path):
        folder = found
    else:
        no_adapter = OutputError(f"{given} has no {CONFIG_FILE}: it is no adapter", hint=_TRAINED)
        folder = found.fetch_first([CONFIG_FILE], no_adapter)
        found.fetch(folder, [WEIGHTS_FILE, CONVERTED])
    if not (folder / CONFIG_FILE).exists() and (folder / "adapter" / CONFIG_FILE).is_file():
        raise UsageError(f"{given} is not the adapter", hint=f"it is in that folder: --adapter {given}/adapter")
    kinds = [(MERGED, "a merged model"), (CONVERTED, "a converted adapter")]
    if not (folder / CONFIG_FILE).exists():
        kinds += [(MANIFEST, "a pair"), ("config.json", "a model")]
    for file, what in kinds:
        if (folder / file).is_file():
            raise PlanError(f"{given} is {what}, not the adapter that a trainer saved", hint=_TRAINED)
    return folder


def _adapter_files(output: Output) -> tuple[str, ...]:
    """The adapter's files in an output; none in a merged model, and those of a converted adapter are in its record."""
    return adapter_files(output.method) if isinstance(output, Manifest) else ()


def _find(
    given: str, *, name: str = "PAIR", hint: str = _NO_FOLDER, cache_dir: str | None, token: str | None
) -> Path | _Repository:
    if not given:  # such as an unset variable of a shell
        raise UsageError(f"{name} is empty", hint="name a folder")
    require_no_address(given)
    folder = local_path(given)
    if folder.is_dir():
        return folder
    repo, at, revision = given.partition("@")
    is_named = is_repository(repo) and (not at or _REVISION.fullmatch(revision))
    if folder.exists() or not is_named:
        raise UsageError.no_folder(given, folder, hint=hint)
    return _Repository(repo, revision or None, cache_dir, token)


def _fetch_record(repository: _Repository, given: str) -> Path:
    no_output = OutputError(
        f"{given} is no output of milora-init: the repository has none of {', '.join(RECORDS)}",
        hint="name a repository that `milora-init push` wrote",
    )
    return repository.fetch_first(RECORDS, no_output)
