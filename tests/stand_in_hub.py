"""A small Hub on loopback for the real `huggingface_hub` client: repositories of models in memory, over plain HTTP.

    with StandInHub() as hub:
        subprocess.run([...], env=os.environ | hub.environment(home))
        hub.files("ada/baka", "main")["config.json"]

It knows: creating repositories, private ones too; who a token belongs to; checking a card's metadata; preupload, LFS
batches with whole-file PUTs, Xet storage (`stand_in_xet`), commits, branches, tags; information about a model, its refs
and its tree; and resolving files by branch, tag or commit (HEAD, GET with ranges, the redirect of a large file to its
storage), with the headers that the client's cache is built on. Only owners write, and what is private is not there for
others. Anything else is answered with 501 and stands in `requests`, so that a test sees what it asked for.

How large files go is up to the client, as it is with the Hub: by Xet wherever `hf_xet` is installed, else by LFS.

`faults` makes requests fail: the connection dropped in the middle of an upload, or an error instead of a commit.
"""

import base64
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from stand_in_xet import XetStorage

HERE = Path(__file__).parent
OWNER, TOKEN = "ada", "hf_" + "s3cret" * 6
# What a new repository's .gitattributes send to LFS, of the kinds of files that are met here.
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    parent: str | None
    files: Mapping[str, str]  # path to the key of its content


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # to commits
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, branch: str, files: Mapping[str, str]) -> Commit:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(json.dumps([title, parent, len(self.commits), *sorted(files.items())]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, parent, dict(files))
        self.branches[branch] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)


