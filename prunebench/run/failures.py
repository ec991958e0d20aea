"""What a run does when something goes wrong: halved batches, out of memory, failed records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from prunebench.errors import OutOfMemory, PrunebenchError
from prunebench.models.out_of_memory import is_out_of_memory, on_batch_halved
from prunebench.run.plan import Plan
from prunebench.run.result import failed_result


@contextmanager
def record_halvings(plan: Plan, halvings: list[str]) -> Iterator[None]:
    """Report and record batches that did not fit into memory and were halved."""

    def record(what: str, size: int) -> None:
        halvings.append(f"{what}: {size} at a time")
        plan.progress.note(f"out of memory: {what} continues with {size} sequences at a time")

    with on_batch_halved(record):
        yield


@contextmanager
def memory_errors(device: torch.device, plan: Plan | None = None) -> Iterator[None]:
    """Turn an allocation failure into `OutOfMemory`, with what to try.

    Args:
        device: Where the model is.
        plan: Of the run; None for scoring alone.
    """
    try:
        yield
    # CUDA's error is a RuntimeError, and so is that of torch's CPU allocator
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device}",
            where=str(error).splitlines()[0][:160] if str(error) else "the host has none left",
            fix="use --weights disk, --within-block joint, --dtype bfloat16, fewer "
            "--calibration-samples, or a shorter --seqlen"
            if plan is None or not plan.trainings
            else "use --dtype bfloat16, --set recover.rank=8, or a smaller recover.micro_tokens"
            if plan.recovery_training is not None
            else "use --dtype bfloat16, --set logit_dtype=bfloat16, --set state_dtype=int8, or a "
            "smaller --set micro_tokens",
        ) from error


@contextmanager
def failures_are_filed(plan: Plan) -> Iterator[Callable[[], None]]:
    """Save a `failed` record for any error after the checks.

    Not for Ctrl-C, nor for a closed output pipe (a sweep that was killed, `| head`): the run itself
    did not fail.

    Yields:
        A function to call once the row is saved: later errors do not make it a failed run.
    """
    filed: list[bool] = []
    try:
        yield lambda: filed.append(True)
    # not BaseException: KeyboardInterrupt passes
    except Exception as error:
        if filed or isinstance(error, BrokenPipeError):
            raise
        what = error.what if isinstance(error, PrunebenchError) else str(error)
        # `current` still names the innermost stage: `StageTimer` does not reset it on errors
        record = failed_result(
            plan, error=type(error).__name__, stage=plan.progress.current, message=what
        )
        try:
            plan.store.publish(record)
        # the original error matters more than the failure to record it
        except PrunebenchError as unsaved:
            plan.progress.note(f"the failure could not be saved: {unsaved.what}")
        raise
