"""What is listed fits the terminal: no line is wider, no word is broken, nothing is left out."""

import os
import pty
import re
import shlex
import struct
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.cells import cell_len

from prunebench.cli import console
from prunebench.cli.fitting import hanging, hanging_columns
from tests.factories import without_cpu_kernels

RECIPE = """
about = "Two methods at two sparsities on a tiny model, calibrated on a text of this very machine."
model = "{model}"
calibration = "file:{text}"
ppl = "file:{other}"
needs.time = "a second or two on any machine, and here too, if nothing else is running beside it"

[[grid]]
method = ["magnitude", "wanda"]
sparsity = ["0.5", "2:4"]
"""
PROBED = re.compile(
    r" time .*? spec |[\d.]+ [GM]B (of memory )?free|[\d.]+ GB (at the peak|Python and libraries)"
)
"""What differs between two calls of a command: seconds of a probe, free memory, what this process
has resident."""


def words_of(output):
    words = " ".join(word for word in output.split() if word != "\\")
    return PROBED.sub("", words).split()


@pytest.fixture
def printed(cli, tiny_run, tiny_folder, text_file, eval_file, monkeypatch):
    """Run a command, its stdout in a pipe or on a terminal of so many columns."""
    without_cpu_kernels(monkeypatch)  # `bench` would measure, and print other speeds every time
    cli(
        *tiny_run, "-m", "magnitude", "--sparsity", "2:4", "--dtype", "bfloat16", "--save-model",
        "ck", "--quiet",
    )  # fmt: skip
    Path("r.toml").write_text(RECIPE.format(model=tiny_folder, text=text_file, other=eval_file))
    commands = {
        "dry run": [*tiny_run, "-m", "wanda", "--sparsity", "2:4", "--dry-run", "-q"],
        "dry training": [*tiny_run, "-m", "maskllm", "--set", "steps=2", "--set", "batch=2",
                         "--set", "train_seqlen=24", "--dry-run", "-q"],
    }  # fmt: skip

    def run(command, columns):
        monkeypatch.setattr(console, "terminal_width", lambda err=False: columns)
        return cli(*commands.get(command, command.split())).stdout

    return run


@pytest.mark.parametrize(
    "command",
    [
        "list methods", "list allocators", "list recoverers", "list models", "list texts",
        "models list", "inspect ck", "inspect ck --all", "bench ck -q", "bench ck --explain -q",
        "doctor", "dry run", "dry training", "validate r.toml", "sweep r.toml --dry-run",
        pytest.param("check magnitude", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_listing_fits_and_breaks_no_word(command, printed):
    plain = printed(command, None)
    for columns in (80, 100, 120):
        shown = printed(command, columns)
        for line in shown.splitlines():
            # a path that is wider than the terminal has a line of its own
            assert cell_len(line) <= columns or len(line.rstrip("\\").split()) == 1, line
        assert words_of(shown) == words_of(plain)
    assert "…" not in plain


def test_a_command_can_be_copied_and_values_stay_beside_their_flags(monkeypatch, capsys):
    monkeypatch.setattr(console, "terminal_width", lambda err=False: 30)
    words = ["run", "--model", "a b", "--json", "--sparsity", "0.5", "--ppl", "file:" + "x" * 30]
    console.print_command("to run  ", words)
    shown = capsys.readouterr().out
    assert shlex.split(shown.removeprefix("to run  ").replace("\\\n", "")) == words
    assert "--sparsity 0.5" in shown and "--model 'a b'" in shown
    wide = [line for line in shown.splitlines() if len(line) > 30]
    assert wide == [" " * 8 + "file:" + "x" * 30]


def test_a_last_column_that_has_no_room_stands_below():
    lines = list(hanging_columns(["name", "a", "about"], [["x" * 60, "1", "b c"]], "a", 66))
    assert [line.rstrip() for line in lines] == [
        f"{'name':60}  a", "    about", "x" * 60 + "  1", "    b c",
    ]  # fmt: skip
    narrow = list(hanging_columns(["name", "a", "t"], [["x" * 60, "1", "b" * 20]], (), 40))
    assert [line.strip() for line in narrow] == ["name a", "t", "x" * 60, "1", "b" * 20]


def test_a_word_that_fits_nowhere_is_not_broken():
    assert hanging("prefix  ", "/a/very/long/path and more", 12) == [
        "prefix", "    /a/very/long/path", "    and more",
    ]  # fmt: skip
    assert hanging("  ", "a b c", None) == ["  a b c"]


def test_a_real_terminal_of_80_columns():
    """The width is asked of the terminal, and a long list has no line that it would wrap."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.pop("COLUMNS", None)
        ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.execv(sys.executable, [sys.executable, "-m", "prunebench", "list", "methods"])
    data = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # EIO: the child has ended
            break
        if not part:
            break
        data += part
    assert os.waitpid(child, 0)[1] == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", data.decode()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("  " * 10) for line in lines)  # the last column was wrapped
