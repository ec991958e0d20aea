"""Who holds which rows: logits and moments are shared out over processes, weights are not.

Every process owns the same share of the rows of each matrix (cut as `torch.chunk` does), makes W~
for them and gives it to all; the gradients dL/dW~ of all processes are summed, and each gets its
rows. So what is sent is twice the size of a weight, and nothing of the size of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

# torch 2.13 has new names for these two
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Shards:
    """This process among those that learn together."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_group(cls) -> Shards:
        """Return the place in the process group, or that of a process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def rows(self, count: int) -> slice:
        """Return which of `count` rows this process owns; maybe none."""
        size = -(-count // self.world)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))

    def gather(self, mine: Shaped[Tensor, "rows in"], out: Shaped[Tensor, "out in"]) -> None:
        """Fill `out` with the rows of all processes."""
        if self.world == 1:
            if mine.data_ptr() != out.data_ptr():
                out.copy_(mine)
            return
        size = -(-len(out) // self.world)
        sent = mine.new_zeros(size, mine.shape[1])
        sent[: len(mine)] = mine
        received = mine.new_empty(size * self.world, mine.shape[1])
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
        rows = self.rows(len(whole))
        return received[: rows.stop - rows.start]

    def sum_all(self, whole: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.world > 1:
            dist.all_reduce(whole)
        return whole

    def sum(self, *values: float) -> list[float]:
        """Return the sums of some numbers over all processes."""
        if self.world == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total]
