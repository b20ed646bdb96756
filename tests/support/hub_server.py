"""A fake Hugging Face Hub on 127.0.0.1: the endpoints that huggingface_hub calls, and faults that a test can set.

Repositories are kept in memory. Each one is a list of commits; a commit maps paths to contents. Files with a suffix in
LARGE are LFS files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from support import fork_server
from support.fork_server import Done

LARGE = (".safetensors", ".bin")
Command = Callable[..., Done]
Response = tuple[int, dict[str, str], bytes]


@dataclass
class Repository:
    """One model repository: its commits, the newest last, and its access rights."""

    commits: list[tuple[str, dict[str, bytes]]]
    private: bool = False
    gated: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def commit(self, files: Mapping[str, bytes]) -> str:
        content = b"".join(name.encode() + hashlib.sha256(data).digest() for name, data in sorted(files.items()))
        sha = hashlib.sha1(content + str(len(self.commits)).encode()).hexdigest()
        self.commits.append((sha, dict(files)))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """The server: its repositories, a record of the requests, and the faults to simulate.

    Attributes:
        fault: Called with (method, path) before each response. An int is the error status to send; "cut" closes the
            connection in the middle of the body.
        damaged: Contents to send instead of a file's own, by `org/name/path`.
        ranges: The response to a range request: "right"; "ignored", the whole file as 200; "whole", the whole file as
            206; "elsewhere", as 206 with another range than requested; "unnamed", as 206 without Content-Range.
        entry: Called with each file entry of a listing; may change it.
        served: Bytes in the responses for each file of a repository.
        sent: Bytes that were really sent, of all responses.
        stored: Contents of the uploaded large files, by hash.
        uploads: Bytes received of each large file, by hash.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    fault: Callable[[str, str], int | str | None] = lambda *_: None
    damaged: Mapping[str, bytes] = field(default_factory=dict)
    ranges: str = "right"
    entry: Callable[[dict[str, Any]], object] = lambda _: None
    served: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)
    uploads: Counter[str] = field(default_factory=Counter)
    token: str = "hf_secretsecretsecret"
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        # With the default of 0.5 s, `shutdown` would wait that long.
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: TracebackType | type | BaseException | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, name: str, folder: Path, **rights: bool) -> str:
        """Add a folder as a commit of a model repository; returns the commit hash."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        repository = self.repositories.setdefault(name, Repository([], **rights))
        return repository.commit(files)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a header would wait 40 ms for its body

        def log_message(self, *_: Any) -> None: ...

        def respond(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with hub.lock:
                hub.requests.append((self.command, path))
                hub.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer "))
                wrong = hub.fault(self.command, path)
                if isinstance(wrong, int):
                    status, headers, content = _error(wrong)
                else:
                    status, headers, content = self.answer(path, body)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if wrong == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
            else:
                self.send(content)

        def send(self, content: bytes) -> None:
            with suppress(OSError):  # the client may close the connection early
                for start in range(0, len(content), 1 << 20):
                    self.wfile.write(content[start : start + (1 << 20)])
                    hub.sent += len(content[start : start + (1 << 20)])

        do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815

        def answer(self, path: str, body: bytes) -> Response:
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            if path == "/api/validate-yaml":
                return _json({"errors": [], "warnings": []})
            if path.startswith("/lfs/"):
                return self.receive(path.removeprefix("/lfs/"), body)
            if match := re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?/(\w[\w-]*)(?:/(.+))?", path):
                name, verb, rest = match.groups()
            elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)", path):
                name, verb, rest = match[1], "revision", "main"
            else:
                return _error(404)
            repository = hub.repositories.get(name)
            authorized = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if repository is None or (repository.private and not authorized):
                return _error(401, "RepoNotFound")
            if verb == "info":
                return self.batch(json.loads(body))
            if verb == "preupload":
                return _json({"files": [_mode(repository, entry["path"]) for entry in json.loads(body)["files"]]})
            if verb == "commit":
                return self.take_commit(repository, body)
            revision, _, file = (rest or "main").partition("/")
            commit = repository.at(revision)
            if commit is None:
                return _error(404, "RevisionNotFound")
            if verb == "resolve":
                if repository.gated and not authorized:
                    return _error(403, "GatedRepo")
                return self.resolve(name, commit, file)
            if verb == "paths-info":
                asked = parse_qs(body.decode())["paths"]
                entries = [_entry(p, data) for p, data in commit[1].items() if p in asked]
                for entry in entries:
                    hub.entry(entry)
                return _json(entries)
            if verb == "tree":
                return _json([_entry(p, data) for p, data in commit[1].items()])
            if verb == "revision":
                files = [{"rfilename": p} for p in commit[1]]
                gated = "manual" if repository.gated else False
                return _json({"id": name, "sha": commit[0], "siblings": files, "private": repository.private,
                              "gated": gated, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
            return _error(404)

        def resolve(self, name: str, commit: tuple[str, dict[str, bytes]], file: str) -> Response:
            if file not in commit[1]:
                status, headers, content = _error(404, "EntryNotFound")
                return status, {**headers, "X-Repo-Commit": commit[0]}, content
            data, entry = commit[1][file], _entry(file, commit[1][file])
            data = hub.damaged.get(f"{name}/{file}", data)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            headers = {"X-Repo-Commit": commit[0], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            status, total = 200, len(data)
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(match[1]), min(int(match[2] or total - 1), total - 1)
                first += 8 if hub.ranges == "elsewhere" else 0
                if hub.ranges != "ignored":
                    status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{total}"
                if hub.ranges == "unnamed":
                    del headers["Content-Range"]
                if hub.ranges not in ("ignored", "whole"):
                    data = data[first : last + 1]
            headers["Content-Length"] = str(len(data))
            if self.command == "GET":
                hub.served[f"{name}/{file}"] += len(data)
            return status, headers, data

        def create(self, asked: dict[str, Any]) -> Response:
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return _error(401)
            if name in hub.repositories:
                return 409, {"Content-Type": "application/json"}, json.dumps({"url": f"{hub.url}/{name}"}).encode()
            repository = hub.repositories[name] = Repository(
                [], private="private" in (asked.get("visibility"), asked.get("private") and "private")
            )
            repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            return _json({"url": f"{hub.url}/{name}", "name": name})

        def batch(self, asked: dict[str, Any]) -> Response:
            objects = []
            for wanted in asked["objects"]:
                entry = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in hub.stored:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}", "header": {}}}
                objects.append(entry)
            return _json({"transfer": "basic", "objects": objects})

        def receive(self, oid: str, body: bytes) -> Response:
            if hashlib.sha256(body).hexdigest() != oid:
                return _error(422)
            hub.stored[oid] = body
            hub.uploads[oid] += len(body)
            return 200, {}, b""

        def take_commit(self, repository: Repository, body: bytes) -> Response:
            files = dict(repository.files)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            sha = repository.commit(files)
            return _json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/me/x/commit/{sha}"})

    return Handler


def _entry(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _mode(repository: Repository, path: str) -> dict[str, Any]:
    there = repository.files.get(path)
    oid = None if there is None else _entry(path, there).get("lfs", {"oid": _entry(path, there)["oid"]})["oid"]
    return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False, "oid": oid}


def _json(content: Any) -> Response:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status: int, code: str = "") -> Response:
    headers = {"Content-Type": "application/json", "X-Error-Code": code, "X-Error-Message": code or str(status)}
    return status, headers, json.dumps({"error": code or str(status)}).encode()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that uses this Hub, with a token for it, and has its cache in a folder."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_TOKEN": hub.token,
    }


def client(hub: Hub, folder: Path, function: Callable[..., object] = fork_server.command_line) -> Command:
    """run(*arguments, **environment) runs milora-init in `folder`, with this Hub and a Hub cache in that folder."""

    def run(*arguments: str, **changes: str | None) -> Done:
        return fork_server.run(
            function, *arguments, environment={**environment(hub, folder / "home"), **changes}, cwd=folder
        )

    return run


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub."""
    with Hub() as server:
        yield server


@pytest.fixture
def milora(hub: Hub, tmp_path: Path) -> Command:
    """milora(*arguments) runs the command line with that Hub as its endpoint, a token for it and an empty cache."""
    return client(hub, tmp_path)


def fetched(hub: Hub, repo: str, folder: Path) -> Path:
    """Download every file of a repository into a folder, as a user would."""
    for name, content in hub.repositories[repo].files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
