"""A race on a tiny model, its runs in this process: the same command lines, no start-up."""

import contextlib
import io
import json
import os

import pytest

from prunebench.sweep.engines.job import JobEnd


class HereEngine:
    """Runs each job as a command in this process."""

    at_once = 1

    def __init__(self, slots, *, show):
        self.ran, self._job = [], None
        HereEngine.newest = self

    def submit(self, job):
        self._job = job
        return ""

    def wait(self):
        from prunebench.cli import app

        job = self._job
        self.ran.append(job.words)
        before = dict(os.environ)
        os.environ.update({k: v for k, v in job.settings.items() if v is not None})
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                app(list(job.words), standalone_mode=False)
            code = 0
        except BaseException as error:  # typer.Exit has no common base with SystemExit
            if isinstance(error, KeyboardInterrupt):
                raise
            code = getattr(error, "exit_code", 1)
        finally:
            os.environ.clear()
            os.environ.update(before)
        if code:
            return job, JobEnd(code, reason=err.getvalue().strip().splitlines()[0])
        return job, JobEnd(0, result_id=json.loads(out.getvalue())["id"], seconds=0.1)

    def cancel(self):
        pass

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """Let `prunebench recommend` run its cells in this process; returns what ran."""
    import prunebench.sweep.engines.local as local
    import prunebench.sweep.sweep as sweep

    # a sweep tells by the class whether cells run here
    monkeypatch.setattr(local, "LocalEngine", HereEngine)
    monkeypatch.setattr(sweep, "LocalEngine", HereEngine)
    return HereEngine


@pytest.fixture
def ask(tiny_folder, text_file, tmp_path):
    """The options of a race on the tiny model."""
    from tests.conftest import prose

    text = tmp_path / "own.txt"
    text.write_text(prose(8_000, seed=3), encoding="utf-8")
    return [
        "recommend", "-M", tiny_folder, "--text", f"file:{text}", "--calibration",
        f"file:{text_file}", "--calibration-samples", "6", "--seqlen", "32", "--ppl-seqlen", "64",
        "--device", "cpu", "--results-dir", tmp_path / "results",
    ]  # fmt: skip