@dataclass
class Fault:
    """Requests that fail: those of a method whose path begins or ends so, as often as `times`."""

    method: str
    path: str
    times: int = 1
    status: int = 0  # to answer; 0: drop the connection after half of the body

    def hits(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and self.path in path


class StandInHub:
    """The Hub; a context manager that serves while it is entered.

    Args:
        tokens: who may write, by token; `OWNER` with `TOKEN` if not given.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None):
        self.tokens = dict(tokens or {TOKEN: OWNER})
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}  # by git's hash of a blob, or "lfs:" and the SHA-256
        self.xet = XetStorage()
        self.requests: list[tuple[str, str, int]] = []  # method, path, status; 0 for a dropped connection
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # Under another name, as the real one is at another host: the client follows no redirect there in a HEAD, and
        # must not send its token along.
        self.storage = f"http://localhost:{self._server.server_address[1]}/storage"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process that takes this for the Hub, with a cache of its own, logged in or not."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        } | ({} if token is None else {"HF_TOKEN": token})

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, by path."""
        commit = self.repositories[repository].find(revision)
        assert commit is not None, revision
        return {path: self.contents[key] for path, key in commit.files.items()}

    def titles(self, repository: str, revision: str = "main") -> list[str]:
        """The titles of a revision's commits, the newest first."""
        found, commit = self.repositories[repository], self.repositories[repository].find(revision)
        titles = []
        while commit is not None:
            titles.append(commit.title)
            commit = found.commits.get(commit.parent or "")
        return titles

    def uploads(self) -> list[tuple[str, int]]:
        """Paths and answers of the requests that brought contents of large files, by LFS or Xet."""
        ways = (("PUT", "/storage/"), ("POST", "/xet/v1/xorbs/"))
        return [
            (path, status)
            for method, path, status in self.requests
            if any(method == way and path.startswith(place) for way, place in ways)
        ]


class Client:
    """Runs scripts in processes that take the stand-in for the Hub; they share a cache, empty at first."""

    def __init__(self, hub: StandInHub, home: Path):
        self.hub, self.home = hub, home

    def start(self, script: str, *arguments: Any, token: str | None = TOKEN, **variables: str) -> subprocess.Popen[str]:
        """With the package and the tests' helpers on the path, which a script may shut out."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=kept | {"PYTHONPATH": path} | self.hub.environment(self.home, token) | variables,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: Any, **options: Any) -> str:
        process = self.start(script, *arguments, **options)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return output


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size > 10_000_000


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Refused(Exception):
    """An answer other than success. `code` is what tells the client one kind of 404 from another."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class _Dropped(Exception):
    """The connection is to be dropped."""


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.path_parts, self.query = [unquote(part) for part in url.path.split("/")[1:]], parse_qs(url.query)
        try:
            fault = next((fault for fault in self.hub.faults if fault.hits(self.command, url.path)), None)
            if fault:
                fault.times -= 1
            self.body = self._read_body(drop=fault is not None and not fault.status)
            if fault:
                raise _Refused(fault.status, "A fault that the test asked for.")
            with self.hub.lock:
                self._answer(*self._route())
        except _Refused as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._answer(refused.status, {"error": str(refused)}, headers)
        except _Dropped:
            self.hub.requests.append((self.command, url.path, 0))
            # A reset, as of a machine that went away, not an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self, drop: bool) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(self._chunks(drop))
        length = int(self.headers.get("Content-Length", 0))
        if drop:
            self.rfile.read(length // 2)
            raise _Dropped
        return self.rfile.read(length)

    def _chunks(self, drop: bool) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            if drop:
                raise _Dropped
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        self.hub.requests.append((self.command, urlsplit(self.path).path, status))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        if not isinstance(content, bytes):
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who asks, and for what

    @property
    def _user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repository(self, name: str, to_write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        is_owner = self._user == name.partition("/")[0]
        if repository is None or (repository.private and not is_owner):
            raise _Refused(404 if self._user else 401, "Repository not found", "RepoNotFound")
        if to_write and not is_owner:
            raise _Refused(403, f"You may not write to {name}.")
        return repository

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # What it knows: an answer is a status, a content and headers

    def _route(self) -> tuple[Any, ...]:
        if self.path_parts[0] == "storage" and "Authorization" in self.headers:
            raise _Refused(400, "Only one way to authenticate is allowed: the address is signed.")
        match self.command, self.path_parts:
            case "GET", ["api", "whoami-v2"]:
                if self._user is None:
                    raise _Refused(401, "Invalid user token.")
                return 200, {"name": self._user, "type": "user", "auth": {"accessToken": {"role": "write"}}}
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(self.body))
            case "POST", ["api", "validate-yaml"]:
                return self._validate(json.loads(self.body)["content"])
            case (("GET" | "HEAD"), [owner, name, "resolve", revision, *path]):
                return self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self._repository(f"{owner}/{name.removesuffix('.git')}", to_write=True)
                return self._batch(json.loads(self.body))
            case "PUT", ["storage", oid]:
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise _Refused(400, "The content is not what was announced.")
                self.hub.contents[f"lfs:{oid}"] = self.body
                return 200, b""
            case (("GET" | "HEAD"), ["storage", oid]):
                return self._content(self.hub.contents[f"lfs:{oid}"], {"ETag": f'"{oid}"'})
            case _, ["xet", *rest]:
                return self._xet(rest)
            case _, ["api", "models", owner, name, *rest]:
                return self._model(f"{owner}/{name}", rest)
        raise _Refused(501, f"The stand-in does not know {self.command} {self.path}.")

    def _model(self, name: str, rest: list[str]) -> tuple[Any, ...]:
        repository = self._repository(name, to_write=self.command != "GET")
        match self.command, rest:
            case "POST", ["preupload", revision]:
                commit = self._commit(repository, revision)
                return 200, {"files": [self._planned(file, commit) for file in json.loads(self.body)["files"]]}
            case "POST", ["commit", revision]:
                return self._write(name, repository, revision)
            case "POST", ["branch" | "tag" as kind, ref]:
                refs = repository.branches if kind == "branch" else repository.tags
                if ref in refs:
                    raise _Refused(409, f"Reference {ref} exists already.")
                wanted = json.loads(self.body or b"{}")
                start = wanted.get("startingPoint") or "main"
                if kind == "tag":
                    start, ref = ref, wanted["tag"]
                    if ref in refs:
                        raise _Refused(409, f"Tag {ref} exists already.")
                refs[ref] = self._commit(repository, start).oid
                return 201, {}
            case "GET", ["xet-read-token" | "xet-write-token" as kind, _]:
                if kind == "xet-write-token":
                    self._repository(name, to_write=True)
                address, expires = f"{self.hub.url}/xet", int(time.time()) + 3600
                headers = {
                    "X-Xet-Cas-Url": address,
                    "X-Xet-Access-Token": kind,
                    "X-Xet-Token-Expiration": str(expires),
                }
                return 200, {"casUrl": address, "accessToken": kind, "exp": expires}, headers
            case "GET", ["refs"]:
                kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
                return 200, {
                    kind: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in refs.items()]
                    for kind, (folder, refs) in kinds.items()
                } | {"converts": []}
            case "GET", ["tree", revision, *path]:
                return 200, self._tree(self._commit(repository, revision), "/".join(path))
            case "GET", [] | ["revision", _]:
                commit = self._commit(repository, rest[1] if rest else "main")
                readme = self.hub.contents[commit.files["README.md"]].decode() if "README.md" in commit.files else ""
                card = _metadata(readme)
                return 200, {
                    "id": name,
                    "modelId": name,
                    "sha": commit.oid,
                    "private": repository.private,
                    "tags": [*card.get("tags", []), *(f"license:{card[key]}" for key in ("license",) if key in card)],
                    "pipeline_tag": card.get("pipeline_tag"),
                    "library_name": card.get("library_name"),
                    "cardData": card,
                    "siblings": [{"rfilename": path} for path in commit.files],
                }
        raise _Refused(501, f"The stand-in does not know {self.command} {self.path}.")

    def _xet(self, rest: list[str]) -> tuple[Any, ...]:
        """Access tokens of Xet storage are good for one thing, here named by it; fetched ranges need none."""
        xet, allowed = self.hub.xet, self.headers.get("Authorization", "").removeprefix("Bearer ")
        match self.command, rest:
            case "GET", ["fetch", xorb]:
                return self._content(xet.xorbs[xorb], {})
            case "GET", ["v1", "reconstructions", name] if allowed.startswith("xet-"):
                return 200, xet.reconstruction(name, f"{self.hub.url}/xet/fetch")
            case "POST", ["v1", "xorbs", _, name] if allowed == "xet-write-token":
                xet.xorbs[name] = self.body
                return 200, {"was_inserted": True}
            case "POST", ["v1", "shards"] if allowed == "xet-write-token":
                self.hub.contents |= {f"lfs:{digest}": content for digest, content in xet.add_shard(self.body).items()}
                return 200, {"result": 1}
            case _, ["v1", "chunks" | "xorb-grants", *_] | ["v2", *_]:
                raise _Refused(404, "Not in this store.")
        raise _Refused(501, f"The stand-in does not know {self.command} {self.path} with {allowed!r}.")

    def _create(self, wanted: Mapping[str, Any]) -> tuple[Any, ...]:
        if self._user is None:
            raise _Refused(401, "Invalid username or password.")
        name = f"{wanted.get('organization') or self._user}/{wanted['name']}"
        if not name.startswith(f"{self._user}/"):
            raise _Refused(403, f"You may not create {name}.")
        about = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return 409, about | {"error": "You already created this model repo"}
        repository = Repository(bool(wanted.get("private")) or wanted.get("visibility") == "private")
        repository.commit("initial commit", "main", {})
        self.hub.repositories[name] = repository
        return 200, about

    def _validate(self, card: str) -> tuple[Any, ...]:
        """The little that is sure to be refused or to be warned of: https://huggingface.co/docs/hub/model-cards."""
        try:
            data = _metadata(card)
        except (yaml.YAMLError, ValueError) as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        errors = []
        for model in data.get("model-index") or ():
            for index, result in enumerate(model.get("results") or ()):
                complete = all("type" in result.get(part, {}) for part in ("task", "dataset")) and result.get("metrics")
                if not complete or "name" not in result["dataset"]:
                    errors.append({"message": f'"model-index[0].results[{index}]" lacks task, dataset or metrics'})
        return (400 if errors else 200), {"errors": errors, "warnings": warnings}

    def _planned(self, file: Mapping[str, Any], commit: Commit) -> dict[str, Any]:
        key = commit.files.get(file["path"])
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        about = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        return about | ({} if key is None else {"oid": key.removeprefix("lfs:")})

    def _batch(self, wanted: Mapping[str, Any]) -> tuple[Any, ...]:
        objects = []
        for item in wanted["objects"]:
            found = {"oid": item["oid"], "size": item["size"]}
            if f"lfs:{item['oid']}" not in self.hub.contents:
                found["actions"] = {"upload": {"href": f"{self.hub.storage}/{item['oid']}"}}
            objects.append(found)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _write(self, name: str, repository: Repository, branch: str) -> tuple[Any, ...]:
        if branch not in repository.branches:
            raise _Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(self._commit(repository, branch).files)
        title = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = git_hash(content)
                    self.hub.contents[git_hash(content)] = content
                case "lfsFile":
                    key = f"lfs:{value['oid']}"
                    if key not in self.hub.contents:
                        raise _Refused(400, f"{value['path']} was never uploaded.")
                    files[value["path"]] = key
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise _Refused(501, f"The stand-in does not know the operation {other}.")
        commit = repository.commit(title, branch, files)
        return 200, {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}",
        }

    def _tree(self, commit: Commit, folder: str) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        inside = {path: key for path, key in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise _Refused(404, f"{folder} does not exist.", "EntryNotFound")
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path, key in inside.items():
            first, *below = path.removeprefix(prefix).split("/")
            if below and prefix + first not in entries:
                name = prefix + first
                entries[name] = {"type": "directory", "oid": git_hash(name.encode()), "size": 0, "path": name}
            if not below or recursive:
                size = len(self.hub.contents[key])
                entries[path] = {"type": "file", "oid": git_hash(key.encode()), "size": size, "path": path}
                if key.startswith("lfs:"):
                    lfs = {"oid": key.removeprefix("lfs:"), "size": size, "pointerSize": 134}
                    entries[path]["lfs"] = lfs
                else:
                    entries[path]["oid"] = key
        return list(entries.values())

    def _resolve(self, name: str, revision: str, path: str) -> tuple[Any, ...]:
        commit = self._commit(self._repository(name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        key = commit.files[path]
        content = self.hub.contents[key]
        if not key.startswith("lfs:"):
            return self._content(content, headers | {"ETag": f'"{key}"'})
        oid = key.removeprefix("lfs:")
        headers |= {
            "X-Linked-ETag": f'"{oid}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.storage}/{oid}",
        }
        if oid in self.hub.xet.hashes:
            route = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": self.hub.xet.hashes[oid], "Link": f'<{route}>; rel="xet-auth"'}
        return 302, b"", headers

    def _content(self, content: bytes, headers: Mapping[str, str]) -> tuple[Any, ...]:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        wanted = self.headers.get("Range")
        if wanted is None:
            return 200, content, headers
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        return 206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}


def _metadata(card: str) -> dict[str, Any]:
    """The YAML at the head of a card."""
    if not card.startswith("---\n"):
        return {}
    data = yaml.safe_load(card.split("---\n")[1]) or {}
    if not isinstance(data, dict):
        raise ValueError("The metadata should be a mapping.")
    return data
