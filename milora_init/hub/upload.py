"""Push an output to a Hub repository: the base at the root, the adapter in `lora/`; one without a base at the root.

Files are uploaded first, and one commit then adds all of them: the repository never contains half of a model. Large
files are stored by their hash, so a repeated push does not send them again. The uploaded adapter_config.json names the
repository as the base, unless it has none; the local file keeps the local path.

To save disk space, shards can be pushed one by one while the run continues. Then each shard is a commit, and
config.json comes last: without it, transformers does not load the repository.

The content of a shard can also be uploaded from another machine than the one that makes the commit, which needs only
its size and its SHA-256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, metadata_load
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

from milora_init.checkpoint.folder import SAFETENSORS_INDEX
from milora_init.checkpoint.side_files import brings_weights
from milora_init.envelope import Status, envelope
from milora_init.errors import HubError, OutputError, PlanError, UsageError
from milora_init.hub.errors import hub_errors
from milora_init.hub.model_card import PICTURE
from milora_init.hub.publication import Publication, as_published, publication
from milora_init.json_fields import read_object, sha256_text
from milora_init.lora.folder import CONFIG_FILE, LORA_CONFIG, LORA_WEIGHTS, WEIGHTS_FILE, adapter_files
from milora_init.manifest import (
    MANIFEST,
    MOST_MANIFEST_BYTES,
    Manifest,
    require_inside,
    require_manifest,
)
from milora_init.methods import recorded_method
from milora_init.options import clean_token, local_path, require_repository
from milora_init.records import MERGED, RECORDS, Output, record_name, require_output
from milora_init.result import Result

_CARD = "README.md"
# Files that make a repository look like a complete model or adapter.
_COMPLETION_FILES = (
    "config.json", SAFETENSORS_INDEX, MANIFEST, LORA_CONFIG, LORA_WEIGHTS, CONFIG_FILE, WEIGHTS_FILE,
)  # fmt: skip
_UNFINISHED = "unfinished-by-milora-init"  # a file in a repository while its shards are pushed one by one
_SOURCE_CARD_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")
_MOST_OBJECTS = 256  # of one request, as in huggingface_hub
_Operation = CommitOperationAdd | CommitOperationDelete


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Published(Result):
    """The result of a push.

    Attributes:
        repo: Id of the repository.
        url: Its address, or that of the branch.
        commit: The commit that contains the output.
        files: Number of files that the push wrote or deleted, unchanged ones included.
        unchanged: Whether the repository had the same output before.
        replaced: Whether it had another output of the same model before, which is in the repository's history now.
    """

    repo: str
    url: str
    commit: str
    files: int
    unchanged: bool = False
    replaced: bool = False

    def summary(self) -> Mapping[str, object]:
        return {"status": "unchanged" if self.unchanged else "done", "url": self.url, "commit": self.commit[:12]}

    def to_json(self) -> dict[str, Any]:
        status: Status = "unchanged" if self.unchanged else "done"
        return envelope("push", status, out=self.repo, url=self.url, commit=self.commit, files=self.files)


class Repository:
    """A repository on the Hub that an output is pushed to.

    Args:
        repo: Id of the repository, `org/name`.
        private: Whether the repository is private if `prepare` creates it.
        revision: The branch to write to; None for `main`.
        token: As in huggingface_hub.

    Attributes:
        repo: Id of the repository.
        published: The result of `push`; None before.

    Raises:
        UsageError: `repo` or `token` is malformed.
    """

    def __init__(
        self, repo: str, *, private: bool = True, revision: str | None = None, token: str | None = None
    ) -> None:
        require_repository(repo)
        self.repo, self._private, self._revision = repo, private, revision
        self._token = clean_token(token)
        self._api = HfApi(token=self._token)
        self.published: Published | None = None

    def prepare(self, kind: str, model: str, *, overwrite: bool = False) -> None:
        """Create the repository and the branch, or check that an existing one may be replaced.

        It may if it is empty, or holds an output of the same kind and of the same model.

        Args:
            kind: Of the output that is to be pushed; see `kind_of`.
            model: The model that it was made from: its id on the Hub, or the name of its folder.
            overwrite: Accept a repository with any content.

        Raises:
            HubError: The token has no permission to write, or the Hub cannot be reached.
            PlanError: The repository has other content, and `overwrite` is not set.
        """
        with hub_errors(self.repo, self._revision, pushing=True):
            self._api.create_repo(self.repo, private=self._private, exist_ok=True)
            if self._revision:
                self._api.create_branch(self.repo, branch=self._revision, exist_ok=True)
            files = self._list_files() - {".gitattributes"}  # the Hub creates this file
            if files and not files & {*RECORDS, _UNFINISHED} and not overwrite:
                raise PlanError(
                    f"{self.repo} exists and is not an output of milora-init: it contains {min(files)}",
                    hint="choose another repository, or add --overwrite to replace the weights in it",
                )
            for earlier in () if overwrite else sorted(files & set(RECORDS)):
                fields = self._record_fields(earlier)
                its_kind, its_model = kind_of(earlier, fields), _model_name(fields)
                if (its_kind, its_model) != (kind, model):
                    raise PlanError(
                        f"{self.repo} holds another output of milora-init: {its_kind} of {its_model}",
                        hint="choose another repository, or add --overwrite to replace it",
                    )

    def manifest_fingerprint(self) -> str:
        """Return the fingerprint of the finished output in the repository; empty if there is none."""
        with hub_errors(self.repo, self._revision, pushing=True):
            return str(self._record_fields(MANIFEST).get("fingerprint", ""))

    def manifest(self) -> Manifest:
        """Return the manifest of the finished output in the repository. Raises OutputError or HubError."""
        with hub_errors(self.repo, self._revision, pushing=True):
            path = self._api.hf_hub_download(self.repo, MANIFEST, revision=self._revision)
        return require_manifest(Path(path).parent)

    def published_manifest(self, manifest: Manifest) -> Manifest:
        """Return the manifest of a local output as `push` writes it into this repository."""
        return as_published(manifest, self.repo, self._revision)

    def push(self, folder: Path, output: Output, *, pushed_before: Collection[str] = ()) -> Published:
        """Push a finished output in one commit. Files of an earlier output that this one does not have are deleted.

        If the repository has the same output already, no commit is made. The model card is not compared, because it
        may have been edited on the Hub.

        Args:
            folder: The folder of the output.
            output: Its record.
            pushed_before: Files of the output that `push_shard` or `upload` sent. They need not be in the folder.

        Raises:
            HubError: A request failed. The same call again uploads only what is missing.
            OutputError: A file is not the one that the record describes.
        """
        return self.commit(output, *self.collect(folder, output, pushed_before=pushed_before))

    def collect(
        self, folder: Path, output: Output, *, pushed_before: Collection[str] = ()
    ) -> tuple[Publication, list[CommitOperationAdd]]:
        """The first half of `push`: read the files and compare them with the record. The Hub is not asked."""
        with hub_errors(self.repo, self._revision, pushing=True):
            plan = publication(folder, output, self.repo, self._revision)
            generated = {*plan.contents, _CARD}
            names = [name for name in output.files if name not in generated and name not in pushed_before]
            require_inside(folder, names)
            additions = [_uploaded(name, output.files[name], output.hashes[name]) for name in pushed_before]
            for name in names:
                addition = CommitOperationAdd(name, folder / name)
                if addition.upload_info.sha256.hex() != output.hashes.get(name):
                    raise OutputError(
                        f"{folder}: {name} was changed after the run", hint=f"milora-init verify {folder}"
                    )
                additions.append(addition)
        return plan, additions

    def commit(self, output: Output, plan: Publication, files: Sequence[CommitOperationAdd]) -> Published:
        """The second half of `push`: upload what `collect` has found."""
        with hub_errors(self.repo, self._revision, pushing=True):
            generated = {**plan.contents, _CARD: self._model_card(plan).encode()}
            additions = [*(CommitOperationAdd(name, content) for name, content in generated.items()), *files]
            deletions = self._outdated_files(output.files.keys() | generated.keys())
            earlier = self._record_fields(plan.record)
            unchanged = not deletions and self._has(plan, additions, earlier)
            operations: list[_Operation] = [*additions, *map(CommitOperationDelete, deletions)]
            commit = self._head() if unchanged else self._commit(operations, plan.message)
        count = 0 if unchanged else len(operations)
        url = f"{self._api.endpoint}/{self.repo}" + (f"/tree/{self._revision}" if self._revision else "")
        replaced = earlier.get("fingerprint") not in (None, plan.output.fingerprint)
        self.published = Published(self.repo, url, commit, count, unchanged, replaced)
        return self.published

    def mark_unfinished(self) -> None:
        """Delete the files that make the repository look complete, before shards are replaced one by one."""
        with hub_errors(self.repo, self._revision, pushing=True):
            files = self._list_files()
            completion_files = sorted(files & set(_COMPLETION_FILES))
            if _UNFINISHED in files and not completion_files:
                return
            mark = CommitOperationAdd(
                _UNFINISHED, b"milora-init is writing here; without config.json this is no model.\n"
            )
            self._commit([mark, *map(CommitOperationDelete, completion_files)], "Begin an output of milora-init")

    def push_shard(self, path: Path, name: str) -> None:
        """Push one finished weight file as a commit of its own."""
        with hub_errors(self.repo, self._revision, pushing=True):
            self._commit([CommitOperationAdd(name, path)], f"{name}, by milora-init")

    def upload(self, path: Path, name: str) -> None:
        """Upload the content of a finished weight file. `push` commits it, and need not upload it again then.

        Nothing is uploaded of a file that the repository keeps as a small one; see `upload_alone`.
        """
        self._upload(CommitOperationAdd(name, path))

    def upload_alone(self, path: Path, name: str) -> None:
        """Upload as `upload`. The file may be removed from the disk then.

        Raises:
            HubError: A request failed, or the repository keeps the file as a small one, which only a commit sends.
        """
        addition = CommitOperationAdd(name, path)
        self._upload(addition)
        if not addition._is_uploaded:
            raise HubError(
                f"{self.repo} does not keep {name} as a large file, by its SHA-256",
                hint="look at its .gitattributes and .gitignore, or choose another repository",
            )

    def _upload(self, addition: CommitOperationAdd) -> None:
        with hub_errors(self.repo, self._revision, pushing=True):
            self._api.preupload_lfs_files(self.repo, [addition], revision=self._revision)

    def pushed_shards(self, shards: Mapping[str, tuple[int, str]]) -> set[str]:
        """Return the names of those weight files whose content the repository has, committed or not.

        Args:
            shards: Size and SHA-256 of each file, by name.
        """
        shards = {name: shard for name, shard in shards.items() if sha256_text(shard[1])}
        with hub_errors(self.repo, self._revision, pushing=True):
            infos = self._api.get_paths_info(self.repo, list(shards), revision=self._revision) if shards else ()
            digests = {info.path: info.lfs.sha256 for info in infos if isinstance(info, RepoFile) and info.lfs}
            committed = {name for name in shards if digests.get(name) == shards[name][1]}
            rest = {name: shard for name, shard in shards.items() if name not in committed}
            stored = set(self._stored(_uploaded(name, *shard).upload_info for name, shard in rest.items()))
        return committed | {name for name, (_, digest) in rest.items() if digest in stored}

    def _stored(self, contents: Iterable[UploadInfo]) -> Iterator[str]:
        """The SHA-256 of those contents that the Hub need not be sent: it then names no action for an upload."""
        waiting = iter(contents)
        while batch := list(itertools.islice(waiting, _MOST_OBJECTS)):
            objects, *_ = post_lfs_batch_info(
                batch, self._token, "model", self.repo, revision=self._revision, endpoint=self._api.endpoint
            )  # fmt: skip
            yield from (item["oid"] for item in objects if not item.get("actions") and not item.get("error"))

    def _list_files(self) -> set[str]:
        return set(self._api.list_repo_files(self.repo, revision=self._revision))

    def _record_fields(self, name: str) -> dict[str, Any]:
        """Return the JSON object of a record in the repository; empty if there is none, or it is not a record."""
        if name not in self._list_files():
            return {}
        path = self._api.hf_hub_download(self.repo, name, revision=self._revision)
        try:
            content = read_object(Path(path), most_bytes=MOST_MANIFEST_BYTES)
        except (OSError, ValueError, RecursionError):
            return {}
        return content if content is not None and isinstance(content.get("files", {}), dict) else {}

    def _outdated_files(self, kept: Collection[str]) -> list[str]:
        """List the files to delete: those of an earlier output, and those that could be loaded instead of this one."""
        earlier_output = {
            name for record in RECORDS for name in (record, *self._record_fields(record).get("files", {}))
        }
        earlier_output.add(PICTURE)
        others = self._list_files().difference(kept)
        return [name for name in sorted(others) if name in earlier_output or ("/" not in name and brings_weights(name))]

    def _commit(self, operations: Sequence[_Operation], message: str) -> str:
        """Create a commit and return its id. A commit with the record ends what `mark_unfinished` began."""
        if _UNFINISHED in self._list_files() and any(o.path_in_repo in RECORDS for o in operations):
            operations = [*operations, CommitOperationDelete(_UNFINISHED)]
        info = self._api.create_commit(self.repo, operations, commit_message=message, revision=self._revision)
        return str(info.oid)

    def _head(self) -> str:
        """Return the newest commit of the branch."""
        return str(self._api.repo_info(self.repo, revision=self._revision or "main").sha)

    def _has(self, plan: Publication, additions: Sequence[CommitOperationAdd], record: Mapping[str, Any]) -> bool:
        """Return whether the repository has the same output: its record, and every file with its hash."""
        if _UNFINISHED in self._list_files():
            return False
        if any(record.get(name) != getattr(plan.output, name) for name in ("fingerprint", "files", "hashes")):
            return False
        infos = self._api.get_paths_info(self.repo, list(plan.output.files), revision=self._revision)
        found = {info.path: info for info in infos if isinstance(info, RepoFile)}
        added = {addition.path_in_repo: addition for addition in additions}
        for name, digest in plan.output.hashes.items():
            info = found.get(name)
            if info is None or (info.lfs and info.lfs.sha256 != digest):
                return False
            # The Hub has no SHA-256 of small files, only git's hash.
            if not info.lfs and (name not in added or info.blob_id != _git_hash(added[name])):
                return False
        return True

    def _model_card(self, plan: Publication) -> str:
        data = ModelCardData(**plan.card_data, **self._source_card_fields(plan.model, plan.revision))
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{plan.card_text}"))

    def _source_card_fields(self, model: str, revision: str | None) -> dict[str, Any]:
        """Return the licence and the language from the card of the original model; empty if it has none."""
        try:
            path: Path | str = local_path(model) / "README.md"
            if revision is not None:
                path = self._api.hf_hub_download(model, "README.md", revision=revision)
            data = (metadata_load(path) or {}) if Path(path).is_file() else {}  # reading a pipe would wait for ever
        except Exception:  # the card is optional and may be broken in any way, so it must not stop the push
            return {}
        return {key: data[key] for key in _SOURCE_CARD_FIELDS if key in data}


def push(
    folder: str, repo: str, *, private: bool = True, branch: str | None = None, token: str | None = None,
    overwrite: bool = False,
) -> Published:  # fmt: skip
    """Push a finished output to the Hub: a pair, a merged model or a converted adapter.

    Args:
        folder: The folder of the output.
        repo, private, token: See `Repository`.
        branch: The `revision` of `Repository`.
        overwrite: See `Repository.prepare`.

    Raises:
        UsageError: The folder is not there.
        OutputError: The folder is not a finished output, or a file in it was changed.
        HubError, PlanError: See `Repository.prepare` and `Repository.push`.
    """
    if not folder:  # such as an unset variable of a shell
        raise UsageError("PAIR is empty", hint="name a folder")
    out = local_path(folder)
    if not out.is_dir():
        hint = "name a folder that milora-init wrote"
        if local_path(repo).is_dir():
            hint = f"the folder comes first: milora-init push {repo} {folder}"
        raise UsageError.no_folder(folder, out, hint=hint)
    output = require_output(out, folder)
    names = adapter_files(output.method) if isinstance(output, Manifest) else ()
    require_inside(out, (*output.files, *names))
    for name, size_bytes in output.files.items():
        # adapter_config.json may differ: trainers rewrite it, and `Repository.push` writes its own.
        if not (out / name).is_file() or (name not in names[:1] and (out / name).stat().st_size != size_bytes):
            raise OutputError(f"{folder}: {name} was changed or removed", hint=f"milora-init verify {folder}")
    repository = Repository(repo, private=private, revision=branch, token=token)
    collected = repository.collect(out, output)  # first: an output that was changed leaves no empty repository
    record = output.to_json() if isinstance(output, Manifest) else output.content()
    repository.prepare(kind_of(record_name(output), record), _model_name(record), overwrite=overwrite)
    return repository.commit(output, *collected)


def kind_of(name: str, record: Mapping[str, Any]) -> str:
    """What an output is, in words, by the name and the content of its record."""
    if name != MANIFEST:
        return "a merged model" if name == MERGED else "a converted adapter"
    method = recorded_method(record.get("inputs"))
    return "an adapter of the original model" if method and not method.writes_base else "a pair"


def _model_name(record: Mapping[str, Any]) -> str:
    """The model that an output was made from, as a published record names it: its Hub id, or its folder's name."""
    source = record.get("source", record)
    if not isinstance(source, dict):
        return ""
    model, on_hub = str(source.get("model", "")), source.get("revision") or source.get("from_hub")
    return model if on_hub else Path(model).name


def _uploaded(name: str, size_bytes: int, digest: str) -> CommitOperationAdd:
    """The addition of a large file whose content was uploaded before, perhaps from another machine."""
    addition = CommitOperationAdd(name, b"")
    addition.upload_info = UploadInfo(sha256=bytes.fromhex(digest), size=size_bytes, sample=b"")
    addition._upload_mode, addition._is_uploaded = "lfs", True  # as `preupload_lfs_files` leaves it
    return addition


def _git_hash(addition: CommitOperationAdd) -> str:
    """Return the hash that git gives to a file's content."""
    with addition.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
