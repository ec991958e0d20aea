"""The pruning methods: a table of facts, resolved only when a method is used.

A method is a row: a pruner and a default allocator. Variants are rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunebench.registry import Registry, Row


@dataclass(frozen=True)
class Method(Row):
    """One method.

    Attributes:
        prunes: False for a method that makes no weight zero.
        quantizes: Whether it rounds the weights without pruning them.
        updates: Whether it changes the kept weights.
        patterns: The sparsities it supports.
        sparsity: Default sparsity of a run.
        allocation: Default allocator of a run.
    """

    prunes: bool = True
    quantizes: bool = False
    updates: bool = False
    patterns: str = "any ratio, any N:M"
    sparsity: str = "0.5"
    allocation: str = "uniform"

    @property
    def is_baseline(self) -> bool:
        """Whether it leaves every weight as it is."""
        return not (self.prunes or self.quantizes)


BUILTIN: dict[str, Method] = {
    "dense": Method(
        "prunebench.pruners.dense:Dense",
        "no pruning: the baseline",
        prunes=False,
        patterns="0",
        sparsity="0",
    ),
    "random": Method("prunebench.pruners.random:Random", "seeded control, per output row"),
    "magnitude": Method(
        "prunebench.pruners.magnitude:Magnitude", "|W|, per matrix", paper="1506.02626"
    ),
    "wanda": Method(
        "prunebench.pruners.wanda:Wanda",
        "|W| times input norm, per output row",
        paper="2306.11695",
        data=True,
    ),
    "wanda-variant": Method(
        "prunebench.pruners.wanda:WandaVariant",
        "wanda, where output rows lose an equal share of their score",
        paper="2306.11695",
        data=True,
    ),
    "sparsegpt": Method(
        "prunebench.pruners.sparsegpt:SparseGPT",
        "optimal brain surgeon by columns, with weight updates",
        paper="2301.00774",
        data=True,
        updates=True,
    ),
    "alps": Method(
        "prunebench.pruners.alps:Alps",
        "layer reconstruction by ADMM, then conjugate gradients on the support",
        paper="2406.07831",
        data=True,
        updates=True,
    ),
    "admm": Method(
        "prunebench.pruners.alps:Admm",
        "layer reconstruction by a few ADMM steps (ADMM-Grad)",
        paper="2401.02938",
        data=True,
        updates=True,
    ),
    "ria": Method(
        "prunebench.pruners.ria:Ria",
        "relative importance times a power of the input norm, per output row",
        data=True,
    ),
    "gblm": Method(
        "prunebench.pruners.gblm:Gblm",
        "|W| times (input norm + alpha times gradient norm), per output row",
        paper="2311.04902",
        data=True,
    ),
    "gradient": Method(
        "prunebench.pruners.gblm:Gradient",
        "|W| times gradient norm, per output row",
        paper="2311.04902",
        data=True,
    ),
    "maskllm": Method(
        "prunebench.pruners.maskllm.method:MaskLLM",
        "N:M masks learned by the loss of the whole model, or published ones",
        paper="2409.17481",
        data=True,
        patterns="N:M with at most 70 masks a group",
        sparsity="2:4",
    ),
    "depth": Method(
        "prunebench.pruners.depth:Depth",
        "whole blocks removed, those that change the hidden states least",
        paper="2403.03853",
        data=True,
        patterns="a share of the blocks",
        sparsity="0.2",
    ),
    "scheduler": Method(
        "prunebench.pruners.sparsegpt:SparseGPT",
        "sparsegpt with the hessian allocator (reconstruction)",
        paper="2409.20094",
        data=True,
        updates=True,
        patterns="ratios in the allocator's range",
        sparsity="0.7",
        allocation="hessian",
    ),
    "rtn": Method(
        "prunebench.pruners.rtn:RoundToNearest",
        "no pruning: every weight rounded to 2 to 8 bits by itself",
        paper="2210.17323",
        prunes=False,
        quantizes=True,
        patterns="0",
        sparsity="0",
    ),
    "gptq": Method(
        "prunebench.pruners.gptq:Gptq",
        "no pruning: weights rounded to 2 to 8 bits by columns, with weight updates",
        paper="2210.17323",
        data=True,
        prunes=False,
        quantizes=True,
        updates=True,
        patterns="0",
        sparsity="0",
    ),
}

METHODS = Registry(
    kind="method",
    entry_points="prunebench.pruners",
    row=Method,
    builtin=BUILTIN,
    required=("prune", "needs"),
    option="",
)
