"""The recovery in a result: what trained the kept weights, and what came of it, block by block."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

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
        massive: Share of the squares of the dense model's hidden state that the largest hundredth
            of its channels holds; absent where it was not measured.
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
    massive: float | None = Field(default=None, exclude_if=lambda share: share is None)


class HeldOutValues(_Block):
    """What was measured on the held-out windows of an end-to-end training.

    Attributes:
        loss: What was minimized, nats a token; null if it was not finite.
        ppl: Perplexity.
        kl: KL divergence from the dense model, nats a token; null without a teacher.
    """

    loss: float | None
    ppl: float | None
    kl: float | None


class DistillStep(_Block):
    """What was measured at the end of a step; step 0 is the start.

    Attributes:
        step: Steps taken.
        tokens: Tokens trained on so far.
        loss: Mean training loss of the step, nats a token.
        held_out: Where it was measured.
        seconds: Since the beginning of the training.
    """

    step: int
    tokens: int
    loss: float | None
    held_out: HeldOutValues | None
    seconds: float


class EndToEndBlock(_Block):
    """How the whole pruned model was trained, after the last block.

    Attributes:
        text: Text that was trained on.
        origin: As in the calibration block.
        windows: Windows that were trained on; an epoch is all of them.
        held_out_windows: Windows of the same text that chose what stayed.
        seqlen: Tokens in a window.
        tokens_sha256: Hash of all windows, those held out first.
        steps: Steps that were made.
        tokens: Tokens that were trained on, repeated ones counted again.
        seconds: Of all steps and measurements, over resumes.
        best_step: The step whose weights stayed; 0 is the start: nothing of the training did.
        resumed_step: The step that the training resumed from; 0 if it did not.
        processes: Processes that trained together.
        before: Of the start.
        after: Of the weights that stayed.
        curve: One point a step.
    """

    text: str
    origin: str
    windows: int
    held_out_windows: int
    seqlen: int
    tokens_sha256: str
    steps: int
    tokens: int
    seconds: float
    best_step: int
    resumed_step: int = 0
    processes: int
    before: HeldOutValues
    after: HeldOutValues
    curve: list[DistillStep]


class RecoveryBlock(_Block):
    """How the kept weights were trained after pruning; absent where they were not.

    Attributes:
        windows: Calibration windows that were trained on.
        held_out_windows: Calibration windows that chose what stayed.
        tokens: Of these windows, repeated ones counted again.
        seconds: Of all that was trained. Not part of `cost.prune_seconds`.
        recovered_blocks: Blocks in which trained weights stayed.
        held_out_before: Geometric mean of the blocks' held-out errors before; null where none was
            measured, or all are 0.
        held_out_after: The same after, of the same blocks: their ratio is the mean ratio.
        blocks: One row a block of the model.
        training: The training of the whole model; absent where the blocks alone were trained.
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
    training: EndToEndBlock | None = Field(default=None, exclude_if=lambda block: block is None)
