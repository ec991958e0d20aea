"""Fork runs that are killed, work together or fill a disk: `processes.py NAME NUMBER COMMAND`.

A process of its own, because a child that is forked after OpenMP made its threads waits for them
for ever. It works in the current folder.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from prunebench.cli import app
from prunebench.models.journal import read_journal
from prunebench.results.store import ResultStore


def fork(command, said=os.devnull):
    """Run a command in a child that has everything imported already; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        quiet = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        app(command)
    except SystemExit as done:
        code = done.code or 0
    finally:
        os._exit(code)


def ended(child):
    """Wait for a child; returns its exit code, or the negative signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def numbers(folder):
    """Return what must not depend on how often the one run of a folder was begun."""
    (result,) = [row for row in ResultStore(folder).read()[0] if row.status == "ok"]
    return result.model_dump(exclude={"id", "created_at", "command", "cost"})


def unfinished():
    """Return whether a run is kept that goes on when it is started again."""
    runs = Path(os.environ["PRUNEBENCH_CACHE"]) / "runs"
    return any(read_journal(path) for path in runs.iterdir())


def kill(count, command):
    """kill -9 at random moments over all stages, as often as asked; the last run gets through.

    A run that gets through in between is compared and removed, and the next begins anew.
    """
    whole = [*command, "--results-dir", "whole"]
    app(whole, standalone_mode=False)  # imports what a run needs
    shutil.rmtree("whole")
    shutil.rmtree("out")
    start_time = time.perf_counter()
    assert ended(fork(whole)) == 0
    took = time.perf_counter() - start_time
    out, results = Path("out"), Path("results")
    expected, files = numbers(Path("whole")), shards(out)
    shutil.rmtree(out)
    draw, killed = random.Random(0), 0
    while True:
        child = fork(command)
        if killed < count:
            time.sleep(took * draw.uniform(0.05, 1.0))
            os.kill(child, signal.SIGKILL)
        code = ended(child)
        killed += code == -signal.SIGKILL
        if code == 0 or out.is_dir():
            assert shards(out) == files
            assert numbers(results) == expected
            if code == 0 and killed >= count:
                break
            shutil.rmtree(out)
            if not unfinished():  # killed at its very end, perhaps: the next begins anew, too
                shutil.rmtree(results)
    assert not unfinished()


def together(count, command):
    """Run a command so many times at once."""
    children = [fork(command) for _ in range(count)]
    codes = [ended(child) for child in children]
    assert codes == [0] * count, codes


def full(step, command):
    """Run on a full disk, `small`, and free so many bytes of it after every failure.

    What is free when a run begins is not to be had when it comes to write: another process was
    faster. So every write of a run is, once, the one that fails. First all is on that disk, then
    the result alone.
    """
    app([*command, "--results-dir", "whole", "--save-model", "out"], standalone_mode=False)
    tempfile.TemporaryFile = lambda dir: Path("elsewhere").open("wb")  # noqa: SIM115
    shutil.disk_usage = lambda folder: SimpleNamespace(total=1 << 40, used=0, free=1 << 40)
    _until_it_fits(
        step, command, cache="small/cache", results="small/results", out="small/out",
        fails=("block-", "hidden-", "journal", "small/out"),
    )  # fmt: skip
    shutil.rmtree("small/cache")
    _until_it_fits(
        step, command, cache="cache", results="small/alone", out="again", fails=("small/alone",)
    )


def _until_it_fits(step, command, *, cache, results, out, fails):
    os.environ["PRUNEBENCH_CACHE"] = cache
    Path(cache).mkdir(exist_ok=True)
    filler = Path("small/filler")
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(512))
    failed = []
    while ended(fork([*command, "--results-dir", results, "--save-model", out], "said")) != 0:
        said = Path("said").read_text()
        assert "Traceback" not in said and "No space left on device" in said, said
        failed.append(said)
        os.truncate(filler, filler.stat().st_size - step)
    for name in fails:
        assert any(name in said for said in failed), (name, failed)
    assert shards(Path(out)) == shards(Path("out"))
    assert numbers(Path(results)) == numbers(Path("whole"))


if __name__ == "__main__":
    {"kill": kill, "together": together, "full": full}[sys.argv[1]](int(sys.argv[2]), sys.argv[3:])
