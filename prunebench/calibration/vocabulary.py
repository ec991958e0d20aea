"""Check that token ids have a row in the model's embedding, wherever they come from.

On a CPU a too large id raises IndexError in the middle of a run; on CUDA it destroys the context,
and later calls fail elsewhere. So ids are checked on the CPU, before any weight is loaded. A
tokenizer may have more tokens than the model (an added padding token, for example), as long as none
of them is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.errors import IncompatibleData


def vocabulary_size(model: nn.Module) -> int:
    """Return how many token ids a model can read and predict: rows of its embedding and head."""
    pretrained: Any = model
    ends = (pretrained.get_input_embeddings(), pretrained.get_output_embeddings())
    # An id is looked up in the embedding and is a class of the head; their rows may differ.
    return min(int(end.weight.shape[0]) for end in ends if hasattr(end, "weight"))


def largest_id(tokenizer: Any) -> int:
    """Return the largest token id of a tokenizer, added tokens included."""
    return max(tokenizer.get_vocab().values(), default=-1)


def require_known(
    token_ids: Tensor | Sequence[int], *, vocabulary: int, source: str, tokenizer: Any = None
) -> None:
    """Refuse token ids that have no row in the model's embedding.

    Args:
        token_ids: Integers, any shape, on any device.
        vocabulary: From `vocabulary_size`.
        source: File or task that holds them, for the error.
        tokenizer: Decodes the offending token for the error; None for a token file.

    Raises:
        IncompatibleData: An id is negative or too large, or there are no ids.
    """
    # min and max of an empty tensor would raise; (-1, -1) leads to the error below.
    ids = torch.as_tensor(token_ids)
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (-1, -1)
    if low >= 0 and high < vocabulary:
        return
    where = f"the smallest token is {low}" if ids.numel() else "it holds no token"
    if high >= vocabulary:
        text = f" ({tokenizer.decode([high])!r})" if tokenizer is not None else ""
        where = f"its largest token is {high}{text}, and the embedding has {vocabulary} rows"
    raise IncompatibleData(
        f"{source} does not fit the model's vocabulary of {vocabulary} tokens",
        where=where,
        fix="use tokens made with this model's tokenizer"
        if tokenizer is None
        else "use the tokenizer that the model was trained with: this one has more tokens",
    )
