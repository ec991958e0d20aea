"""Where the cells of a sweep run: on this machine, or on an engine that others maintain.

An engine takes jobs and tells how they ended. A job is one command line in a process of its own,
wherever that is. Its result arrives through the results folder, never through the engine: an
engine can lose a job, but not a result.
"""

from __future__ import annotations

from typing import Protocol

from prunebench.sweep.engines.job import Job, JobEnd

EXECUTORS = ("local", "slurm", "ray")


class Engine(Protocol):
    """What runs jobs.

    Attributes:
        at_once: How many jobs it should be given at a time; None for any number.
    """

    at_once: int | None

    def submit(self, job: Job) -> str:
        """Start or queue a job; returns what the engine calls it, empty if it has no name.

        Raises:
            Refused: The engine takes no more jobs now, or never one like this.
        """

    def wait(self) -> tuple[Job, JobEnd]:
        """Wait until any job ends. Called only while some are left."""

    def cancel(self) -> None:
        """End every job that runs or waits, and return when this machine's are gone."""

    def close(self) -> None:
        """Let go of the engine: nothing runs any more."""
