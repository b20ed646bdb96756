"""Push an output to a Hub repository: the base at the root, the adapter in `lora/`.

Large files are uploaded first, by their hash, so an interrupted push does not send them again. One commit then makes
them visible, so nobody sees half a model. In the uploaded adapter_config.json the base is the repository; the local
file keeps the local path.

To save disk space, shards can be pushed one by one while the run continues. Each is a commit then, and config.json
comes last, as on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, metadata_load
from huggingface_hub.hf_api import RepoFile

from milora_init.checkpoint.folder import SAFETENSORS_INDEX
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.side_files import WEIGHT_SUFFIXES
from milora_init.envelope import Status, envelope
from milora_init.errors import OutputError, PlanError, UsageError
from milora_init.hub.errors import hub_errors
from milora_init.hub.publication import Publication, as_published, publication
from milora_init.json_fields import read_object
from milora_init.lora.folder import LORA_CONFIG, LORA_WEIGHTS
from milora_init.manifest import MANIFEST, MOST_MANIFEST_BYTES, Manifest, require_inside, require_manifest
from milora_init.options import clean_token, require_repository
from milora_init.records import RECORDS, Output, require_output
from milora_init.result import Result

_FINISH = ("config.json", SAFETENSORS_INDEX, MANIFEST, LORA_CONFIG, LORA_WEIGHTS)
_BEGUN = "unfinished-by-milora-init"  # in a repository whose shards are pushed one by one
_OF_THE_SOURCE = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Published(Result):
    """What was pushed.

    Attributes:
        repo, url: The repository and its address.
        commit: The commit that has the output.
        files: How many files were sent or removed.
        unchanged: Whether the repository had the same output before.
    """

    repo: str
    url: str
    commit: str
    files: int
    unchanged: bool = False

    def summary(self) -> Mapping[str, object]:
        return {"status": "unchanged" if self.unchanged else "done", "url": self.url, "commit": self.commit[:12]}

    def to_json(self) -> dict[str, Any]:
        status: Status = "unchanged" if self.unchanged else "done"
        return envelope("push", status, out=self.repo, url=self.url, commit=self.commit, files=self.files)


class Repository:
    """A repository on the Hub that is to hold an output.

    Args:
        repo: Its id, `org/name`.
        private: Whether it is to be private if it is made now.
        revision: The branch to write to; `main` where it is None.
        token: As in huggingface_hub.
    """

    def __init__(
        self, repo: str, *, private: bool = True, revision: str | None = None, token: str | None = None
    ) -> None:
        require_repository(repo)
        self.repo, self._private, self._revision = repo, private, revision
        self._api = HfApi(token=clean_token(token))
        self.published: Published | None = None  # once it is

    def claim(self, *, overwrite: bool = False) -> None:
        """Make the repository, or see that it may be written to: it is empty, or holds an output of ours.

        Raises:
            HubError: No permission, no way to the Hub.
            PlanError: It holds something else, and `overwrite` is not said.
        """
        with hub_errors(self.repo, self._revision, pushing=True):
            self._api.create_repo(self.repo, private=self._private, exist_ok=True)
            if self._revision:
                self._api.create_branch(self.repo, branch=self._revision, exist_ok=True)
            others = self.files() - {".gitattributes"}
            if others and not others & {*RECORDS, _BEGUN} and not overwrite:
                raise PlanError(
                    f"{self.repo} exists and is no output of milora-init: it holds {min(others)}",
                    hint="choose another repository, or add --overwrite to replace its weights",
                )

    def files(self) -> set[str]:
        """What stands in it."""
        return set(self._api.list_repo_files(self.repo, revision=self._revision))

    def manifest_fingerprint(self) -> str:
        """The fingerprint of the finished output in it, empty where there is none."""
        with hub_errors(self.repo, self._revision, pushing=True):
            return str(self._record(MANIFEST).get("fingerprint", ""))

    def manifest(self) -> Manifest:
        """The manifest of the finished output in it. Raises OutputError, HubError."""
        with hub_errors(self.repo, self._revision, pushing=True):
            path = self._api.hf_hub_download(self.repo, MANIFEST, revision=self._revision)
        return require_manifest(Path(path).parent)

    def _record(self, name: str) -> dict[str, Any]:
        """The record of that name in it, empty where there is none that can be read."""
        if name not in self.files():
            return {}
        path = self._api.hf_hub_download(self.repo, name, revision=self._revision)
        try:
            content = read_object(Path(path), most_bytes=MOST_MANIFEST_BYTES)
        except (OSError, ValueError, RecursionError):  # somebody's: it tells nothing of what is ours there
            content = None
        return content if content is not None and isinstance(content.get("files", {}), dict) else {}

    def push(self, folder: Path, output: Output, *, there: Collection[str] = ()) -> Published:
        """Upload a finished output in one commit; none if the repository has the same output already.

        The card is not compared: it may have been edited there.

        Args:
            folder: Where it lies.
            output: Its record.
            there: Files of it that were pushed before, one by one.

        Raises:
            OutputError: A file was changed since the output was finished.
            HubError: See `claim`; the same push again sends only what is missing.
        """
        with hub_errors(self.repo, self._revision, pushing=True):
            plan = publication(folder, output, self.repo, self._revision)
            contents = {**plan.contents, "README.md": self._card(plan).encode()}
            names = [name for name in output.files if name not in contents and name not in there]
            require_inside(folder, names)
            paths = {name: folder / name for name in names}
            additions = [CommitOperationAdd(name, content) for name, content in (contents | paths).items()]
            for addition in additions:
                name = addition.path_in_repo
                if name in paths and addition.upload_info.sha256.hex() != output.hashes.get(name):
                    raise OutputError(f"{folder}: {name} was changed", hint=f"milora-init verify {folder}")
            files = self.files()
            former = {name for record in RECORDS for name in (record, *self._record(record).get("files", {}))}
            stale = files - output.files.keys() - contents.keys()
            deletions = [
                CommitOperationDelete(name) for name in sorted(stale) if name in former or _would_be_loaded(name)
            ]
            if not deletions and _BEGUN not in files and self._has(plan, additions):
                commit, count = str(self._api.repo_info(self.repo, revision=self._revision or "main").sha), 0
            else:
                operations = [*additions, *deletions]
                commit, count = self._commit(operations, plan.message), len(operations)
        self.published = Published(
            self.repo, f"{self._api.endpoint}/{self.repo}", commit, count, unchanged=count == 0
        )  # fmt: skip
        return self.published

    def _has(self, plan: Publication, additions: Sequence[CommitOperationAdd]) -> bool:
        """Whether the repository has the same output: its record, and every file with its hash."""
        record = self._record(plan.record)
        for name in ("fingerprint", "files", "hashes"):
            if record.get(name) != getattr(plan.output, name):
                return False
        infos = self._api.get_paths_info(self.repo, list(plan.output.files), revision=self._revision)
        found = {info.path: info for info in infos if isinstance(info, RepoFile)}
        small = {addition.path_in_repo: addition for addition in additions}
        for name, digest in plan.output.hashes.items():
            info = found.get(name)
            if info is None or (info.lfs and info.lfs.sha256 != digest):
                return False
            if not info.lfs and (name not in small or info.blob_id != _git_hash(small[name])):
                return False
        return True

    def shown(self, manifest: Manifest) -> Manifest:
        """The manifest as it stands here, where the output is."""
        return as_published(manifest, self.repo, self._revision)

    def begin(self) -> None:
        """Take from the repository what makes it look finished; shards are about to change one by one."""
        with hub_errors(self.repo, self._revision, pushing=True):
            files = self.files()
            marks = sorted(files & set(_FINISH))
            if _BEGUN in files and not marks:
                return
            mark = CommitOperationAdd(_BEGUN, b"milora-init is writing here; without config.json this is no model.\n")
            self._commit([mark, *(CommitOperationDelete(name) for name in marks)], "Begin an output of milora-init")

    def push_shard(self, path: Path, name: str) -> str:
        """Upload one finished file of weights as a commit of its own; returns its SHA-256."""
        digest = sha256(path)
        with hub_errors(self.repo, self._revision, pushing=True):
            self._commit([CommitOperationAdd(name, path)], f"{name}, by milora-init")
        return digest

    def holds(self, hashes: Mapping[str, str]) -> set[str]:
        """Which of these files, by SHA-256, stand in it."""
        if not hashes:
            return set()
        with hub_errors(self.repo, self._revision, pushing=True):
            found = self._api.get_paths_info(self.repo, list(hashes), revision=self._revision)
            return {f.path for f in found if getattr(getattr(f, "lfs", None), "sha256", "") == hashes[f.path]}

    def _commit(self, operations: list[Any], message: str) -> str:
        if _BEGUN in self.files() and any(o.path_in_repo == MANIFEST for o in operations):
            operations = [*operations, CommitOperationDelete(_BEGUN)]
        info = self._api.create_commit(self.repo, operations, commit_message=message, revision=self._revision)
        return str(info.oid)

    def _card(self, plan: Publication) -> str:
        data = ModelCardData(**plan.card_data, **self._of_the_source(plan.model, plan.revision))
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{plan.card_text}"))

    def _of_the_source(self, model: str, revision: str | None) -> dict[str, Any]:
        """Licence and language, from the source's own card, where it has one."""
        path: Path | str = Path(model).expanduser() / "README.md"
        try:
            if revision is not None:
                path = self._api.hf_hub_download(model, "README.md", revision=revision)
            data = (metadata_load(path) or {}) if Path(path).is_file() else {}  # it may be a pipe
        except Exception:  # somebody else's card, missing or broken in whatever way, costs no more than its licence
            return {}
        return {key: data[key] for key in _OF_THE_SOURCE if key in data}


