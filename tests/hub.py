"""A small Hugging Face hub on loopback, with what the real one is asked for and how it fails.

Written from the requests that huggingface_hub sends and the answers that it reads: models, data
sets, commits and branches, ETags, large files behind a redirect with their SHA-256, gated and
missing things with the real error codes, pull requests, and uploads. Nothing leaves the machine.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "a" * 34
LARGE = (".safetensors", ".npz", ".bin", ".gz", ".parquet")  # kept in LFS, whatever their size


@dataclass
class Commit:
    """The files of a repository at one commit."""

    files: dict[str, bytes]
    sha: str = ""

    def __post_init__(self) -> None:
        content = b"".join(name.encode() + data for name, data in sorted(self.files.items()))
        self.sha = self.sha or hashlib.sha1(content).hexdigest()


@dataclass
class Repo:
    """A repository: its commits by SHA, and branches, tags and pull requests by name."""

    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    accepted: bool = False  # the licence, by who owns TOKEN
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], *, sha: str = "", ref: str = "main") -> str:
        """Add a commit; returns its SHA."""
        commit = Commit(files, sha)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit.sha

    def pull_request(self, number: int, files: dict[str, bytes], **facts: Any) -> str:
        """Add a pull request, by default an open one of the converter; returns its commit."""
        row = {
            "num": number,
            "title": "Adding `safetensors` variant of this model",
            "author": {"name": "SFconvertbot"},
            "status": "open",
            "isPullRequest": True,
            "createdAt": "2023-03-15T12:00:00.000Z",
        }
        self.discussions.append(row | facts)
        return self.commit(files, ref=f"refs/pr/{number}")


@dataclass
class Failure:
    """What goes wrong, for requests whose method and path match."""

    where: re.Pattern[str]
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # after half of the body, or before any answer
    page: bytes = b""  # answered to everything, as a network does that wants a login first
    silent: bool = False
    seconds: float = 0.0  # before the answer
    times: int = -1  # how often; -1 is always


class Hub:
    """The hub: `models`, `datasets`, what it was asked (`log`), and how it fails (`failures`)."""

    def __init__(self, *, certificate: Path | None = None) -> None:
        self.models: dict[str, Repo] = {}
        self.datasets: dict[str, Repo] = {}
        self.tokens = {TOKEN}
        self.log: list[str] = []
        self.failures: list[Failure] = []
        self.uploads: dict[str, bytes] = {}
        self.connections: list[socket.socket] = []
        self.also: list[Hub] = []  # stopped with this one
        self.spoiled: set[str] = set()  # large files that a proxy changes on the way
        self.xet = False  # whether large files are said to lie in Xet storage
        self._closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = f"{scheme}://127.0.0.1:{self.server.server_address[1]}"
        self.cdn = f"http://localhost:{self.server.server_address[1]}"  # another host, as there
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def model(self, name: str, files: dict[str, bytes] | Path, *, sha: str = "") -> Repo:
        """Add a model with one commit on main; a folder stands for its files."""
        return self._add(self.models, name, files, sha)

    def dataset(self, name: str, files: dict[str, bytes], *, sha: str = "") -> Repo:
        """Add a data set with one commit on main."""
        return self._add(self.datasets, name, files, sha)

    def repo(self, kind: str, name: str) -> Repo:
        """Return a model or a data set."""
        return (self.datasets if kind == "dataset" else self.models)[name]

    def _add(self, where: dict[str, Repo], name: str, files: Any, sha: str) -> Repo:
        repo = where.setdefault(name, Repo())
        repo.commit(files_of(files) if isinstance(files, Path) else files, sha=sha)
        return repo

    def fail(self, where: str = r"\w+ /.+", **how: Any) -> None:
        """Fail from now on at `METHOD /path` that match; not at `HEAD /` unless said."""
        self.failures.append(Failure(re.compile(where), **how))

    def asked(self, pattern: str) -> list[str]:
        """Return the requests so far that match."""
        return [line for line in self.log if re.search(pattern, line)]

    def wait(self, seconds: float) -> None:
        """Say nothing for a while, or until the hub stops."""
        self._closing.wait(seconds)

    def stop(self) -> None:
        """Stop listening: from now on connections are refused."""
        for other in self.also:
            other.stop()
        if self._closing.is_set():
            return
        self._closing.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def git_hash(data: bytes) -> str:
    """Return the name that Git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def facts_of(name: str, data: bytes) -> dict[str, Any]:
    """Describe a file as the hub's listing does."""
    facts: dict[str, Any] = {"path": name, "size": len(data), "oid": git_hash(data)}
    if name.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        facts["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}
    return facts


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    failure: Failure | None = None

    def log_message(self, *args: Any) -> None:
        pass

    # ------------------------------------------------------------ dispatch

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        url = urlsplit(self.path)
        path = unquote(url.path)
        line = f"{self.command} {path}"
        self.hub.log.append(line)
        self.failure = next(
            (one for one in self.hub.failures if one.times and one.where.match(line)), None
        )
        if self.failure and not self._survives(self.failure):
            return
        try:
            for pattern, name in _ROUTES:
                match = re.fullmatch(pattern, line)
                if match:
                    getattr(self, name)(query=parse_qs(url.query), **match.groupdict())
                    return
            raise _Refused(404, "", f"no such place: {line}")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            kept = {name: value for name, value in headers.items() if value}
            self._answer({"error": refused.message}, status=refused.status, headers=kept)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _chunks(self) -> bytes:
        """Read a body of unknown length, as uploads send it."""
        data = b""
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return data

    def _survives(self, failure: Failure) -> bool:
        """Fail as told; True where the answer comes all the same, be it late or cut."""
        failure.times -= failure.times > 0
        if failure.silent:
            self.hub.wait(60)
            self.close_connection = True
            return False
        self.hub.wait(failure.seconds)
        if failure.page:
            self._answer(failure.page)
            return False
        if failure.status:
            self._answer({"error": ""}, status=failure.status, headers=failure.headers)
            return False
        if failure.cut and "/resolve/" not in self.path and "/lfs/" not in self.path:
            self.close_connection = True
            return False
        return True

    def _answer(
        self,
        content: Any = b"",
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure and self.failure.cut:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)

    # ------------------------------------------------------------ access

    def _token(self) -> str | None:
        """Return the token, if one was sent.

        Raises:
            _Refused: It is none of the hub's.
        """
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return token or None

    def _repo(self, kind: str | None, name: str) -> Repo:
        token = self._token()
        repos = self.hub.datasets if kind == "datasets" else self.hub.models
        repo = repos.get(name)
        if repo is None or (repo.private and not token):
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo: Repo, revision: str | None) -> Commit:
        sha = repo.refs.get(revision or "main", revision or "main")
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo.commits[sha]

    def _file(self, kind: str | None, name: str, revision: str, file: str) -> tuple[bytes, Commit]:
        repo = self._repo(kind, name)
        if repo.gated and not repo.accepted:
            status = 403 if self._token() else 401
            raise _Refused(status, "GatedRepo", f"Access to model {name} is restricted.")
        commit = self._commit(repo, revision)
        if file not in commit.files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        return commit.files[file], commit

    # ------------------------------------------------------------ reading

    def front_page(self, query: Any) -> None:
        self._answer(b"")

    def info(self, query: Any, kind: str, name: str, revision: str | None = None) -> None:
        repo = self._repo(kind, name)
        commit = self._commit(repo, revision)
        siblings = []
        for file, data in commit.files.items():
            facts = facts_of(file, data)
            row = {"rfilename": file}
            if "blobs" in query:
                row |= {"size": facts["size"], "blobId": facts["oid"]}
                row |= {"lfs": facts["lfs"]} if "lfs" in facts else {}
            siblings.append(row)
        self._answer(
            {
                "id": name,
                "modelId": name,
                "sha": commit.sha,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "siblings": siblings,
                "tags": [],
            }
        )

    def tree(self, query: Any, kind: str, name: str, revision: str) -> None:
        commit = self._commit(self._repo(kind, name), revision)
        rows = [{"type": "file"} | facts_of(*item) for item in commit.files.items()]
        self._answer(rows)

    def discussions(self, query: Any, kind: str, name: str) -> None:
        rows = self._repo(kind, name).discussions
        rows = [row | {"repo": {"name": name, "type": kind.removesuffix("s")}} for row in rows]
        self._answer({"discussions": rows, "count": len(rows), "start": 0})

    def resolve(self, query: Any, name: str, revision: str, file: str, kind: str = "") -> None:
        data, commit = self._file(kind or None, name, revision, file)
        facts = facts_of(file, data)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{facts["oid"]}"'}
        if "lfs" not in facts:
            self._send(data, headers)
            return
        digest = facts["lfs"]["sha256"]
        self.hub.uploads[digest] = data
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        if self.hub.xet:
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.hub.url}/api/xet"}
        self._answer(
            b"", status=302, headers=headers | {"Location": f"{self.hub.cdn}/lfs/{digest}"}
        )

    def xet_token(self, query: Any) -> None:
        """Send who asks to a storage that is not there: nothing listens on port 9."""
        headers = {
            "X-Xet-Cas-Url": "http://127.0.0.1:9",
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
        }
        self._answer({}, headers=headers)

    def large_file(self, query: Any, digest: str) -> None:
        data = self.hub.uploads[digest]
        if digest in self.hub.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(data, {"ETag": f'"{digest}"'})

    def _send(self, data: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the part of it that is asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            self._answer(data[start:stop], status=206, headers=headers)
        elif self.failure and self.failure.cut:
            self._answer(data, headers=headers, length=len(data))
        else:
            self._answer(data, headers=headers)

    # ------------------------------------------------------------ writing

    def whoami(self, query: Any) -> None:
        if self._token() is None:
            raise _Refused(401, "", "Invalid username or password.")
        self._answer({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, query: Any) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.models[name] = Repo(private=bool(private))
        self.hub.models[name].commit({})
        self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate(self, query: Any) -> None:
        self._answer({"errors": [], "warnings": []})

    def preupload(self, query: Any, kind: str, name: str, revision: str) -> None:
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer({"files": rows})

    def lfs_batch(self, query: Any, name: str) -> None:
        rows = [
            row | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{row['oid']}"}}}
            for row in json.loads(self.body)["objects"]
        ]
        self._answer({"transfer": "basic", "objects": rows})

    def upload(self, query: Any, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.hub.uploads[digest] = self.body
        self._answer(b"")

    def make_commit(self, query: Any, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name)
        files = dict(self._commit(repo, revision).files)
        for line in self.body.decode().splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        sha = repo.commit(files, ref=revision)
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


_NAME, _REV = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_ROUTES: list[tuple[str, str]] = [
    (r"HEAD /", "front_page"),
    (r"GET /api/whoami-v2", "whoami"),
    (r"GET /api/xet", "xet_token"),
    (rf"GET {_API}/revision/{_REV}", "info"),
    (rf"GET {_API}/tree/{_REV}/?", "tree"),
    (rf"GET {_API}/discussions", "discussions"),
    (rf"GET {_API}", "info"),
    (rf"(?:HEAD|GET) /(?P<kind>datasets)/{_NAME}/resolve/{_REV}/(?P<file>.+)", "resolve"),
    (rf"(?:HEAD|GET) /{_NAME}/resolve/{_REV}/(?P<file>.+)", "resolve"),
    (r"(?:HEAD|GET) /lfs/(?P<digest>\w+)", "large_file"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST {_API}/preupload/{_REV}", "preupload"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /upload/(?P<digest>\w+)", "upload"),
    (rf"POST {_API}/commit/{_REV}", "make_commit"),
]


@contextlib.contextmanager
def loopback_hub(monkeypatch: Any, folder: Path) -> Iterator[Hub]:
    """Run a hub, and make this process use it, with an empty cache in `folder` and no token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from prunebench.download import hub as module

    hub = Hub()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    use(monkeypatch, hub.url, folder)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(module, "PAUSES_SECONDS", ())
    try:
        yield hub
    finally:
        close_session()
        hub.stop()
        module.hub_problem.cache_clear()


def use(monkeypatch: Any, url: str, folder: Path) -> None:
    """Point huggingface_hub, which read its environment long ago, to a hub and a cache."""
    import datasets
    from huggingface_hub import constants

    from prunebench.download import hub as module

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_XET_CACHE": str(folder / "xet"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    module.hub_problem.cache_clear()
