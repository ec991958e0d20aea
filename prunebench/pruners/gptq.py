"""GPTQ: round the weights to few bits column by column, and compensate in the later columns.

Paper: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", https://arxiv.org/abs/2210.17323: algorithm 1, with the grids
of section 4 (asymmetric, from minimum and maximum) and groups of weights (its `-g128`), whose grid
comes from the weights as the earlier columns have left them.

It prunes nothing; it is here because its checkpoints take as many bytes as pruned ones. The solver
is SparseGPT's at ratio 0 (https://arxiv.org/abs/2301.00774, equation 7: "SparseGPT generalizes
GPTQ"): with no weight pruned, each column is rounded, and the error (w - q) / U_jj goes into the
columns behind.

What differs from the original: columns are visited in their order (no `act-order`); steps are
rounded to float16 before codes are chosen; a group's grid sees all updates of earlier columns, also
where a group is narrower than a block; weights of dead inputs are rounded, not set to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunebench.pruners.rounding import OnlyRounds
from prunebench.pruners.sparsegpt import SparseGPT


@dataclass(frozen=True)
class Gptq(OnlyRounds, SparseGPT):
    """Rounds all weights to a grid, and compensates the error in the later columns.

    Attributes:
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        block_size: Columns between two updates of all columns behind them; changes rounding only.
        quantize_bits: Bits of a code, 2 to 8.
        group_size: Consecutive weights of a row that share a grid; -1: the whole row.
        symmetric: Whether the grids are symmetric around 0, without a zero point.
    """

    name: ClassVar[str] = "gptq"
    quantize_bits: int | None = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize_bits is None:
            raise ValueError("gptq needs quantize_bits: it does nothing else")
