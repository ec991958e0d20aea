"""Bytes of the checkpoint that a result's weights need, in the smallest of the forms that fit it.

Computed, not measured: from the counts in the result, so that every row has them. Dense weights
count 16 bits each, whatever dtype they were scored in; so do embeddings, norms, biases and head,
which nothing here makes smaller. The prunable weights take, for W of them:

    dense            16 W bits
    2:4              a value for two of every four, and 4 bits that say which: 1 bit a weight
    bitmap           a value for every nonzero, and 1 bit a weight (any ratio, other N:M)
    removed blocks   nothing

and a value has 16 bits, or, quantized, the bits of a code; every group of codes adds a step of 16
bits and, unless it is symmetric, a zero point of as many bits as a code. So INT4 + 2:4 takes
4 / 2 + 1 = 3 bits a weight besides the steps: as many as INT3.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunebench.results.quantization_schema import QuantizationBlock
from prunebench.results.schema import Result
from prunebench.sparsity import Sparsity

DENSE_BITS = 16  # of a weight that is not quantized, and of a step
INDEX_BITS = 1  # a weight: 4 bits for a group of 2:4, or a bitmap
_IMPLY_24 = ((2, 4), (1, 4), (1, 2))  # N:M that keep at most 2 of every 4


@dataclass(frozen=True)
class CheckpointSize:
    """What a checkpoint takes.

    Attributes:
        form: `dense`, `2:4`, `bitmap`, `INT4`, `2:4 + INT4`, `bitmap + INT4`; of a model without
            some of its blocks, that of the others.
        total_bytes: Of the whole checkpoint.
        dense_bytes: Of the dense model in 16 bits.
    """

    form: str
    total_bytes: int
    dense_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes beside those of the dense model in 16 bits."""
        return self.total_bytes / self.dense_bytes


def size_of(result: Result) -> CheckpointSize | None:
    """Return the size of a finished run's checkpoint; None where the counts are missing."""
    model, sparsity = result.model, result.sparsity
    if model is None or sparsity is None:
        return None
    removal = sparsity.removal
    weights = model.prunable_parameters - (removal.removed_weights if removal else 0)
    parameters = model.parameters - (removal.removed_parameters if removal else 0)
    form, bits = _prunable_bits(
        weights,
        zeros=round(sparsity.realised_ratio * weights),
        requested=Sparsity.parse(sparsity.requested) if removal is None else Sparsity(0.0),
        quantization=result.quantization,
    )
    rest = (parameters - weights) * DENSE_BITS
    return CheckpointSize(form, -(-(bits + rest) // 8), model.parameters * DENSE_BITS // 8)


def _prunable_bits(
    weights: int, *, zeros: int, requested: Sparsity, quantization: QuantizationBlock | None
) -> tuple[str, int]:
    """Return the form of the prunable weights, and how many bits it takes."""
    value_bits = quantization.bits if quantization else DENSE_BITS
    forms = {"": weights * value_bits}
    if (requested.kept, requested.group) in _IMPLY_24:
        forms = {"2:4": weights // 2 * value_bits + weights * INDEX_BITS}
    elif requested.ratio:
        forms["bitmap"] = (weights - zeros) * value_bits + weights * INDEX_BITS
    form = min(forms, key=lambda name: forms[name])
    codes = quantization_name(quantization.bits) if quantization else ""
    name = " + ".join(filter(None, (form, codes))) or "dense"
    return name, forms[form] + (scale_bits(quantization) if quantization else 0)


def scale_bits(quantization: QuantizationBlock) -> int:
    """Return the bits of all steps and zero points."""
    zero_point = 0 if quantization.symmetric else quantization.bits
    return quantization.groups * (DENSE_BITS + zero_point)


def quantization_name(bits: int) -> str:
    """Return `INT4`."""
    return f"INT{bits}"


def target_of(result: Result) -> str:
    """Return what was asked of the weights: `0.5`, `2:4`, `INT4`, `2:4 + INT4`.

    Rows are compared with rows of the same target: of 2:4 and of 2:4 + INT4, the first is always
    better, and larger.
    """
    quantization = result.quantization
    if quantization is None:
        return result.spec.sparsity
    pruned = result.spec.sparsity if Sparsity.parse(result.spec.sparsity).ratio else ""
    return " + ".join(filter(None, (pruned, quantization_name(quantization.bits))))
