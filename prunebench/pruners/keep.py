"""Keep masks from scores: exact counts, ties broken by position, True = keep.

Among equal scores the earlier position is pruned first, as a stable ascending sort does it in the
papers' code; a threshold with `<=` would prune every tie (a constant matrix entirely).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunebench.sparsity import Sparsity

_CHUNK = 1 << 18  # elements; a chunk and its buffers stay in the L2 cache
_CUDA_CHUNK = 1 << 24  # 14 launches a chunk: few chunks
_LONGEST_ROW = 1 << 16  # of torch's selection on CUDA, which gives a row to one multiprocessor
_WIDEST_PAIRWISE = 8  # M up to which all pairs are compared; above, selection is faster


def keep_rows(score: Float[Tensor, "out in"], sparsity: Sparsity) -> Bool[Tensor, "out in"]:
    """Compare the weights of each output row, or of each N:M group along the input.

    A ratio prunes floor(in * ratio) weights of every row. Rounding down leaves fewer than
    floor(out * in * ratio) zeros in the matrix, so rows lose one weight more until the count is
    exact: those whose next weight scores least, of equal ones the earlier row. N:M prunes exactly
    M - N of every M consecutive inputs; M must divide the width.
    """
    if sparsity.group is None or sparsity.kept is None:
        return _keep_ratio(score, sparsity)
    if sparsity.group <= _WIDEST_PAIRWISE:
        return _keep_pairwise(score, kept=sparsity.kept, group=sparsity.group)
    groups = score.reshape(-1, sparsity.group)  # [out * in / M, M]
    return keep_largest(groups, prune=sparsity.group - sparsity.kept).view(score.shape)


def _keep_ratio(score: Tensor, sparsity: Sparsity) -> Tensor:
    rows, width = score.shape
    prune = sparsity.count(width)
    keep = keep_largest(score, prune=prune)
    # Every row has lost floor(in * ratio); the rest of the matrix's count goes to `extra` of the
    # rows.
    extra = sparsity.count(rows * width) - rows * prune  # below the number of rows
    if extra:
        following = _kth_smallest(score, prune + 1)  # [rows, 1]
        lose_more = ~keep_largest(following.T, prune=extra)[0]  # [rows]; .T is [1, rows]
        # These rows are selected anew, because the weight that goes must respect the order of ties.
        keep[lose_more] = keep_largest(score[lose_more], prune=prune + 1)
    return keep


def keep_matrix(score: Float[Tensor, "out in"], sparsity: Sparsity) -> Bool[Tensor, "out in"]:
    """Compare all weights of a matrix: a ratio prunes exactly floor(out * in * ratio) of them.

    N:M compares inside its groups, as `keep_rows` does.
    """
    if sparsity.is_pattern:
        return keep_rows(score, sparsity)
    flat = score.reshape(1, -1)  # [1, out * in]
    return keep_largest(flat, prune=sparsity.count(flat.shape[1])).view(score.shape)


def keep_largest(score: Float[Tensor, "rows n"], *, prune: int) -> Bool[Tensor, "rows n"]:
    """Keep all but the `prune` smallest scores of each row; of equal ones the earlier ones go."""
    if prune == 0:
        return torch.ones_like(score, dtype=torch.bool)
    # Selection instead of a sort: linear in n, and ties at the threshold are settled below.
    threshold = _kth_smallest(score, prune)  # [rows, 1]
    keep = score > threshold  # [rows, n]
    spare = prune - (score < threshold).sum(-1, keepdim=True)  # ties to prune, >= 1, [rows, 1]
    tied = score == threshold
    crowded = (tied.sum(-1, keepdim=True) > spare).squeeze(-1)  # more ties than that, [rows]
    # Only rows with more ties than that pay for the cumulative sum.
    if crowded.any():
        rank = tied[crowded].cumsum(-1)  # 1 for the first tie of a row
        keep[crowded] |= tied[crowded] & (rank > spare[crowded])
    return keep


def keep_group(score: Float[Tensor, "m out"], *, kept: int) -> Bool[Tensor, "m out"]:
    """Keep the `kept` largest of every column; of equal ones the earlier ones go.

    The transposed `keep_rows` for one N:M group of every output: inputs are rows here.
    """
    group = len(score)
    if group > _WIDEST_PAIRWISE:
        return keep_largest(score.T.contiguous(), prune=group - kept).T  # [M, out]
    position = torch.arange(group, dtype=torch.uint8, device=score.device)
    # A weight wins against all earlier ones until a comparison says otherwise.
    wins = position[:, None].repeat(1, score.shape[1])  # [M, out]
    for d in range(1, group):
        # uint8 wraps around, so a count may pass below 0 on the way: the final sum is right modulo
        # 256.
        first = (score[:-d] > score[d:]).view(torch.uint8)  # [M - d, out]
        wins[:-d] += first
        wins[d:] -= first
    return wins >= group - kept  # [M, out]


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value (k >= 1) of each row, [rows, 1]."""
    if score.device.type == "cpu":  # numpy's quickselect is vectorized, 10 times faster than torch
        part = np.partition(score.numpy(), k - 1, axis=-1)  # [rows, n]
        return torch.from_numpy(part[:, k - 1 : k].copy())
    if score.shape[-1] > _LONGEST_ROW:
        return _kth_smallest_by_bits(score, k)
    return score.kthvalue(k, dim=-1, keepdim=True).values


