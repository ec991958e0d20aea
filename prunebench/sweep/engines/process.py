"""Run a job as a process that ends with its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from prunebench.sweep.engines.job import Job, JobEnd

_PARENT = "PRUNEBENCH_PARENT"  # process id of the sweep or worker that started this one
_GRACE_SECONDS = 10.0  # for an orderly end after the interrupt, before `os._exit`


def run_job(
    job: Job,
    *,
    on_line: Callable[[str], None] | None = None,
    started: Callable[[subprocess.Popen[str]], None] | None = None,
) -> JobEnd:
    """Run a job in a process of its own and wait for its end; also the task sent to a cluster.

    The process leads a group of its own, so Ctrl-C at the terminal reaches the sweep alone, which
    forwards it once. It ends by itself when this process is killed.

    Args:
        job: What to run.
        on_line: Called with every line that it writes to stderr; None copies them to stderr.
        started: Called with the process once it runs.
    """
    start_time = time.monotonic()
    try:
        process = subprocess.Popen(
            # this interpreter, not the `prunebench` found in PATH: that may be another environment
            [sys.executable, "-m", "prunebench", *job.words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # errors="replace": a byte that is no UTF-8 in a library's output must not end the job.
            # process_group=0: a group of its own, so that one killpg reaches what the job itself
            # starts
            cwd=job.folder, env=_environment(job), text=True, errors="replace", process_group=0,
        )  # fmt: skip
    # no memory to fork, too many processes, or the folder is gone: the sweep retries
    except OSError as error:
        return JobEnd(None, reason=f"its process could not be started: {error}")
    if started:
        started(process)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.append(_all_of(process)), daemon=True)
    reader.start()  # stdout is one document, longer than a pipe holds
    # both pipes are drained at the same time: if either filled up, the process would block
    lines = _listen(process, on_line or _to_stderr)
    # after the pipes have ended; waiting first would deadlock on a full pipe
    code = process.wait()
    reader.join()  # `output` is complete only now
    seconds = time.monotonic() - start_time
    if code == 0:
        return JobEnd(0, result_id=_result_id(output[0]), seconds=seconds)
    reason, stage = _why(lines, code)
    return JobEnd(code, reason=reason, stage=stage, seconds=seconds)


def _environment(job: Job) -> dict[str, str]:
    changed: dict[str, str | None] = {**os.environ, **job.settings, _PARENT: str(os.getpid())}
    return {name: value for name, value in changed.items() if value is not None}  # None removes


def _all_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with process.stdout:
        return process.stdout.read()


def _listen(process: subprocess.Popen[str], on_line: Callable[[str], None]) -> list[str]:
    """Forward lines; return those of the error message, or the last line."""
    assert process.stderr is not None
    lines: list[str] = []
    with process.stderr:
        # a line arrives when it ends: the unfinished line of a running stage comes only at the end
        for line in process.stderr:
            on_line(line.rstrip("\n"))
            # an error message has up to three lines: once it begins, all that follows is kept
            if not (lines and lines[0].startswith("error: ")):
                lines.clear()
            lines.append(line)
    return lines


def _why(lines: list[str], code: int) -> tuple[str, str]:
    """Return why a process failed, and the stage it was in if it was ended in the middle."""
    if lines and lines[0].startswith("error: "):
        return " / ".join(line.strip() for line in lines).removeprefix("error: "), ""
    # `LineProgress` writes a stage's newline when the stage is done: a last line without one names
    # the stage in which the process died
    open_stage = lines[-1] if lines and not lines[-1].endswith("\n") else ""
    reason = f"exit code {code}"
    if code < 0:  # Popen: minus the number of the signal
        reason = f"its process was ended by {_signal_name(-code)}"
        if code == -signal.SIGKILL:
            reason += ", as the system does when memory runs out"
    stage = open_stage.split()[0] if open_stage.split() else ""
    return reason + (f", in the stage {stage}" if stage else ""), stage


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _result_id(output: str) -> str:
    """Return the id of the result that `run --json` prints."""
    try:
        return str(json.loads(output)["id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def interrupt(process: subprocess.Popen[str], *, number: int = signal.SIGINT) -> None:
    """Send a signal to a process and what it started, if it is still there."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return


def end_with_parent() -> None:
    """Interrupt this process when the one that started it as a job is gone, even by `kill -9`.

    Without this, a cell whose sweep or cluster worker was killed would keep running beside the one
    that is started in its place.
    """
    named = os.environ.pop(_PARENT, "")
    if named.isdigit():
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by a shell with &
            signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_watch, args=(int(named),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GRACE_SECONDS)
    os._exit(130)
