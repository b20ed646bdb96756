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
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, metadata_load

from milora_init.checkpoint.folder import SAFETENSORS_INDEX
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.side_files import WEIGHT_SUFFIXES
from milora_init.envelope import Status, envelope
from milora_init.errors import OutputError, PlanError
from milora_init.hub.errors import hub_errors
from milora_init.hub.model_card import card_data, card_text
from milora_init.lora.folder import LORA_CONFIG, LORA_WEIGHTS
from milora_init.manifest import MANIFEST, Manifest, require_inside, require_manifest
from milora_init.options import clean_token, require_repository
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
            if others and MANIFEST not in others and _BEGUN not in others and not overwrite:
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
            return str(self._manifest().get("fingerprint", ""))

    def manifest(self) -> Manifest:
        """The manifest of the finished output in it. Raises OutputError, HubError."""
        with hub_errors(self.repo, self._revision, pushing=True):
            path = self._api.hf_hub_download(self.repo, MANIFEST, revision=self._revision)
        return require_manifest(Path(path).parent)

    def _manifest(self) -> dict[str, Any]:
        """The manifest of the output of ours that stands in it, empty where there is none."""
        if MANIFEST not in self.files():
            return {}
        path = self._api.hf_hub_download(self.repo, MANIFEST, revision=self._revision)
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):  # somebody's: it tells nothing of what is ours there
            content = None
        return content if isinstance(content, dict) and isinstance(content.get("files", {}), dict) else {}

    def push(self, folder: Path, manifest: Manifest, *, there: Collection[str] = ()) -> Published:
        """Upload a finished output in one commit.

        Args:
            folder: Where it lies.
            manifest: Its manifest.
            there: Files of it that were pushed before, one by one.

        Raises:
            HubError: See `claim`; the same push again sends only what is missing.
        """
        with hub_errors(self.repo, self._revision, pushing=True):
            published = as_published(manifest, self.repo, self._revision)
            contents = {
                LORA_CONFIG: (json.dumps(published.adapter, indent=2) + "\n").encode(),
                MANIFEST: (json.dumps(published.to_json(), indent=1) + "\n").encode(),
                "README.md": self._card(manifest, published).encode(),
            }
            names = [name for name in manifest.files if name not in contents and name not in there]
            require_inside(folder, names)
            paths = {name: folder / name for name in names}
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(name, content) for name, content in (contents | paths).items()
            ]
            for operation in operations:
                name = operation.path_in_repo
                hashed = operation.upload_info.sha256.hex() if isinstance(operation, CommitOperationAdd) else ""
                if name in paths and hashed != manifest.hashes.get(name):
                    raise OutputError(f"{folder}: {name} was changed", hint=f"milora-init verify {folder}")
            former = self._manifest().get("files", {})
            stale = self.files() - manifest.files.keys() - contents.keys()
            operations += [
                CommitOperationDelete(name) for name in sorted(stale) if name in former or _would_be_loaded(name)
            ]
            info = self._commit(operations, "A residual base and its adapter, by milora-init")
        self.published = Published(self.repo, f"{self._api.endpoint}/{self.repo}", info, len(operations))
        return self.published

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

    def _card(self, manifest: Manifest, published: Manifest) -> str:
        data = ModelCardData(**card_data(manifest), **self._of_the_source(manifest))
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{card_text(published, self.repo)}"))

    def _of_the_source(self, manifest: Manifest) -> dict[str, Any]:
        """Licence and language, from the source's own card, where it has one."""
        model, revision = str(manifest.source["model"]), manifest.source["revision"]
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
    """Publish a finished output folder; see `Repository`.

    Raises:
        OutputError: The folder is no finished output, or a file of it was changed.
        HubError, PlanError: See `Repository.claim`.
    """
    out = Path(folder).expanduser()
    manifest = require_manifest(out)
    require_inside(out, (*manifest.files, LORA_CONFIG, LORA_WEIGHTS))
    for name, size_bytes in manifest.files.items():
        if not (out / name).is_file() or (name != LORA_CONFIG and (out / name).stat().st_size != size_bytes):
            raise OutputError(f"{folder}: {name} was changed or removed", hint=f"milora-init verify {folder}")
    repository = Repository(repo, private=private, revision=branch, token=token)
    repository.claim(overwrite=overwrite)
    return repository.push(out, manifest)


def as_published(manifest: Manifest, repo: str, branch: str | None = None) -> Manifest:
    """The manifest as it stands in the repository, which is where the pair is now, and not in somebody's folder."""
    adapter_config = {**manifest.adapter, "base_model_name_or_path": repo}
    if branch:
        adapter_config["revision"] = branch
    encoded = (json.dumps(adapter_config, indent=2) + "\n").encode()
    source = dict(manifest.source)
    if source["revision"] is None:
        source["model"] = Path(source["model"]).name
    return dataclasses.replace(
        manifest,
        source=source,
        out=repo,
        adapter=adapter_config,
        files={**manifest.files, LORA_CONFIG: len(encoded)},
        hashes={**manifest.hashes, LORA_CONFIG: hashlib.sha256(encoded).hexdigest()},
    )


def _would_be_loaded(name: str) -> bool:
    """Whether a file that is not of the output might be loaded in its stead."""
    if "/" in name:
        return False
    return Path(name).suffix in WEIGHT_SUFFIXES or name.endswith((".index.json", "adapter_config.json"))