def _kth_smallest_by_bits(score: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value (k >= 1) of each row, [rows, 1], bit by bit.

    A pass over the row for every bit, by the whole device and without a host read: a row of 45
    million scores, which a sort would need a gigabyte for, takes the memory of one copy.
    """
    integer = {4: torch.int32, 8: torch.int64}[score.dtype.itemsize]
    smallest = torch.iinfo(integer).min
    bits = score.contiguous().view(integer)
    # Numbers in the order of the scores: of negative floats all bits but the sign are inverted.
    keys = torch.where(bits < 0, bits ^ ~smallest, bits)
    # The largest number that fewer than k keys are below, from its highest bit down.
    number = torch.full((len(score), 1), smallest, dtype=integer, device=score.device)
    for bit in reversed(range(8 * score.dtype.itemsize)):
        # Adding the highest bit to the smallest number wraps around to 0.
        candidate = number ^ smallest if bit == 8 * score.dtype.itemsize - 1 else number | 1 << bit
        below = (keys < candidate).sum(-1, keepdim=True)  # [rows, 1]
        number = torch.where(below < k, candidate, number)
    return torch.where(number < 0, number ^ ~smallest, number).view(score.dtype)


def _keep_pairwise(score: Tensor, *, kept: int, group: int) -> Tensor:
    """Keep the `kept` largest of every `group` neighbors by counting won comparisons.

    A weight is compared with each other one of its group; it stays if it wins at least
    `group - kept` times. Equal scores count as a win of the later one. All operations run on
    contiguous memory: the comparison of all weights with their d-th neighbor is one shifted
    compare, with the pairs that straddle two groups masked out.
    """
    flat = score.reshape(-1)  # [out * in], group after group
    keep = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    # A chunk holds whole groups: no pair of neighbors straddles two chunks.
    most = _CHUNK if flat.device.type == "cpu" else _CUDA_CHUNK
    chunk = most - most % group
    position = torch.arange(min(chunk, len(flat)), device=flat.device) % group
    # A weight wins against all earlier ones until a comparison says otherwise. Counts are offset so
    # that group - kept wins make 128: the highest bit then says "keep".
    earlier = (position + (128 - (group - kept))).to(torch.uint8)
    # inside[d - 1]: whether a weight and its d-th neighbor are in one group
    inside = [(position + d < group).to(torch.uint8) for d in range(1, group)]
    wins, buffer = torch.empty_like(earlier), torch.empty_like(earlier)
    for start in range(0, len(flat), chunk):
        part = flat[start : start + chunk]
        n = len(part)
        wins[:n] = earlier[:n]
        for d in range(1, group):
            first = buffer[: n - d]  # 1 where the earlier of a pair wins
            # A bool and a uint8 are one byte each: the comparison writes 0 and 1 with no cast.
            torch.gt(part[: n - d], part[d:], out=first.view(torch.bool))
            first &= inside[d - 1][: n - d]
            wins[: n - d] += first
            wins[d:n] -= first
        torch.bitwise_right_shift(wins[:n], 7, out=keep[start : start + chunk])
    return keep.view(torch.bool).view(score.shape)  # [out, in]
