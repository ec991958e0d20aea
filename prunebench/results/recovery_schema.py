"""The recovery in a result: what trained the kept weights, and what came of it, block by block."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from prunebench.spec import OptionValue


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class BlockRow(_Block):
    """What the recovery of one block of the model did.

    Attributes:
        block: Its index.
        held_out_before: Mean squared error of the block's output on held-out windows before the
            recovery; null where none was measured.
        held_out_after: The same of the weights that stayed.
        train_before: Mean loss of the first epoch, of the same kind.
        train_after: Mean loss of the last epoch.
        steps: Steps that were made.
        best_step: The step whose weights stayed; 0 is the start: nothing of the training did.
        seconds: With the dense model's hidden states.
        event: What went wrong, if anything did.
        untrained: Matrices that were left as they were: experts that too few tokens reached.
        zeros: Kept weights that became 0, by matrix.
    """

    block: int
    held_out_before: float | None
    held_out_after: float | None
    train_before: float | None = None
    train_after: float | None = None
    steps: int
    best_step: int
    seconds: float
    event: str = ""
    untrained: list[str] = []
    zeros: dict[str, int] = {}


class RecoveryBlock(_Block):
    """How the kept weights were trained after pruning; absent where they were not.

    Attributes:
        windows: Calibration windows that were trained on.
        held_out_windows: Calibration windows that chose what stayed.
        tokens: Tokens that were trained on, repeated ones counted again.
        seconds: Not part of `cost.prune_seconds`.
        recovered_blocks: Blocks in which trained weights stayed.
        held_out_before: Geometric mean of the blocks' held-out errors before; null where none was
            measured, or all are 0.
        held_out_after: The same after, of the same blocks: their ratio is the mean ratio.
        blocks: One row a block of the model.
    """

    name: str
    implementation: str
    version: str
    options: dict[str, OptionValue]
    paper: str | None = None
    windows: int
    held_out_windows: int
    seqlen: int
    tokens: int
    seconds: float
    recovered_blocks: int
    held_out_before: float | None
    held_out_after: float | None
    blocks: list[BlockRow] = []
