"""SparseGPT: prune column by column, and let the columns behind make up for the error.

Paper: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", https://arxiv.org/abs/2301.00774: algorithm 1, N:M as in section 4, joint quantisation
as in equation 7. Original code: https://github.com/IST-DASLab/sparsegpt, read for its conventions.

With U the factor of the inverse Hessian (`calibration.hessian`), the score of a weight is
(w_rj / U_jj)^2; pruning w_rj makes the error e = w_rj / U_jj, and the weights behind it in the row
change by -e U_j. The layer's reconstruction error is then exactly 1/2 of the sum of all e^2.

What differs from the original: linears with one input share one Hessian, one factor and one pass;
the factor comes from one Cholesky decomposition; masks have exact counts (their threshold takes one
weight more, and all ties); a singular Hessian is tried again with more damping, and the result says
so; of a dead input (zero for every token) no more is pruned than the count of its block asks for;
an input that no calibration token reached (an expert never chosen) falls back to magnitude.

The method `scheduler` (https://arxiv.org/abs/2409.20094) is this pruner with ratios that
`allocators.hessian` spreads over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunebench.calibration.hessian import InverseFactor, factorise
from prunebench.calibration.stats import InputStats
from prunebench.models.measure import count_sparser_groups
from prunebench.models.walker import LinearGroup
from prunebench.pruners.keep import keep_group, keep_largest
from prunebench.pruners.layer import GroupPruner
from prunebench.pruners.magnitude import smallest_dropped
from prunebench.pruners.protocol import BEYOND_TARGET, LayerEvent, Needs, Pruned
from prunebench.sparsity import Sparsity

_INNER = 32  # columns between two updates of the rest of a block; changes rounding only


@dataclass(frozen=True)
class SparseGPT(GroupPruner):
    """Prunes by (w / U_jj)^2 within blocks of columns and updates the weights that are kept.

    Attributes:
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        block_size: Columns that are compared with each other (a multiple of M is taken for N:M).
        quantize_bits: If given, kept weights are rounded to an asymmetric grid a row with so many
            bits, and the columns behind make up for that error too.
    """

    needs: ClassVar[Needs] = Needs(calibration=True, hessian=True)
    damping: float = 0.01
    block_size: int = 128
    quantize_bits: int | None = None

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError("damping must be at least 0")
        if self.block_size < 1:
            raise ValueError("block_size must be at least 1")
        if self.quantize_bits is not None and not 2 <= self.quantize_bits <= 16:
            raise ValueError("quantize_bits must be in 2..16")

    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Solve the linears of one input together: one factor, one pass over the columns."""
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
            IncompatibleData: The Hessian is singular and stays so.
        """
        if stats.tokens == 0:
            pairs = zip(weights, sparsities, strict=True)
            return [Pruned(smallest_dropped(weight, sparsity)) for weight, sparsity in pairs]
        factor = factorise(stats, damping=self.damping, name=names[0])
        # A column of the weight is a row here: the loop below reads and writes whole rows.
        columns = torch.cat([weight.T for weight in weights], dim=1)  # (in, all outputs)
        parts = _parts(weights, sparsities)
        grid = Grid.of(columns, self.quantize_bits) if self.quantize_bits else None
        for part in parts:
            if part.sparsity.is_pattern and part.sparsity.ratio:
                columns[:, part.outputs].masked_fill_(factor.dead[:, None], 0)
        losses = self._eliminate(columns, factor, parts, grid)
        dead = int(factor.dead.sum())
        found = []
        for name, part in zip(names, parts, strict=True):
            new = columns[:, part.outputs].T
            events = []
            if factor.retries:
                events.append(LayerEvent(name, "Hessian damped more", factor.damping))
            if dead:
                events.append(LayerEvent(name, "dead inputs", float(dead)))
            sparser = count_sparser_groups(new, part.sparsity)
            if sparser:
                events.append(
                    LayerEvent(name, "groups with fewer non-zeros than N", float(sparser))
                )
            beyond = int((new == 0).sum()) - part.sparsity.count(new.numel())
            if beyond > 0 and grid and not part.sparsity.is_pattern:  # small ones round to 0
                events.append(LayerEvent(name, BEYOND_TARGET, float(beyond)))
            found.append(Pruned(new, float(losses[part.outputs].sum()) / 2, tuple(events)))
        return found

    def _eliminate(
        self, columns: Tensor, factor: InverseFactor, parts: list[_Part], grid: Grid | None
    ) -> Float[Tensor, " outputs"]:
        """Prune `columns` (in, outputs) in place; return the sum of e^2 of each output, float64."""
        group = math.lcm(*(part.sparsity.group or 1 for part in parts))
        inner = group * max(1, _INNER // group)
        size = inner * max(1, self.block_size // inner) if group > 1 else self.block_size
        losses = torch.zeros(columns.shape[1], dtype=torch.float64, device=columns.device)
        for start in range(0, len(columns), size):
            block = columns[start : start + size]  # (size, outputs), a view
            stop = start + len(block)
            upper = factor.upper[start:stop]
            scale = 1 / upper[:, start:stop].diagonal()
            dead = factor.dead[start:stop, None]
            keep = torch.ones_like(block, dtype=torch.bool)
            for part in parts:
                if not part.sparsity.is_pattern:
                    own = block[:, part.outputs]
                    score = (own.abs() * scale[:, None]).masked_fill_(dead, 0)
                    chosen = _keep_block(score, part.sparsity, start, stop)
                    own.masked_fill_(dead & ~chosen, 0)  # no error: nothing comes through
                    keep[:, part.outputs] = chosen
            errors = _prune_block(
                block, keep, upper[:, start:stop], parts=parts, inner=inner, grid=grid
            )
            columns[stop:].addmm_(upper[:, stop:].T, errors, alpha=-1)
            losses += errors.square_().sum(0)
        return losses


@dataclass(frozen=True)
class _Part:
    """The outputs of one matrix among the stacked ones, and its target."""

    outputs: slice
    sparsity: Sparsity


def _parts(weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> list[_Part]:
    parts, begin = [], 0
    for weight, sparsity in zip(weights, sparsities, strict=True):
        parts.append(_Part(slice(begin, begin + len(weight)), sparsity))
        begin += len(weight)
    return parts


def _keep_block(
    score: Float[Tensor, "size out"], sparsity: Sparsity, start: int, stop: int
) -> Bool[Tensor, "size out"]:
    """Compare all weights of a block; the counts of the blocks add up to the matrix's."""
    outputs = score.shape[1]
    prune = sparsity.count(stop * outputs) - sparsity.count(start * outputs)
    return keep_largest(score.reshape(1, -1), prune=prune).view(score.shape)


