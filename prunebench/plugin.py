"""What a plug-in needs, in one import.

    from prunebench.plugin import LayerPruner, Needs, keep_rows

Subclass `LayerPruner` (one matrix at a time) or `GroupPruner` (the linears that read one input), or
implement `Pruner`. `prunebench check NAME` runs the contract tests on the result. To train the kept
weights afterwards, subclass `BlockRecoverer`, or `ModelRecoverer` to train the whole model;
`prunebench check recover:NAME` checks it.
"""

from __future__ import annotations

from prunebench.calibration.stats import InputStats
from prunebench.pruners.keep import keep_group, keep_largest, keep_matrix, keep_rows
from prunebench.pruners.layer import GroupPruner, LayerPruner
from prunebench.pruners.protocol import LayerEvent, Needs, Pruned, Pruner, PruneReport
from prunebench.recovery.protocol import (
    BlockRecoverer,
    ModelRecoverer,
    ModelRecovery,
    PrunedBlock,
    RecoveredBlock,
    Recoverer,
)
from prunebench.sparsity import Sparsity

__all__ = [
    "BlockRecoverer",
    "GroupPruner",
    "InputStats",
    "LayerEvent",
    "LayerPruner",
    "ModelRecoverer",
    "ModelRecovery",
    "Needs",
    "PruneReport",
    "Pruned",
    "PrunedBlock",
    "Pruner",
    "RecoveredBlock",
    "Recoverer",
    "Sparsity",
    "keep_group",
    "keep_largest",
    "keep_matrix",
    "keep_rows",
]
