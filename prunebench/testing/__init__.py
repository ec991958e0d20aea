"""For tests, ours and those of plug-in authors: tiny random models and the contract of a pruner.

    from prunebench.testing import check_pruner
    assert all(outcome.passed for outcome in check_pruner(MyPruner()))

`prunebench check my_module:MyPruner` prints the same outcomes.
"""

from prunebench.testing.contract import (
    SHARES,
    SPARSITIES,
    Outcome,
    check_pruner,
    check_recoverer,
)
from prunebench.testing.tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    FUSED_EXPERTS,
    VOCABULARY,
    tiny_model,
    tiny_tokens,
)

__all__ = [
    "ARCHITECTURES",
    "CONTEXT",
    "FUSED_EXPERTS",
    "SHARES",
    "SPARSITIES",
    "VOCABULARY",
    "Outcome",
    "check_pruner",
    "check_recoverer",
    "tiny_model",
    "tiny_tokens",
]
