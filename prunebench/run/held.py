"""The plan of a run on a model that the caller holds, instead of a folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunebench.distributed import world_size
from prunebench.errors import UsageError
from prunebench.models.in_memory import (
    note_on_buffers,
    require_causal,
    require_linears,
    require_prunable,
    source_of,
)
from prunebench.models.linears import find_linears
from prunebench.models.source import LocalModel
from prunebench.progress import Progress, StageTimer
from prunebench.results.store import ResultStore
from prunebench.run.dtype import DtypeChoice
from prunebench.run.names import check_names, place_texts
from prunebench.run.plan import Plan, inputs_for
from prunebench.run.pruning import hash_and_count_zeros
from prunebench.run.resolve import ResolvedSpec, identify_contents
from prunebench.spec import RunSpec, Setup


@dataclass(frozen=True)
class HeldPlan:
    """A plan for a model in memory.

    Attributes:
        plan: Its linears are those of the model itself.
        sha256: Hash of the weights as they are now.
        zeros: Zeros of each matrix now, by name.
    """

    plan: Plan
    sha256: str
    zeros: dict[str, int]


def plan_for_model(model: Any, tokenizer: Any, spec: RunSpec, progress: Progress) -> HeldPlan:
    """Check all that `prepare` checks, without a folder; the model is not changed.

    Args:
        model: A causal language model of transformers, on one device, in evaluation mode.
        tokenizer: Of the model; None where no text is read.
        spec: With names; its model and dtype are replaced by those of `model`.
        progress: Called with the stages.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    started, timer = time.perf_counter(), StageTimer(progress)
    with timer.stage("check", detail=spec.method):
        require_causal(model)
        require_prunable(model)
        source = source_of(model)
        linears = find_linears(model)
        dtype = require_linears(model, linears)
        note = note_on_buffers(model)
        if note:
            timer.note(note)
        spec = spec.model_copy(update={"model": source.id, "dtype": dtype, "ppl": ()})
        # weights in memory: what a run calls resident
        device = next(model.parameters()).device
        setup = Setup(device=str(device), weights="resident", progress=progress)
        named = check_names(place_texts(spec, source.kind), setup, source)
    with timer.stage("hash", detail="the dense weights"):
        sha256, zeros = hash_and_count_zeros(model, linears)
    resolved = identify_contents(
        named,
        setup,
        store=ResultStore(setup.results_dir),  # nothing is saved there
        progress=timer,
        devices=(device,),
        # the weights may have been changed since they were loaded: their own hash names them
        model=LocalModel(source, Path(source.location), f"sha256:{sha256}"),
        dtype=DtypeChoice(dtype, "the model's"),
        started=started,
    )
    _require_tokenizer(resolved, tokenizer)
    _require_one_process(resolved)
    return HeldPlan(inputs_for(resolved, model, model.config, tokenizer), sha256, zeros)


def _require_tokenizer(resolved: ResolvedSpec, tokenizer: Any) -> None:
    names = [resolved.named.calibration, *(need.text for need in resolved.training_needs)]
    texts = [name for name in names if name is not None and not name.startswith("tokens:")]
    if tokenizer is None and texts:
        raise UsageError(
            f"{resolved.spec.method} reads the text {texts[0]}, and there is no tokenizer",
            fix="give the tokenizer of the model, or token ids",
        )


def _require_one_process(resolved: ResolvedSpec) -> None:
    if resolved.training_needs and world_size() > 1:
        learns = resolved.pruner.needs.training is not None
        name = resolved.spec.method if learns else resolved.spec.recover
        raise UsageError(
            f"{name} learns in {world_size()} processes only as a command",
            fix="torchrun ... -m prunebench run, or call prune in one process",
        )


def model_is(model: nn.Module, sha256: str) -> bool | None:
    """Return whether a model still has these weights; None where they cannot be read."""
    from prunebench.models.hashing import hash_weights

    try:
        return hash_weights(model) == sha256
    except (RuntimeError, MemoryError):  # after a CUDA error every later call fails
        return None
