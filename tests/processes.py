"""Fork runs that are killed or work together: `python processes.py kill|together COUNT COMMAND`.

A process of its own, because a child that is forked after OpenMP made its threads waits for them
for ever. It works in the current folder.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from prunebench.cli import app
from prunebench.models.kept import read_journal
from prunebench.results.store import ResultStore


def fork(command):
    """Run a command in a child that has everything imported already; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
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
    (result,) = ResultStore(folder).read()[0]
    return result.model_dump(exclude={"id", "created_at", "command", "cost"})


def unfinished():
    """Return whether a run is kept that goes on when it is started again."""
    kept = Path(os.environ["PRUNEBENCH_CACHE"]) / "runs"
    return any(read_journal(one) for one in kept.iterdir())


def kill(count, command):
    """kill -9 at random moments over all stages, as often as asked; the last run gets through.

    A run that gets through in between is compared and removed, and the next begins anew.
    """
    whole = [*command, "--results-dir", "whole"]
    app(whole, standalone_mode=False)  # imports what a run needs
    shutil.rmtree("whole")
    shutil.rmtree("out")
    begun = time.perf_counter()
    assert ended(fork(whole)) == 0
    took = time.perf_counter() - begun
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


if __name__ == "__main__":
    {"kill": kill, "together": together}[sys.argv[1]](int(sys.argv[2]), sys.argv[3:])
