"""Allocators: rules that turn one target ratio into a ratio for every layer.

Any rule goes with any method: `run --method wanda --allocation owl`. The mean over all prunable
weights is exactly the target, and so are the zeros that come out, to 0.01% at any width
(`allocation.whole_counts`): two allocations are compared at the same size. An allocation
can be saved and reused (`--save-allocation FILE`, `--allocation file:FILE`).
"""

from __future__ import annotations

from prunebench.registry import Registry, Row

BUILTIN: dict[str, Row] = {
    "uniform": Row("prunebench.allocators.uniform:Uniform", "the same ratio everywhere"),
    "hessian": Row(
        "prunebench.allocators.hessian:Hessian",
        "by the estimated reconstruction error of each layer, in clusters (reconstruction)",
        paper="2409.20094",
        data=True,
    ),
    "owl": Row(
        "prunebench.allocators.blockwise:Owl",
        "by the share of outliers in each block",
        paper="2310.05175",
        data=True,
    ),
    "dlp": Row(
        "prunebench.allocators.blockwise:Dlp",
        "by the median score of each block",
        paper="2505.23807",
        data=True,
    ),
    "sensitivity": Row(
        "prunebench.allocators.sensitivity:Sensitivity",
        "by what pruning each group of layers alone does to the model's output",
        data=True,
    ),
}

FILE = Row("prunebench.allocators.allocation:load_allocation", "the ratios of a file")

ALLOCATORS = Registry(
    kind="allocator",
    entry_points="prunebench.allocators",
    row=Row,
    builtin=BUILTIN,
    required=("allocate", "check", "needs"),
    option="allocation.",
)
