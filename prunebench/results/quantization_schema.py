"""Quantized weights in a result: the grid on which they lie, as it was checked on the weights."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class QuantizationBlock(BaseModel):
    """All prunable weights are a step times integers of few bits, one step for a group.

    Attributes:
        bits: Of a code.
        group_size: Consecutive weights of a row that share a step; -1: the whole row.
        symmetric: Whether the zero point is always the middle code, and not stored.
        groups: Steps of all matrices together.
        exact: Whether steps and codes derived from the evaluated weights give them bit for bit;
            False for weights in 16 bits, of which only the number of values in a group was checked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    bits: int
    group_size: int
    symmetric: bool
    groups: int
    exact: bool
