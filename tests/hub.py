"""A small Hugging Face hub on loopback, with what the real one is asked for and how it fails.

Written from the requests that huggingface_hub sends and the answers that it reads: models, data
sets, commits and branches, ETags, large files behind a redirect with their SHA-256, gated and
missing things with the real error codes, pull requests, and uploads. Nothing leaves the machine.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.hub_repos import TOKEN, Failure, Repo, files_of
from tests.hub_requests import RequestHandler


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
        handler = type("Handler", (RequestHandler,), {"hub": self})
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
