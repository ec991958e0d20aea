"""Whether token ids have a row in the model's embedding: one check for every way they come in.

On a CPU an id beyond it is an IndexError in the middle of a run; on CUDA it ends the context, and
what is asked afterwards fails elsewhere. So ids are looked at on the CPU, before any weight is
loaded. A tokenizer may know more tokens than the model (an added padding token, say), as long as
none of them is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.errors import IncompatibleData


def vocabulary_size(model: nn.Module) -> int:
    """Return how many token ids a model can read and predict: rows of its embedding and head."""
    known: Any = model
    ends = (known.get_input_embeddings(), known.get_output_embeddings())
    return min(int(end.weight.shape[0]) for end in ends if hasattr(end, "weight"))


def largest_id(tokenizer: Any) -> int:
    """Return the largest token id that a tokenizer can give, added tokens included."""
    return max(tokenizer.get_vocab().values(), default=-1)


def require_known(
    token_ids: Tensor | Sequence[int], *, vocabulary: int, source: str, tokenizer: Any = None
) -> None:
    """Refuse token ids that the model has no row for.

    Args:
        token_ids: Integers, any shape, on any device.
        vocabulary: What `vocabulary_size` says of the model.
        source: What holds them, for the error.
        tokenizer: What made them, to show the text of a token; None for a file of tokens.

    Raises:
        IncompatibleData: An id is negative or too large, or there is none.
    """
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
        else "use the tokenizer that the model was trained with: this one knows more tokens",
    )
