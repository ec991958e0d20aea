"""Files are whole or not there: atomic writes, exclusive names, many writers, `kill -9`."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from prunebench.errors import SaveError
from prunebench.files import (
    atomic_file,
    atomic_folder,
    cache_dir,
    publish_text,
    require_writable,
    write_text,
)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_cache_dir_is_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_failed_folder_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f") as part:
        (part / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writing", [atomic_file, atomic_folder])
def test_a_full_disk_is_known_by_whatever_name_it_comes(tmp_path, writing):
    """The libraries in Rust raise no OSError."""
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(SaveError, match="cannot write") as error, writing(tmp_path / "new"):
        raise Exception(said)
    assert "free space there" in error.value.fix
    with pytest.raises(RuntimeError, match="a shape is wrong"), writing(tmp_path / "new"):
        raise RuntimeError("a shape is wrong")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_if_asked(tmp_path):
    target = tmp_path / "f"
    for text, replace in (("one", False), ("two", False), ("three", True)):
        with atomic_folder(target, replace=replace) as part:
            (part / "x").write_text(text)
    assert (target / "x").read_text() == "three"
    assert leftovers(tmp_path) == []


def test_a_folder_that_cannot_be_replaced_is_there_again(tmp_path, monkeypatch):
    target = tmp_path / "f"
    target.mkdir()
    (target / "x").write_text("old")
    plain = Path.rename

    def rename(self, other):
        if self.suffix == ".part":
            raise OSError(5, "Input/output error")
        return plain(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(SaveError, match="cannot write"),
        atomic_folder(target, replace=True) as part,
    ):
        (part / "x").write_text("new")
    assert (target / "x").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_folder_made_meanwhile_stays_and_is_an_error_where_it_is_not_the_same(tmp_path):
    target = tmp_path / "f"
    with atomic_folder(target) as part:  # a cache: both hold the same
        (part / "x").write_text("ours")
        target.mkdir()
        (target / "x").write_text("theirs")
    with pytest.raises(SaveError, match="exists already"), atomic_folder(target, exclusive=True):
        pass
    assert (target / "x").read_text() == "theirs"
    assert leftovers(tmp_path) == []


def test_a_published_name_is_never_taken_twice(tmp_path):
    publish_text(tmp_path / "r.json", "first")
    with pytest.raises(SaveError, match="exists already"):
        publish_text(tmp_path / "r.json", "second")
    assert (tmp_path / "r.json").read_text() == "first"
    assert leftovers(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "results").write_text("")
    for attempt in (
        lambda: require_writable(tmp_path / "results" / "deep"),
        lambda: publish_text(tmp_path / "results" / "r.json", ""),
        lambda: write_text(tmp_path / "results" / "r.json", ""),
    ):
        with pytest.raises(SaveError) as error:
            attempt()
        assert "a file stands where a folder should be" in str(error.value)
        assert error.value.exit_code == 5


def test_too_little_room_is_found_before(tmp_path):
    with pytest.raises(SaveError, match="cannot write") as error:
        require_writable(tmp_path, need_bytes=10**18)
    assert "are needed" in error.value.where


def test_a_folder_is_probed_once_per_process(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        require_writable(folder)
    assert len(flushed) == 2


def test_files_obey_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "")
        publish_text(tmp_path / "b", "")
    finally:
        os.umask(old)
    assert {(tmp_path / n).stat().st_mode & 0o777 for n in "ab"} == {0o644}


def test_killed_while_writing_leaves_the_old_or_the_new(tmp_path):
    """Kill a process that writes one file over and over, twenty times: never half a file."""
    path = tmp_path / "state.txt"
    script = tmp_path / "writer.py"
    script.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        from prunebench.files import write_text
        for i in range(10**9):
            write_text(Path({str(path)!r}), f"{{i % 10}}" * 200_000)
        """)
    )
    for attempt in range(10):
        process = subprocess.Popen([sys.executable, str(script)])
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.005 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = path.read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1
        path.unlink()
