"""Cells as tasks of a Ray cluster that is running already."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunebench.errors import MissingResource
from prunebench.sweep.engines.job import Job, JobEnd, Resources
from prunebench.sweep.engines.process import run_job


def _require_listener() -> None:
    """Check that something listens at the address of the cluster.

    `ray.init` itself retries for minutes, also at the address left by a killed cluster.

    Raises:
        OSError: No connection.
    """
    # where `ray start` notes the address of the local cluster; a killed cluster leaves the file
    address_file = Path(
        os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray", "ray_current_cluster"
    )
    address = os.environ.get("RAY_ADDRESS") or (
        address_file.read_text("utf-8") if address_file.is_file() else ""
    )
    # host:port, ray://host:port or [IPv6]:port; anything else is left for `ray.init` to judge
    match = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address.strip())
    if match:
        try:
            # a plain TCP connection is enough to see whether anything is there
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise OSError(f"{address.strip()}: {error.strerror or error}") from error


class RayEngine:
    """Runs each cell as a Ray task.

    Ray's own retries are off: the sweep decides about retries, the same with every engine.

    Args:
        resources: Requested for each cell.
        at_once: At most so many tasks at a time; None for any number.
        note: Called with one line if no node has these resources.

    Raises:
        MissingResource: Ray is not installed, or no cluster answers.
    """

    def __init__(
        self, resources: Resources, *, note: Callable[[str], None], at_once: int | None = None
    ) -> None:
        try:
            import ray
        except ImportError:
            raise MissingResource(
                "--executor ray needs the package ray", fix="pip install 'prunebench[ray]'"
            ) from None
        try:
            _require_listener()
            # "auto" uses RAY_ADDRESS or the address file, and never starts a cluster of its own.
            # log_to_driver=False: each cell's output would arrive on our stdout, mixed
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        # nothing is imported from ray for this: it raises ConnectionError
        except OSError as error:  # ConnectionError is one
            raise MissingResource(
                "no Ray cluster answers",
                where=str(error).splitlines()[0],
                fix="ray start --head on this machine, or RAY_ADDRESS=HOST:PORT",
            ) from None
        self.at_once = at_once
        self._ray: Any = ray
        self._running: dict[Any, Job] = {}
        cpus, gpus = resources.cpus or 1, resources.gpus or 0
        # Ray counts in bytes, and schedules by this number without enforcing it
        memory = resources.memory_gb and int(resources.memory_gb * 2**30)
        # max_retries=0: Ray would otherwise run a task whose worker died up to three more times
        self._task = ray.remote(run_job).options(
            num_cpus=cpus, num_gpus=gpus, memory=memory, max_retries=0, name="prunebench"
        )
        request = {"CPU": cpus, "GPU": gpus, "memory": memory or 0}
        # a note and no error: an autoscaler may add such a node
        if not any(_has(node, request) for node in ray.nodes()):
            note(f"no node of the Ray cluster has {resources.described() or '1 CPU'}: "
                 "the cells wait until one joins")  # fmt: skip

    def submit(self, job: Job) -> str:
        """Queue a task."""
        task = self._task.remote(job)
        self._running[task] = job
        return f"Ray task {task.task_id().hex()[:12]}"

    def wait(self) -> tuple[Job, JobEnd]:
        """Wait until any task ends."""
        # returns ids; whether the task failed is known only from `get`
        ended, _ = self._ray.wait(list(self._running), num_returns=1)
        job = self._running.pop(ended[0])
        try:
            end = self._ray.get(ended[0])
        # the worker or its node died, or the object with its return value is lost
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            name = type(error).__name__
            return job, JobEnd(None, reason=f"Ray lost it: {name}: {lines[0] if lines else ''}")
        assert isinstance(end, JobEnd)
        return job, end

    def cancel(self) -> None:
        """End every task; their processes end with them."""
        for task in self._running:
            # force kills the worker; the cell is not its thread but its child process, and ends by
            # `end_with_parent`
            self._ray.cancel(task, force=True)
        self._running.clear()

    def close(self) -> None:
        """Disconnect from the cluster; tasks of this sweep end, the cluster runs on."""
        self._ray.shutdown()


def _has(node: dict[str, Any], request: Mapping[str, float]) -> bool:
    resources = node.get("Resources", {})
    return bool(node.get("Alive")) and all(
        resources.get(k, 0) >= v for k, v in request.items() if v
    )
