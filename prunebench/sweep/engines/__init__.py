"""Engines that run the cells of a sweep: this machine, Slurm or Ray.

An engine takes jobs and returns how they ended. A job is one command line in a process of its own.
Its result arrives through the results folder, never through the engine: an engine can lose a job,
but not a result.
"""

from __future__ import annotations

from typing import Protocol

from prunebench.sweep.engines.job import Job, JobEnd

EXECUTORS = ("local", "slurm", "ray")


class Engine(Protocol):
    """Runs jobs.

    Attributes:
        at_once: The most jobs at a time; None for any number.
    """

    at_once: int | None

    def submit(self, job: Job) -> str:
        """Start or queue a job; returns the engine's name for it, or "".

        Raises:
            Refused: The engine takes no more jobs now, or never one like this.
        """

    def wait(self) -> tuple[Job, JobEnd]:
        """Wait until any job ends. Called only while some are left."""

    def cancel(self) -> None:
        """End every job that runs or waits, and return when this machine's are gone."""

    def close(self) -> None:
        """Release the engine. No job runs any more."""
