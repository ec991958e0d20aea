"""Where models come from: names, wheels, GGUF files, folders; what is damaged or missing."""

import hashlib
import http.client
import io
import json
import shutil
import urllib.error
import urllib.request
import zipfile

import pytest

from prunebench.download import wheels
from prunebench.download.wheels import Wheel
from prunebench.errors import IncompatibleData, MissingResource, UsageError
from prunebench.models import source as module
from prunebench.models.load import load_model, load_tokenizer
from prunebench.models.safetensors_files import check_weight_files, read_header
from prunebench.models.source import catalog, fetch_model, find_model, local_path
from prunebench.progress import Silent
from prunebench.testing import tiny_model


@pytest.mark.parametrize("name", list(catalog()))
def test_every_alias_is_complete(name):
    entry = catalog()[name]
    assert bool(entry.hub) != bool(entry.wheel)
    assert entry.dtype in ("float32", "float16", "bfloat16")
    assert entry.license and entry.size
    assert entry.revision is None or len(entry.revision) == 40
    assert find_model(name).kind == ("hub" if entry.hub else "wheel")


def test_the_issue_s_aliases_are_there():
    expected = {
        "smollm2-135m-q4", "llama2-7b", "llama2-13b", "llama2-70b", "llama3-8b", "llama3.1-8b",
        "mistral-7b", "qwen2.5-0.5b", "qwen2.5-7b", "gemma3-270m", "gemma3-1b", "opt-125m",
        "opt-66b", "bloom-560m", "bloom-176b",
    }  # fmt: skip
    assert expected <= catalog().keys()


def test_names_are_understood(tiny_folder, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model(str(tiny_folder)).kind == "folder"
    assert find_model(str(tiny_folder)).id == "tiny-llama"
    assert find_model(str(tmp_path / "m.gguf")).kind == "gguf"
    hub = find_model("org/name@abc123")
    assert (hub.kind, hub.location, hub.revision, hub.id) == (
        "hub",
        "org/name",
        "abc123",
        "org/name",
    )


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("lama2-7b", UsageError, "did you mean 'llama2-7b'?"),
        ("./nowhere", MissingResource, "there is no model at ./nowhere"),
        ("/a/b/c", MissingResource, "there is no model at"),
        ("weights.gguf", MissingResource, "there is no model at"),
    ],
)
def test_names_that_are_not(name, error, says):
    with pytest.raises(error) as caught:
        find_model(name)
    assert says in str(caught.value)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(IncompatibleData, match="not a GGUF file"):
        find_model(str(tmp_path / "model.bin"))


def test_a_folder_s_revision_follows_its_content(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    before = fetch_model(find_model(str(tiny_folder)), Silent()).revision
    assert fetch_model(find_model(str(copy)), Silent()).revision == before
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with_template = fetch_model(find_model(str(copy)), Silent()).revision
    assert with_template != before
    (copy / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert fetch_model(find_model(str(copy)), Silent()).revision != with_template
    (copy / "chat_template.jinja").unlink()
    assert fetch_model(find_model(str(copy)), Silent()).revision == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert fetch_model(find_model(str(copy)), Silent()).revision != before


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:4]), "is damaged"),
        (lambda p: p.write_bytes(b""), "is damaged"),
        (lambda p: p.write_bytes(b"\xff" * 1000), "is damaged"),
        (lambda p: p.write_bytes((8).to_bytes(8, "little") + b"not json"), "is damaged"),
        (lambda p: p.unlink(), "holds no safetensors"),
        (lambda p: p.rename(p.with_name("pytorch_model.bin")), "holds no safetensors"),
    ],
)
def test_damaged_weights_are_found_without_loading(tiny_folder, tmp_path, damage, says):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    damage(copy / "model.safetensors")
    with pytest.raises(IncompatibleData, match=says) as error:
        fetch_model(find_model(str(copy)), Silent())
    assert str(copy) in error.value.what


def test_a_missing_shard_is_named(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IncompatibleData, match=r"model-1\.safetensors is damaged"):
        check_weight_files(copy)


def test_headers_tell_shapes(tiny_folder):
    header = read_header(tiny_folder / "model.safetensors")
    assert header["model.norm.weight"]["shape"] == [32]


