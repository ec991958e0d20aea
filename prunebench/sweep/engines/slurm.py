"""Cells as Slurm jobs, through submitit: it writes the batch scripts and watches the queue."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from prunebench.errors import MissingResource, UsageError
from prunebench.sweep.engines.job import Job, JobEnd, Refused, Resources
from prunebench.sweep.engines.process import run_job


class SlurmEngine:
    """Runs each cell as a Slurm job.

    Args:
        resources: Requested for each cell; the time is required (submitit's default: 5 minutes).
        folder: Where submitit keeps scripts and logs, on a file system that all nodes share.
        at_once: At most so many jobs in the queue; None for any number.
        cluster: `local` runs the same scripts on this machine, to try them out.
        poll_seconds: Between checks of the jobs; submitit queries Slurm far less often.

    Raises:
        MissingResource: submitit or Slurm is not here.
        UsageError: No time is given.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        folder: Path,
        at_once: int | None = None,
        cluster: Literal["slurm", "local"] = "slurm",
        poll_seconds: float = 1.0,
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise MissingResource(
                "--executor slurm needs the package submitit",
                fix="pip install 'prunebench[slurm]'",
            ) from None
        # submitit itself would fail later, and with less to go by
        missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
        if cluster == "slurm" and missing:
            raise MissingResource(
                f"--executor slurm needs {' and '.join(missing)}, and this machine has none",
                fix="start it on a login node of the cluster, or use --executor local",
            )
        # submitit's default of 5 minutes would end most cells in the middle
        if resources.minutes is None:
            raise UsageError(
                "--executor slurm needs the time a cell may take",
                where="Slurm ends a job that takes longer",
                fix="--resource time=4:00:00, or time in the [resources] of the recipe",
            )
        self.at_once = at_once
        self._submitit = submitit
        self._threads = str(resources.cpus) if resources.cpus else ""
        self._poll_seconds = poll_seconds
        self._running: list[tuple[Job, Any]] = []
        # submitit replaces %j by the job's number: one folder of script, pickle and logs a job
        self._executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster)
        self._executor.update_parameters(**_parameters(resources))

    def submit(self, job: Job) -> str:
        """Queue a job."""
        # a Slurm job may see all cores of its node, and torch would start a thread for each
        if self._threads:
            job = replace(job, settings={**job.settings, "OMP_NUM_THREADS": self._threads})
        try:
            # submitit pickles function and argument; the node unpickles them, so both are
            # importable module-level names
            handle = self._executor.submit(run_job, job)
        # sbatch refused: a wrong partition or account, or a limit on queued jobs. `Sweep._begin`
        # tells these apart: with jobs in the queue it waits, else it stops
        except self._submitit.core.utils.FailedJobError as error:
            raise Refused(
                "Slurm did not take a job",
                where=" ".join(str(error).split()),
                fix="correct --resource, or the [resources] of the recipe",
            ) from None
        self._running.append((job, handle))
        return f"Slurm job {handle.job_id}, log {handle.paths.stderr}"

    def wait(self) -> tuple[Job, JobEnd]:
        """Wait until any job ends."""
        while True:
            # removing while iterating is safe here only because the loop returns at once
            for entry in self._running:
                job, handle = entry
                if handle.done():
                    self._running.remove(entry)
                    return job, self._end(handle)
            time.sleep(self._poll_seconds)

    def _end(self, handle: Any) -> JobEnd:
        try:
            end = handle.result()
        # the node died, the time ran out, or scancel: there is no pickle with a return value
        except (self._submitit.core.utils.UncompletedJobError, OSError):  # or its folder is gone
            return JobEnd(
                None, reason=f"Slurm job {handle.job_id} was lost ({handle.state}), log "
                f"{handle.paths.stderr}",
            )  # fmt: skip
        assert isinstance(end, JobEnd)
        return end

    def cancel(self) -> None:
        """Cancel every job that runs or waits."""
        for _, handle in self._running:
            handle.cancel(check=False)  # scancel of a job that has just ended is no error
        self._running.clear()

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def _parameters(resources: Resources) -> dict[str, Any]:
    return {
        "name": "prunebench",
        "timeout_min": resources.minutes,
        # None leaves the line out of the batch script: a job without GPUs asks for none
        "gpus_per_node": resources.gpus or None,
        "cpus_per_task": resources.cpus,
        "mem_gb": resources.memory_gb,
        "slurm_partition": resources.partition,
        "slurm_account": resources.account,
        "slurm_qos": resources.qos,
        "slurm_constraint": resources.constraint,
    }
