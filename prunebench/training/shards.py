"""Sharding of trained state and moments over processes by rows; weights are replicated.

Every process owns an equal share of the rows of each matrix (split as `torch.chunk` does). It
computes the weights of its rows, which are all-gathered; their gradients are reduce-scattered back
to the owners. The traffic per matrix is twice the size of the weight, and never the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Shards:
    """The rank of this process and the number of processes."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_group(cls) -> Shards:
        """Return the rank in the process group; rank 0 of 1 without one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def rows(self, count: int) -> slice:
        """Return which of `count` rows this process owns; may be empty."""
        size = -(-count // self.world)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))

    def gather(self, shard: Shaped[Tensor, "rows in"], out: Shaped[Tensor, "out in"]) -> None:
        """Fill `out` with the rows of all processes."""
        if self.world == 1:
            # One process: the caller may have written into `out` already.
            if shard.data_ptr() != out.data_ptr():
                out.copy_(shard)
            return
        size = -(-len(out) // self.world)  # all-gather needs equal sizes: the last are padded
        sent = shard.new_zeros(size, shard.shape[1])
        sent[: len(shard)] = shard
        received = shard.new_empty(size * self.world, shard.shape[1])
        _all_gather(received, sent)
        out.copy_(received[: len(out)])

    def sum_rows(self, whole: Float[Tensor, "out in"]) -> Float[Tensor, "rows in"]:
        """Return the sum over all processes of the rows that this one owns."""
        if self.world == 1:
            return whole
        size = -(-len(whole) // self.world)
        sent = whole.new_zeros(size * self.world, whole.shape[1])
        sent[: len(whole)] = whole
        received = whole.new_empty(size, whole.shape[1])
        _reduce_scatter(received, sent)
        # The last processes own fewer rows, or none: the padding is cut off.
        rows = self.rows(len(whole))
        return received[: rows.stop - rows.start]

    def sum_all(self, whole: Tensor) -> Tensor:
        """Return the sum over all processes; in place."""
        if self.world > 1:
            dist.all_reduce(whole)
        return whole

    def sum(self, *values: float) -> list[float]:
        """Return the sums of some numbers over all processes."""
        if self.world == 1:
            return list(values)
        # NCCL reduces CUDA tensors only.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total]
