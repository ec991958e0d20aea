"""Requests to the loopback hub: what each route answers, and how it fails on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_repos import LARGE, Commit, Failure, Repo, facts_of

if TYPE_CHECKING:
    from tests.hub import Hub


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class RequestHandler(BaseHTTPRequestHandler):
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
        matching = (f for f in self.hub.failures if f.times and f.where.match(line))
        self.failure = next(matching, None)
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
            present = {name: value for name, value in headers.items() if value}
            self._answer({"error": refused.message}, status=refused.status, headers=present)

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
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested:
            start, stop = int(requested[1]), int(requested[2] or len(data) - 1) + 1
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
        options = json.loads(self.body)
        name = f"{options.get('organization') or 'me'}/{options['name']}"
        private = options.get("private") or options.get("visibility") == "private"
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