def push(
    folder: str, repo: str, *, private: bool = True, branch: str | None = None, token: str | None = None,
    overwrite: bool = False,
) -> Published:  # fmt: skip
    """Publish a finished output: a pair, a merged model or a converted adapter; see `Repository`.

    Raises:
        UsageError: A folder that is not there.
        OutputError: The folder is no finished output, or a file of it was changed.
        HubError, PlanError: See `Repository.claim`.
    """
    out = Path(folder).expanduser()
    if not folder:  # such as an unset variable of a shell
        raise UsageError("PAIR is empty", hint="name a folder")
    if not out.is_dir():
        raise UsageError(f"{folder}: no such folder", hint="name a folder that milora-init wrote")
    output = require_output(out, folder)
    required = (LORA_CONFIG, LORA_WEIGHTS) if isinstance(output, Manifest) else ()
    require_inside(out, (*output.files, *required))
    for name, size_bytes in output.files.items():
        if not (out / name).is_file() or (name != LORA_CONFIG and (out / name).stat().st_size != size_bytes):
            raise OutputError(f"{folder}: {name} was changed or removed", hint=f"milora-init verify {folder}")
    repository = Repository(repo, private=private, revision=branch, token=token)
    repository.claim(overwrite=overwrite)
    return repository.push(out, output)


def _git_hash(addition: CommitOperationAdd) -> str:
    """The name that git gives to a file's content."""
    with addition.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _would_be_loaded(name: str) -> bool:
    """Whether a file that is not of the output might be loaded in its stead."""
    if "/" in name:
        return False
    return Path(name).suffix in WEIGHT_SUFFIXES or name.endswith((".index.json", "adapter_config.json"))
