"""Cells on this machine: one at a time, or side by side, each with a GPU or threads of its own."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from prunebench.errors import UsageError
from prunebench.sweep.engines.job import Job, JobEnd
from prunebench.sweep.engines.process import interrupt, run_job

_GRACE_SECONDS = 30.0  # shared by all jobs: time to end after the interrupt


class LocalEngine:
    """Runs a job in each free slot.

    Args:
        slots: Environment variables for each job that may run at a time: its GPU, its number of
            threads.
        show: Called with a job's number and each line that it writes to stderr.
    """

    def __init__(
        self, slots: Sequence[Mapping[str, str]], *, show: Callable[[int, str], None]
    ) -> None:
        self.at_once: int | None = len(slots)
        self._show = show
        self._free = list(slots)
        # one thread a job writes, `wait` reads: the queue is the only place where they meet
        self._ended: queue.SimpleQueue[tuple[Job, JobEnd, Mapping[str, str]]] = queue.SimpleQueue()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._cancelled = False

    def submit(self, job: Job) -> str:
        """Start a job in a free slot: there is one, for no more than `at_once` are given."""
        # `_free` needs no lock: only the thread of the sweep takes and returns slots
        slot = self._free.pop()
        # the caller gets the original job back from `wait`; only the process sees the slot's
        # settings
        placed = replace(job, settings={**job.settings, **slot})
        # a daemon: a thread that waits for a process must not keep the interpreter from exiting
        threading.Thread(target=self._run, args=(job, placed, slot), daemon=True).start()
        return ""

    def _run(self, job: Job, placed: Job, slot: Mapping[str, str]) -> None:
        def started(process: subprocess.Popen[str]) -> None:
            # registered before the flag is read: `cancel` either finds this process in the table,
            # or has set the flag that is read below; no process slips through between the two
            self._processes[job.number] = process
            if self._cancelled:
                interrupt(process)

        end = run_job(placed, on_line=lambda line: self._on_line(job, line), started=started)
        self._processes.pop(job.number, None)
        self._ended.put((job, end, slot))

    def _on_line(self, job: Job, line: str) -> None:
        # after Ctrl-C every job prints its own "interrupted"; the sweep prints one line for all
        if not self._cancelled:
            self._show(job.number, line)

    def wait(self) -> tuple[Job, JobEnd]:
        """Wait until any job ends."""
        job, end, slot = self._ended.get()
        # only now may another job have this GPU: its process is gone
        self._free.append(slot)
        return job, end

    def cancel(self) -> None:
        """Interrupt every job once, wait for them, and kill those that do not end."""
        self._cancelled = True
        # a copy: the threads remove entries while this loop runs
        running = list(self._processes.values())
        for process in running:
            interrupt(process)
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            for process in running:
                # one deadline for all, not one each: ten stuck jobs take no longer than one
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
        # a second Ctrl-C while waiting means: do not wait any longer
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in running:
                interrupt(process, number=9)  # SIGKILL: cannot be caught

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def slots_of_machine(jobs: int, devices: Collection[str]) -> list[dict[str, str]]:
    """Return the environment of each of `jobs` slots: a GPU, or a number of threads.

    Args:
        jobs: How many.
        devices: The `device` of the cells: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: There are not so many GPUs.
    """
    if jobs == 1:
        return [{}]
    # torch is imported only where a GPU may be used: it takes seconds
    gpus = [] if set(devices) == {"cpu"} else _gpus()
    if gpus or any(device.startswith("cuda") for device in devices):
        if jobs > len(gpus) or any(":" in device for device in devices):
            raise UsageError(
                f"--jobs {jobs} needs {jobs} GPUs, and there are {len(gpus)} to choose from",
                where="two cells on one GPU would measure each other",
                fix=f"use --jobs {len(gpus) or 1}, no cuda:N, or --device cpu",
            )
        # inside the job the only visible GPU is cuda:0, so the spec and the command stay the same
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs]]
    # torch starts as many threads as there are cores; several jobs that all do so slow each other
    # down
    threads = max(1, (os.cpu_count() or 1) // jobs)
    given = os.environ.get("OMP_NUM_THREADS", str(threads))
    return [{"OMP_NUM_THREADS": given} for _ in range(jobs)]


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    # a scheduler may have given us GPUs 2 and 5, or UUIDs: pass on its names, as indices would
    # count from 0 and reach GPUs that are not ours
    named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return named or [str(index) for index in range(torch.cuda.device_count())]
