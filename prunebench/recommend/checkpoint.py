"""The checkpoint of --save: the confirmation writes it, or finds it written by an earlier one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prunebench.checkpoints.save import RESULT_NAME, check_target
from prunebench.errors import PrunebenchError, SaveError, UsageError
from prunebench.results.schema import Result
from prunebench.results.store import read_copy
from prunebench.run.execute import execute
from prunebench.run.plan import load_inputs
from prunebench.run.resolve import ResolvedSpec, resolve
from prunebench.spec import Setup
from prunebench.sweep.cell import RecipeCell
from prunebench.sweep.sweep import CellOutcome


def saved_result(folder: Path) -> Result | None:
    """Return the row of the checkpoint in a folder; None without one, or if it is stale."""
    path = folder / RESULT_NAME
    copy = read_copy(path) if path.is_file() else None
    return copy if isinstance(copy, Result) and not copy.stale else None


def require_free(folder: Path, *, force: bool) -> None:
    """Refuse a folder that holds something, unless it may be replaced.

    Raises:
        UsageError: It holds something.
        SaveError: It cannot be written.
    """
    try:
        check_target(folder, need_bytes=1 << 20, replace=force, folder=True)
    except UsageError as error:
        if saved_result(folder) is not None:
            error.where = "it holds another checkpoint than this race saves; measured rows are kept"
        raise


def run_and_save(
    cell: RecipeCell, resolved: ResolvedSpec, setup: Setup, tell: Callable[[str], None]
) -> CellOutcome:
    """Run a confirmation in this process, for its weights are needed; or find them saved.

    Args:
        cell: The confirmation.
        resolved: The same, resolved.
        setup: Where it runs; `save_model` is the folder.
        tell: Called with a line when it starts.

    Raises:
        UsageError: The folder holds something else.
        SaveError: The checkpoint or its row cannot be written.
    """
    folder = setup.save_model
    assert folder is not None
    saved = saved_result(folder)
    if saved is not None and saved.spec_id == resolved.spec.spec_id:
        if not resolved.store.path_of(saved).is_file():
            resolved.store.publish(saved)  # another results folder, or an emptied one
        return CellOutcome(cell, "finished", saved)
    # no failure of this candidate: no other could be saved here either
    require_free(folder, force=setup.force)
    tell(f"saves to {folder}")
    started = time.monotonic()
    try:
        result = execute(load_inputs(resolve(cell.spec, setup)))
    except SaveError:
        raise
    except PrunebenchError as error:
        reason = " / ".join(str(error).splitlines())
        return CellOutcome(cell, "failed", reason=reason, exit_code=error.exit_code)
    return CellOutcome(cell, "done", result, seconds=time.monotonic() - started)