def _prune_block(
    block: Tensor,
    keep: Tensor,
    upper: Float[Tensor, "size size"],
    *,
    parts: list[_Part],
    inner: int,
    grid: Grid | None,
) -> Float[Tensor, "size outputs"]:
    """Prune one block of columns in place, in their order; return their errors e."""
    errors = torch.empty_like(block)
    scales = (1 / upper.diagonal()).tolist()
    patterns = [part for part in parts if part.sparsity.group is not None]
    for first in range(0, len(block), inner):
        last = min(first + inner, len(block))
        for j in range(first, last):
            for part in patterns:
                _keep_groups(block, keep, scales, j, part)
            kept = torch.where(keep[j], block[j], 0)
            if grid is not None:
                kept = grid.round(kept)
            torch.sub(block[j], kept, out=errors[j]).mul_(scales[j])
            block[j + 1 : last].addr_(upper[j, j + 1 : last], errors[j], alpha=-1)
            block[j] = kept
        block[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1)
    return errors


def _keep_groups(block: Tensor, keep: Tensor, scales: list[float], j: int, part: _Part) -> None:
    """Where a group of N:M begins at column j, choose what it keeps, from its weights of now."""
    group, kept = part.sparsity.group, part.sparsity.kept
    if group is None or kept is None or j % group:
        return
    scale = torch.tensor(scales[j : j + group], device=block.device)
    score = block[j : j + group, part.outputs].abs().mul_(scale[:, None])  # (M, out)
    keep[j : j + group, part.outputs] = keep_group(score, kept=kept)


@dataclass(frozen=True)
class Grid:
    """An asymmetric grid of 2^bits values a row that holds 0, from the smallest to the largest.

    The grid is made from the dense weights; a pruned weight stays exactly 0.
    """

    step: Float[Tensor, " out"]
    zero: Float[Tensor, " out"]
    largest: int

    @classmethod
    def of(cls, columns: Float[Tensor, "in out"], bits: int) -> Grid:
        """Build the grid of every output from its weights."""
        largest = 2**bits - 1
        low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
        step = (high - low) / largest
        step[step == 0] = 1
        return cls(step, (-low / step).round(), largest)

    def round(self, values: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """Return the nearest values of the grid."""
        steps = (values / self.step).round_().add_(self.zero).clamp_(0, self.largest)
        return steps.sub_(self.zero).mul_(self.step)