def test_a_tensor_that_is_missing_is_not_made_up(tiny_folder, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleData, match="lacks 1 tensors") as error:
        load_model(copy, dtype=torch.float32, device=torch.device("cpu"))
    assert "layers.1.mlp.up_proj" in error.value.where


def test_a_folder_is_hashed_and_checked_once_until_a_file_changes(
    tiny_folder, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    hashed, checked = [], []
    real_hash, real_check = module.sha256_file, module.check_weight_files
    monkeypatch.setattr(
        module, "sha256_file", lambda path, **kw: hashed.append(path) or real_hash(path, **kw)
    )
    monkeypatch.setattr(
        module, "check_weight_files", lambda path: checked.append(path) or real_check(path)
    )
    first = fetch_model(find_model(str(folder)), Silent())
    work = len(hashed), len(checked)
    assert fetch_model(find_model(str(folder)), Silent()) == first
    assert (len(hashed), len(checked)) == work and min(work) > 0
    config = folder / "config.json"
    config.write_text(config.read_text("utf-8") + " ", "utf-8")
    assert fetch_model(find_model(str(folder)), Silent()).revision != first.revision


def test_a_folder_without_tokenizer(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    with pytest.raises(MissingResource, match="no usable tokenizer"):
        load_tokenizer(tmp_path / "m")


# ---------------------------------------------------------------- wheels


class Index:
    """A package index of one file, served to urllib: it can cut off, lie, or be away."""

    def __init__(self, data: bytes):
        self.data, self.cut_after, self.away = data, None, False
        self.ranges = []

    def urlopen(self, request, timeout):
        if self.away:
            raise urllib.error.URLError("no route to host")
        if "pkg.whl" not in request.full_url:
            listing = {
                "files": [
                    {"filename": "pkg.whl", "url": "https://x/pkg.whl", "size": len(self.data)}
                ]
            }
            return Response(json.dumps(listing).encode(), 200)
        start = int(request.get_header("Range").removeprefix("bytes=").rstrip("-"))
        self.ranges.append(start)
        body = self.data[start:]
        return Response(body, 206, cut_after=self.cut_after)


class Response(io.BytesIO):
    def __init__(self, body, status, cut_after=None):
        super().__init__(body)
        self.status, self.left = status, cut_after

    def read(self, size=-1):
        if self.left is None:
            return super().read(size)
        if self.left <= 0:
            raise ConnectionResetError("connection reset")
        block = super().read(min(size, self.left))
        self.left -= len(block)
        return block


def short_read(self, size=-1):
    if self.left is not None:
        size = self.left if size < 0 else min(size, self.left)
        self.left -= size
    return io.BytesIO.read(self, size)


@pytest.fixture
def index(monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pkg/data.txt", "hello " * 200_000)
    served = Index(buffer.getvalue())
    monkeypatch.setattr(urllib.request, "urlopen", served.urlopen)
    monkeypatch.setattr(
        wheels.subprocess, "run", lambda *a, **k: wheels.subprocess.CompletedProcess(a, 1)
    )
    return served


def the_wheel(index, sha256=None):
    return Wheel("pkg==1", "pkg.whl", sha256 or hashlib.sha256(index.data).hexdigest())


def test_a_member_is_read_out_of_the_wheel(index):
    with the_wheel(index).open_member("pkg/data.txt", Silent()) as stream:
        assert stream.read(6) == b"hello "
    index.away = True  # the second time nothing is downloaded
    with the_wheel(index).open_member("pkg/data.txt", Silent()) as stream:
        assert stream.read(6) == b"hello "


def test_a_download_resumes_where_it_was_cut_off(index):
    index.cut_after = 300_000
    with pytest.raises(MissingResource, match="cannot be downloaded"):
        the_wheel(index).fetch(Silent())
    assert not the_wheel(index).path.exists()
    index.cut_after = None
    the_wheel(index).fetch(Silent())
    assert index.ranges == [0, 300_000]
    assert the_wheel(index).path.read_bytes() == index.data


def test_a_wheel_with_a_wrong_hash_is_not_kept(index):
    wheel = the_wheel(index, sha256="0" * 64)
    with pytest.raises(IncompatibleData, match="has the wrong hash") as error:
        wheel.fetch(Silent())
    assert "expected 000" in error.value.where
    assert not wheel.path.exists()
    assert not wheel.path.with_suffix(".part").exists()


def test_a_wheel_damaged_in_the_cache_is_fetched_again(index):
    wheel = the_wheel(index)
    wheel.fetch(Silent())
    wheel.path.write_bytes(b"damaged")
    assert wheel.fetch(Silent()).read_bytes() == index.data


def test_no_network_says_what_to_do(index):
    index.away = True
    with pytest.raises(MissingResource) as error:
        the_wheel(index).fetch(Silent())
    assert error.value.exit_code == 3
    assert "no route to host" in error.value.where
    assert str(the_wheel(index).path) in error.value.fix


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (urllib.error.HTTPError("https://x", 404, "Not Found", {}, None), "answered 404 Not Found"),
        (urllib.error.HTTPError("https://x", 429, "Slow down", {}, None), "answered 429 Slow down"),
        (urllib.error.URLError(ConnectionRefusedError(111, "refused")), "refused"),
        (TimeoutError("timed out"), "no answer within 20 s"),
        (http.client.RemoteDisconnected("closed without response"), "closed without response"),
        (http.client.IncompleteRead(b"x", 9), "IncompleteRead"),
        (json.JSONDecodeError("no", "<html>", 0), "a login page"),
        (KeyError("files"), "a login page"),
    ],
)
def test_each_failure_of_the_index_says_what_it_was(index, monkeypatch, failure, says):
    def fails(request, timeout):
        raise failure

    monkeypatch.setattr(urllib.request, "urlopen", fails)
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:secret@index.example/simple")
    with pytest.raises(MissingResource) as caught:
        the_wheel(index).fetch(Silent())
    assert says in caught.value.where and "index.example" in caught.value.where
    assert "secret" not in str(caught.value)


def test_a_line_cut_without_an_error_is_no_wrong_hash(index, monkeypatch):
    """urllib returns what came, and then the end."""
    monkeypatch.setattr(Response, "read", short_read)
    index.cut_after = 300_000
    with pytest.raises(MissingResource, match="cannot be downloaded") as caught:
        the_wheel(index).fetch(Silent())
    assert "cut off after 300,000 of" in caught.value.where
    index.cut_after = None
    assert the_wheel(index).fetch(Silent()).read_bytes() == index.data
    assert index.ranges == [0, 300_000]


def test_pip_is_asked_where_the_index_does_not_answer(index, monkeypatch):
    index.away = True

    def pip(command, **kwargs):
        from pathlib import Path

        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / "pkg.whl").write_bytes(index.data)
        assert "--no-deps" in command and command[-1] == "pkg==1"
        return wheels.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    assert the_wheel(index).fetch(Silent()).read_bytes() == index.data


# ---------------------------------------------------------------- the hub and GGUF


def test_a_hub_model_that_is_not_here_says_what_to_do():
    """The hub is switched off in tests, which huggingface_hub reports like a missing network."""
    with pytest.raises(MissingResource, match=r"org/name cannot be downloaded") as error:
        fetch_model(find_model("org/name"), Silent())
    assert "give a local folder" in error.value.fix
    assert local_path(find_model("org/name")) is None


def test_a_gguf_that_is_none(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(IncompatibleData, match="cannot be read as a GGUF model"):
        fetch_model(find_model(str(tmp_path / "m.gguf")), Silent())


def test_a_converted_folder_damaged_since_is_converted_again(tiny_folder, tmp_path, monkeypatch):
    from prunebench.models import gguf

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    made = []

    def convert(path, folder):
        made.append(path)
        shutil.copytree(tiny_folder, folder)

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    source = find_model(str(tmp_path / "m.gguf"))
    local = fetch_model(source, Silent())
    fetch_model(source, Silent())
    assert len(made) == 1
    weights = local.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    fetch_model(source, Silent())
    assert len(made) == 2
    assert module.local_path(find_model("smollm2-135m-q4")) is None
