"""Text files as people have them: read right, or refused with what they are and what to do."""

import gzip
import json

import pytest

from prunebench.calibration.texts import read_text_file
from prunebench.errors import IncompatibleData
from tests.conftest import prose

TEXT = prose(3000, seed=8)


@pytest.mark.parametrize(
    ("data", "says", "fix"),
    [
        (TEXT.encode("utf-16"), "is UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is UTF-16 text", "iconv -f UTF-16"),
        (TEXT.encode("utf-16-le"), "is UTF-16 text", "iconv -f UTF-16"),  # valid UTF-8, and wrong
        (TEXT.encode("utf-32"), "is UTF-32 text", "iconv -f UTF-32"),
        ((TEXT + " café").encode("latin-1"), "is not UTF-8 text", "iconv -f ISO-8859-1"),
        (gzip.compress(TEXT.encode()), "is compressed with gzip", ".gz"),
        (b"", "is empty", "a file with text"),
        (b"\xef\xbb\xbf", "is empty", "a file with text"),
        (b"\n \r\n\t" * 900, "nothing but white space", "a file with text"),
        (b"PAR1" + bytes(range(256)) * 9, "is not UTF-8 text", "convert it"),
    ],
    ids=["utf-16", "utf-16-be", "unmarked", "utf-32", "latin-1", "gzip", "empty", "mark", "blank",
         "binary"],
)  # fmt: skip
@pytest.mark.parametrize("option", ["--ppl", "--calibration"])
def test_what_is_no_utf8_text_is_named_with_what_to_do(
    cli, tiny_run, tmp_path, data, says, fix, option
):
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    outcome = cli(*tiny_run, "-m", "wanda", option, f"file:{path}", code=4)
    what, *rest = outcome.stderr[outcome.stderr.index("error: ") :].splitlines()
    assert str(path) in what and says in what
    assert fix in rest[-1] and len(rest) <= 2
    assert "\nload " not in outcome.stderr


def test_a_byte_order_mark_is_no_token(cli, tiny_run, tmp_path):
    """With or without the mark it is the same text: tokens, protocol and score."""
    scores = []
    for name, data in (("a.txt", TEXT.encode()), ("b.txt", TEXT.encode("utf-8-sig"))):
        (tmp_path / name).write_bytes(data)
        run = [*tiny_run, "-m", "dense", "--ppl", f"file:{tmp_path / name}", "--json"]
        scores.append(json.loads(cli(*run).stdout)["scores"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["x.txt", "x.gz"])
def test_what_is_text_comes_through_as_it_is(tmp_path, name):
    text = "one line\r\nhéllo 🌍\0\nﬀ \ufeff within\n" * 20
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_text_file(tmp_path / name) == text


def test_damaged_compression_is_named(tmp_path):
    path = tmp_path / "x.gz"
    data = bytearray(gzip.compress(TEXT.encode()))
    for damaged in (data[:-20], data[:30] + bytes(40) + data[70:], b"plain text"):
        path.write_bytes(bytes(damaged))
        with pytest.raises(IncompatibleData, match="not a sound gzip file"):
            read_text_file(path)


def test_a_text_of_one_token_gives_no_impossible_advice(cli, tiny_run, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a")
    for option in ("--ppl", "--calibration"):
        output = cli(*tiny_run, "-m", "wanda", option, f"file:{path}", code=4).stderr
        assert "is too short: 1 tokens" in output
        assert "another text" in output or "use a longer text" in output
        assert "--ppl-seqlen 1" not in output and "samples 0" not in output
