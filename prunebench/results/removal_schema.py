"""Removed blocks in a result: which blocks of the dense model are gone, and what scored them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class BlockScore(_Block):
    """What the method measured for one block of the dense model; the lowest is removed first.

    Attributes:
        block: Its index in the dense model.
        score: In the method's unit; of a removed block in the pass after which it was removed.
    """

    block: int
    score: float


class RemovalBlock(_Block):
    """Whole blocks that are gone. A removed weight is no zero: the two are counted apart.

    Attributes:
        blocks: Their indices in the dense model, in the order in which they were removed.
        blocks_before: Blocks of the dense model.
        removed_weights: Prunable weights of the removed blocks, of `model.prunable_parameters`.
        removed_parameters: All their parameters, with norms and biases, of `model.parameters`.
        scores: Of every block that the method scored.
    """

    blocks: list[int]
    blocks_before: int
    removed_weights: int
    removed_parameters: int
    scores: list[BlockScore] = []
