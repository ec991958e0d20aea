"""Many token sequences as one row in which every shared beginning stands once.

The choices of one question begin with the same tokens, and a model computes them again for each.
Here the sequences are a tree: a node is a token after a given beginning, its position is its depth,
and it attends to its ancestors and to itself. Each token so sees what it would see in its own row,
and the outputs are those of the separate rows up to rounding, for a model that takes positions and
attention from its arguments alone. Whether one does is for the caller to check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WHOLE = 1.5  # a batch may grow by half to hold the last of sequences that share a beginning


@dataclass(frozen=True)
class TokenTree:
    """Sequences merged into one row.

    Attributes:
        token_ids: Token of each node, parents before children, int64 (1, nodes).
        positions: Depth of each node, int64 (1, nodes).
        sees: True where the row's node attends to the column's, bool (nodes, nodes).
        paths: The nodes of each sequence, int64 (tokens,) each.
    """

    token_ids: Tensor
    positions: Tensor
    sees: Tensor
    paths: list[Tensor]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to attention scores, (1, 1, nodes, nodes): 0 or the lowest value."""
        mask = torch.zeros(self.sees.shape, dtype=dtype)
        return mask.masked_fill_(~self.sees, torch.finfo(dtype).min)[None, None]


def build_tree(sequences: Sequence[Sequence[int]]) -> TokenTree:
    """Merge sequences of token ids, none of them empty."""
    children: dict[tuple[int, int], int] = {}  # (parent, token): node; the parent of roots is -1
    parents: list[int] = []
    paths = []
    for sequence in sequences:
        node, path = -1, []
        for token in sequence:
            key = (node, token)
            if key not in children:
                children[key] = len(parents)
                parents.append(node)
            node = children[key]
            path.append(node)
        paths.append(torch.tensor(path))
    count = len(parents)
    sees = torch.eye(count, dtype=torch.bool)
    positions = torch.zeros(count, dtype=torch.int64)
    for node, parent in enumerate(parents):  # parents come first, so their rows are complete
        if parent >= 0:
            sees[node] |= sees[parent]
            positions[node] = positions[parent] + 1
    token_ids = torch.tensor([token for _, token in children])  # a dict is in order of insertion
    return TokenTree(token_ids[None], positions[None], sees, paths)


def shared_batches(
    sequences: Sequence[Sequence[int]], *, tokens: int, rows: int | None = None
) -> Iterator[list[int]]:
    """Yield the numbers of sequences to merge, such that those with a shared beginning meet.

    Args:
        sequences: Token ids.
        tokens: About so many nodes in a tree; a sequence may have more by itself.
        rows: At most so many sequences in a tree; None is any number.
    """
    batch: list[int] = []
    nodes = 0
    previous: Sequence[int] = ()
    # in lexicographic order neighbors share the longest beginnings
    for number in sorted(range(len(sequences)), key=lambda number: tuple(sequences[number])):
        sequence = sequences[number]
        shared = _shared(previous, sequence)
        new = len(sequence) - shared
        limit = tokens * (_WHOLE if 2 * shared > len(sequence) else 1)
        if batch and (nodes + new > limit or len(batch) == rows):
            yield batch
            batch, nodes, new = [], 0, len(sequence)
        batch.append(number)
        nodes += new
        previous = sequence
    if batch:
        yield batch


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at the beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
