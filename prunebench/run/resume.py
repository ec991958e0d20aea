"""Load the model (in memory or streamed from disk) and resume an interrupted run.

`resident`: all weights in memory. `disk`: a block at a time (`models.disk`), with every finished
block saved in the cache until the result has been saved. Neither changes a number.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from prunebench.files import cache_dir
from prunebench.models.disk import DiskWeights, load_on_disk
from prunebench.models.journal import JournalInfo, RunJournal, journal_info, read_journal
from prunebench.models.load import load_config, load_model
from prunebench.models.weights import weights_of
from prunebench.pruners.layer import GroupPruner
from prunebench.run.code import code_sha256
from prunebench.run.plan import Plan
from prunebench.run.resolve import ResolvedSpec


def journal_folder(resolved: ResolvedSpec) -> Path:
    """Return the journal folder of a run: its name is a hash of all that the blocks depend on."""
    facts = [resolved.spec.canonical_json(), code_sha256(resolved)]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    # shortened: 96 bits are enough to keep the runs of a machine apart
    return runs_folder() / digest[:24]


def runs_folder() -> Path:
    """Return the folder of all journals."""
    return cache_dir() / "runs"


def unfinished_runs() -> list[JournalInfo]:
    """Return the journals of all interrupted runs, the newest first."""
    folders = [path for path in runs_folder().glob("*") if path.is_dir()]
    infos = [info for info in map(journal_info, sorted(folders)) if info]
    return sorted(infos, key=lambda info: info.age_seconds)


@contextmanager
def open_run_state(plan: Plan) -> Iterator[RunJournal | None]:
    """Open the journal of this run; None where the weights are in memory.

    It is removed when the run has finished, and stays if the run ends with an error.

    Raises:
        SaveError: The cache cannot be written.
    """
    if plan.weights == "resident":
        yield None
        return
    folder, progress = journal_folder(plan), plan.progress
    journal = RunJournal(folder)
    has_lock = journal.lock()
    if not has_lock:
        progress.note(
            f"another process runs this very command ({folder}): this one cannot be resumed"
        )
        # a random name: both processes finish, and neither overwrites the other's blocks
        journal = RunJournal(folder.with_name(f"{folder.name}-{secrets.token_hex(4)}"))
        journal.lock()
    has_journal = read_journal(journal.folder) is not None
    with progress.stage("verify", detail="saved blocks") if has_journal else nullcontext():
        journal.read()
    if journal.blocks:
        progress.note(
            f"resuming: {len(journal.blocks)} blocks finished before, in {journal.folder}"
        )
    journal.state = replace(
        journal.state,
        command=plan.setup.command,
        title=f"{plan.spec.method} {plan.sparsity} on {plan.spec.model}",
        blocks=max(linear.block_index for linear in plan.linears) + 1,
        starts=journal.state.starts + 1,
    )
    try:
        yield journal
    # Ctrl-C too: that is when a user wants to resume
    except BaseException:
        if not has_lock:
            journal.remove()
            raise
        done = len(journal.blocks)
        progress.note(f"{done} finished blocks saved; rerun the same command to resume")
        journal.release()
        raise
    journal.remove()


def open_model(plan: Plan, journal: RunJournal | None) -> nn.Module:
    """Load the dense model, or for `disk` only what lies outside its blocks."""
    dtype = getattr(torch, plan.spec.dtype)
    if journal is None:
        return load_model(plan.model.path, dtype=dtype, device=plan.device)
    return load_on_disk(
        plan.model.path,
        load_config(plan.model.path),
        dtype=dtype,
        device=plan.device,
        journal=journal,
        placement=plan.setup.activations,
    )


def restore_finished_blocks(plan: Plan, model: nn.Module) -> None:
    """Load the finished blocks into the model, if the method can resume from them.

    A method that decides group by group can; one that carries state from block to block (the
    generator of `random`) starts over.
    """
    weights = weights_of(model)
    if isinstance(weights, DiskWeights):
        if not isinstance(plan.pruner, GroupPruner):
            weights.journal.discard_blocks()
        weights.restore_blocks()
