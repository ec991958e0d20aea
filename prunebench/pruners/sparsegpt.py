"""SparseGPT: prune column by column, and compensate the error in the later columns.

Paper: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", https://arxiv.org/abs/2301.00774: algorithm 1, N:M as in section 4, joint quantization
as in equation 7. Original code: https://github.com/IST-DASLab/sparsegpt, read for its conventions.

With U the factor of the inverse Hessian (`calibration.hessian`), the score of a weight is
(w_rj / U_jj)^2; pruning w_rj makes the error e = w_rj / U_jj, and the weights behind it in the row
change by -e U_j. The layer's reconstruction error is then exactly 1/2 of the sum of all e^2.

What differs from the original: linears with one input share one Hessian, one factor and one pass;
the factor comes from one Cholesky decomposition; masks have exact counts (their threshold takes one
weight more, and all ties); a singular Hessian is tried again with more damping, and the result says
so; of a dead input (zero for every token) no more is pruned than its block's share;
an input that no calibration token reached (an expert never chosen) falls back to magnitude.

A grid's step is rounded to float16, as checkpoints of quantized weights store it.

The method `scheduler` (https://arxiv.org/abs/2409.20094) is this pruner with ratios that
`allocators.hessian` spreads over the layers; `gptq` is this pruner with quantization alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunebench.calibration.hessian import InverseFactor, factorize
from prunebench.calibration.stats import InputStats
from prunebench.models.measure import count_sparser_groups
from prunebench.models.walker import LinearGroup
from prunebench.models.weight_grid import WeightGrid
from prunebench.pruners.keep import keep_group, keep_largest
from prunebench.pruners.layer import GroupPruner
from prunebench.pruners.magnitude import smallest_dropped
from prunebench.pruners.protocol import BEYOND_TARGET, LayerEvent, Needs, Pruned
from prunebench.pruners.rounding import Grid, round_to_nearest
from prunebench.registry import LATER
from prunebench.sparsity import Sparsity

_INNER = 32  # columns between two updates of the rest of a block; changes rounding only


@dataclass(frozen=True)
class SparseGPT(GroupPruner):
    """Prunes by (w / U_jj)^2 within blocks of columns and updates the weights that are kept.

    Attributes:
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        block_size: Columns that are compared with each other (rounded to a multiple of M for N:M,
            and of group_size).
        quantize_bits: If given, round kept weights to a grid with this many bits (2 to 8); later
            columns compensate that error too.
        group_size: Consecutive weights of a row that share a grid; -1: the whole row.
        symmetric: Whether the grids are symmetric around 0, without a zero point.
    """

    needs: ClassVar[Needs] = Needs(calibration=True, hessian=True)
    damping: float = 0.01
    block_size: int = 128
    quantize_bits: int | None = None
    group_size: int = field(default=-1, metadata=LATER)
    symmetric: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError("damping must be at least 0")
        if self.block_size < 1:
            raise ValueError("block_size must be at least 1")
        _ = self.grid  # refuses its values
        if self.quantize_bits is None and (self.group_size != -1 or self.symmetric):
            raise ValueError("group_size and symmetric go with quantize_bits")

    @property
    def grid(self) -> WeightGrid | None:
        """The form of the quantized weights; None if nothing is rounded."""
        if self.quantize_bits is None:
            return None
        return WeightGrid(self.quantize_bits, self.group_size, self.symmetric)

    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Prune the linears of one input together: one factor, one pass over the columns."""
        assert group.stats is not None
        names = [linear.name for linear in group.linears]
        weights = [linear.read() for linear in group.linears]
        yield from self.solve(weights, group.stats, [sparsity[name] for name in names], names)

    def solve(
        self,
        weights: Sequence[Float[Tensor, "_ in"]],
        stats: InputStats,
        sparsities: Sequence[Sparsity],
        names: Sequence[str],
    ) -> list[Pruned]:
        """Prune matrices that read one input, each to its sparsity.

        Raises:
            IncompatibleData: The Hessian stays singular with more damping.
        """
        parts = _parts(weights, sparsities)
        if stats.tokens == 0:
            dropped = [
                smallest_dropped(w, part.sparsity) for w, part in zip(weights, parts, strict=True)
            ]
            if self.grid:
                dropped = [round_to_nearest(weight, self.grid) for weight in dropped]
            return [
                Pruned(weight, events=tuple(self._events_of_zeros(weight, name, part)))
                for weight, name, part in zip(dropped, names, parts, strict=True)
            ]
        factor = factorize(stats, damping=self.damping, name=names[0])
        # Transposed, so that a column of the weight is one contiguous row here.
        columns = torch.cat([weight.T for weight in weights], dim=1)  # [in, all outputs]
        for part in parts:
            # As in the original code, the weights of dead inputs are 0 from the start. With a ratio
            # only the pruned ones are zeroed (in `_eliminate`), so that the count stays exact.
            if part.sparsity.is_pattern and part.sparsity.ratio:
                columns[:, part.outputs].masked_fill_(factor.dead[:, None], 0)  # dead: [in, 1]
        losses = self._eliminate(columns, factor, parts)
        dead = int(factor.dead.sum())
        results = []
        for name, part in zip(names, parts, strict=True):
            pruned = columns[:, part.outputs].T  # [out, in]
            events = []
            if factor.retries:
                events.append(LayerEvent(name, "Hessian damped more", factor.damping))
            if dead:
                events.append(LayerEvent(name, "dead inputs", float(dead)))
            events += self._events_of_zeros(pruned, name, part)
            results.append(Pruned(pruned, float(losses[part.outputs].sum()) / 2, tuple(events)))
        return results

    def _events_of_zeros(self, pruned: Tensor, name: str, part: _Part) -> list[LayerEvent]:
        """Return what a reader should know of the zeros of a matrix [out, in]."""
        events = []
        sparser = count_sparser_groups(pruned, part.sparsity)
        if sparser:
            events.append(LayerEvent(name, "groups with fewer non-zeros than N", float(sparser)))
        beyond = int((pruned == 0).count_nonzero()) - part.sparsity.count(pruned.numel())
        if beyond > 0 and self.grid:  # the grid rounds to 0, too
            events.append(LayerEvent(name, BEYOND_TARGET, float(beyond)))
        return events

    def _eliminate(
        self, columns: Tensor, factor: InverseFactor, parts: list[_Part]
    ) -> Float[Tensor, " outputs"]:
        """Prune `columns` [in, outputs] in place; return the sum of e^2 of each output, float64."""
        # q, k and v may have different patterns: a block must hold whole groups of all of them.
        group = math.lcm(*(part.sparsity.group or 1 for part in parts))
        # Both sizes are rounded to whole groups: a group split between two blocks could not be
        # compared.
        inner = group * max(1, _INNER // group)
        unit = inner if group > 1 else 1
        rounder = None
        if self.grid:
            width = self.grid.width(len(columns))
            if width < len(columns):
                # a grid comes from updated weights: its columns must be in one block
                unit = math.lcm(group, width)
            rounder = _Rounder(self.grid, width, columns)
        size = unit * max(1, self.block_size // unit)
        losses = torch.zeros(columns.shape[1], dtype=torch.float64, device=columns.device)
        for start in range(0, len(columns), size):
            block = columns[start : start + size]  # [size, outputs], a view
            stop = start + len(block)
            upper = factor.upper[start:stop]  # [size, in]
            scale = 1 / upper[:, start:stop].diagonal()  # 1 / U_jj, [size]
            dead = factor.dead[start:stop, None]  # [size, 1]
            keep = torch.ones_like(block, dtype=torch.bool)
            for part in parts:
                if not part.sparsity.is_pattern:
                    weight = block[:, part.outputs]  # [size, out], a view
                    # |w| / U_jj has the order of w^2 / U_jj^2. A dead input scores 0: it goes
                    # first.
                    score = (weight.abs() * scale[:, None]).masked_fill_(dead, 0)
                    part_keep = _keep_block(score, part.sparsity, start, stop)
                    # before the loop: zeroing a dead input's weight causes no error
                    weight.masked_fill_(dead & ~part_keep, 0)
                    keep[:, part.outputs] = part_keep
            errors = _prune_block(
                block, keep, upper[:, start:stop], parts=parts, inner=inner, rounder=rounder
            )
            # Algorithm 1, last line: the lazy batch update, one large product instead of a rank-1
            # update for each column. [in - stop, outputs] -= [in - stop, size] @ [size, outputs]
            columns[stop:].addmm_(upper[:, stop:].T, errors, alpha=-1)  # the columns after it
            # Last: `square_` overwrites the errors that the update above has read.
            losses += errors.square_().sum(0)
        return losses


@dataclass(frozen=True)
class _Part:
    """The outputs of one matrix among the stacked ones, and its target."""

    outputs: slice
    sparsity: Sparsity


def _parts(weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> list[_Part]:
    parts, start = [], 0
    for weight, sparsity in zip(weights, sparsities, strict=True):
        parts.append(_Part(slice(start, start + len(weight)), sparsity))
        start += len(weight)
    return parts


def _keep_block(
    score: Float[Tensor, "size out"], sparsity: Sparsity, start: int, stop: int
) -> Bool[Tensor, "size out"]:
    """Compare all weights of a block; the counts of the blocks add up to the matrix's."""
    outputs = score.shape[1]
    # A difference of cumulative counts: rounding each block by itself would drift from the total.
    prune = sparsity.count(stop * outputs) - sparsity.count(start * outputs)
    flat = score.reshape(1, -1)  # [1, size * out]: one comparison of the whole block
    return keep_largest(flat, prune=prune).view(score.shape)  # [size, out]


def _prune_block(
    block: Tensor,
    keep: Tensor,
    upper: Float[Tensor, "size size"],
    *,
    parts: list[_Part],
    inner: int,
    rounder: _Rounder | None,
) -> Float[Tensor, "size outputs"]:
    """Prune one block of columns in place, in order; return their errors e."""
    errors = torch.empty_like(block)
    scales = 1 / upper.diagonal()  # [size]; it stays on the device: a copy to the host would wait
    patterns = [part for part in parts if part.sparsity.group is not None]
    width = min(rounder.width, len(block)) if rounder else len(block)
    for first, last in _chunks(len(block), width, inner):
        grid = rounder.grid_at(first, block) if rounder else None
        for j in range(first, last):
            for part in patterns:
                _keep_groups(block, keep, scales, j, part)
            # q of algorithm 1: a pruned weight is 0, a kept one is itself or (equation 7) its
            # rounded value.
            column = torch.where(keep[j], block[j], 0)  # [outputs]
            if grid is not None:
                column = grid.round(column)
            # Algorithm 1: e = (w - q) / U_jj, then the later columns of the row change by -e U_j
            # (rank 1).
            torch.sub(block[j], column, out=errors[j]).mul_(scales[j])
            block[j + 1 : last].addr_(upper[j, j + 1 : last], errors[j], alpha=-1)
            block[j] = column
        # lazy batch update: the rest of the block once every `inner` columns
        block[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1)
    return errors


def _keep_groups(block: Tensor, keep: Tensor, scales: Tensor, j: int, part: _Part) -> None:
    """If an N:M group begins at column j, choose its kept weights from their updated values."""
    # Chosen here and not once per block: the columns before j have already changed these weights.
    group, kept = part.sparsity.group, part.sparsity.kept
    if group is None or kept is None or j % group:
        return
    scale = scales[j : j + group, None]  # [M, 1]
    score = block[j : j + group, part.outputs].abs().mul_(scale)  # [M, out]
    keep[j : j + group, part.outputs] = keep_group(score, kept=kept)


def _chunks(length: int, width: int, inner: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of chunks of at most `inner` columns, each inside a group of `width`."""
    for start in range(0, length, width):
        stop = min(start + width, length)
        for first in range(start, stop, inner):
            yield first, min(first + inner, stop)


class _Rounder:
    """The grids of a matrix: one of whole rows from the dense weights, or a new one every group."""

    def __init__(self, form: WeightGrid, width: int, columns: Float[Tensor, "in outputs"]) -> None:
        self.width = width
        self._form = form
        self._is_grouped = width < len(columns)
        self._grid = Grid.of(columns, form) if not self._is_grouped else None

    def grid_at(self, column: int, block: Float[Tensor, "size outputs"]) -> Grid:
        """Return the grid of a column of a block in which all groups are whole."""
        if self._grid is None or (self._is_grouped and column % self.width == 0):
            start = column - column % self.width
            self._grid = Grid.of(block[start : start + self.width], self._form)
        return self._grid
