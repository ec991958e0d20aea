"""Recoverers: training of the kept weights after pruning, with the zeros where they are.

Any recoverer goes with any method, pattern and allocation: `run --method sparsegpt --recover
block`. The mask is read from the zeros of the pruned weights; every pruned place stays +0.0, and
N:M and the number of zeros are checked afterwards as always.
"""

from __future__ import annotations

from prunebench.registry import Registry, Row

BUILTIN: dict[str, Row] = {
    "block": Row(
        "prunebench.recovery.block:Block",
        "each block's output is pulled back to the dense model's, during the walk",
        paper="2406.15524",
        data=True,
    ),
}

RECOVERERS = Registry(
    kind="recoverer",
    entry_points="prunebench.recoverers",
    row=Row,
    builtin=BUILTIN,
    required=("needs", "check"),
    option="recover.",
)
