"""What a plug-in needs, in one import.

    from prunebench.plugin import LayerPruner, Needs, keep_rows

Subclass `LayerPruner` (one matrix at a time) or `GroupPruner` (the linears that read one input), or
implement `Pruner`; subclass `BlockRemover` to remove whole blocks; implement `Allocator` to spread
a ratio over the layers. A class is used as `module:Class`, or under a name that a package declares
as entry point: groups `prunebench.pruners`, `prunebench.allocators` and `prunebench.recoverers`.
`prunebench check NAME` runs the contract tests on a method, and so does
`prunebench.testing.check_pruner`. To train the kept weights afterwards, subclass `BlockRecoverer`,
or `ModelRecoverer` to train the whole model; `prunebench check recover:NAME` checks it.
"""

from __future__ import annotations

from prunebench.allocators.allocation import Allocation, Allocator
from prunebench.calibration.stats import InputStats
from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.linears import Linear
from prunebench.models.walker import BlockWalker, LinearGroup
from prunebench.pruners.keep import keep_group, keep_largest, keep_matrix, keep_rows
from prunebench.pruners.layer import GroupPruner, LayerPruner
from prunebench.pruners.protocol import LayerEvent, Needs, Pruned, Pruner, PruneReport
from prunebench.pruners.removal import BlockChoice, BlockRemover
from prunebench.recovery.protocol import (
    BlockRecoverer,
    ModelRecoverer,
    ModelRecovery,
    PrunedBlock,
    RecoveredBlock,
)
from prunebench.sparsity import Sparsity

__all__ = [
    "Allocation",
    "Allocator",
    "BlockChoice",
    "BlockRecoverer",
    "BlockRemover",
    "BlockWalker",
    "GroupPruner",
    "IncompatibleData",
    "InputStats",
    "LayerEvent",
    "LayerPruner",
    "Linear",
    "LinearGroup",
    "ModelRecoverer",
    "ModelRecovery",
    "Needs",
    "PruneReport",
    "Pruned",
    "PrunedBlock",
    "Pruner",
    "RecoveredBlock",
    "Sparsity",
    "UsageError",
    "keep_group",
    "keep_largest",
    "keep_matrix",
    "keep_rows",
]
