"""Choose where the weights of a run are: in memory, or on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prunebench.errors import UsageError
from prunebench.evaluate.outcome import Evaluator
from prunebench.models.checkpoint_keys import match_keys
from prunebench.models.safetensors_files import stored_tensors, weight_files
from prunebench.pruners.protocol import Needs
from prunebench.pruners.removal import BlockRemover
from prunebench.run.memory import choose_weights, model_sizes
from prunebench.run.resolve import ResolvedSpec
from prunebench.spec import Weights


def place_weights(
    resolved: ResolvedSpec, model: torch.nn.Module, tasks: list[Evaluator]
) -> Weights:
    """Choose `resident` or `disk`, with a note for `disk`.

    Raises:
        UsageError: The method, the allocator or a task needs all weights in memory.
        IncompatibleData: The checkpoint cannot be read a block at a time.
    """
    spec, choice = resolved.spec, resolved.setup.weights
    if choice == "resident":
        return "resident"
    dtype = getattr(torch, spec.dtype)
    # also for an explicit "disk": the facts are for the error message
    chosen, facts = choose_weights(model_sizes(model, dtype), resolved.device)
    if choice == "auto":
        if chosen == "resident":
            return "resident"
        resolved.progress.note(f"weights stay on disk: {facts}")
    if resolved.model_recoverer is not None:
        raise UsageError(
            f"--weights disk does not go with --recover {spec.recover}",
            where="the whole model is trained end to end: every step runs all blocks twice",
            fix=f"use --weights resident ({facts}), or --recover block, which works from disk",
        )
    reason = _why_resident(resolved, tasks)
    if reason:
        raise UsageError(
            f"--weights disk does not go with {spec.method} here",
            where=reason,
            fix=f"use --weights resident ({facts}), or leave it out",
        )
    # from disk every tensor is read by its stored name, so each must have one
    match_keys(model, stored_tensors(weight_files(resolved.model.path)), dtype=dtype)
    return "disk"


def _why_resident(resolved: ResolvedSpec, tasks: list[Evaluator]) -> str:
    """Return why all weights must be in memory; empty if they need not be."""
    spec, allocator = resolved.spec, resolved.allocator
    needs: Sequence[Needs] = (
        resolved.pruner.needs, *([] if allocator is None else [allocator.needs]),
    )  # fmt: skip
    reason = ""
    if isinstance(resolved.pruner, BlockRemover):
        reason = f"{spec.method} removes blocks, and compares the model before and after"
    elif any(need.training is not None for need in needs):
        reason = f"{spec.method} learns, and runs every block forward and backward in each step"
    elif any(need.gradients is not None for need in needs):
        reason = f"{spec.method} reads gradients, which need the whole model"
    elif any(need.whole_model for need in needs):
        reason = f"{spec.allocation} runs the whole model for every group of layers"
    if spec.execute != "dense":
        reason = f"--execute {spec.execute} packs the weights where they are in memory"
    for task in tasks:
        # each new token would read all blocks from disk again
        if getattr(task, "generates", False):
            reason = f"{task.name} makes the model write text, token by token"
    if resolved.setup.log_text:
        reason = "--log-text makes the model write text, token by token"
    return reason
