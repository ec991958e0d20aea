"""Check that the model's embedding has a row for every token of lm-eval's requests.

Called before any weight is loaded, and only if the tokenizer has tokens that the model has not.
`evaluate.lm_eval_adapter` checks the token ids of the actual requests again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from prunebench.calibration.vocabulary import require_known


def require_known_requests(
    tasks: Mapping[str, Any], *, limit: int | None, chat: bool, tokenizer: Any, vocabulary: int
) -> None:
    """Refuse tasks whose prompts or answers hold a token that the model has no row for.

    Args:
        tasks: lm-eval's task objects by name; their requests are built here.
        limit: Only the first so many documents, or None.
        chat: Whether prompts are put into the tokenizer's chat template.
        tokenizer: The model's.
        vocabulary: See `calibration.vocabulary.vocabulary_size`.

    Raises:
        IncompatibleData: A token is beyond the embedding.
    """
    for name, task in tasks.items():
        task.build_all_requests(
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=functools.partial(tokenizer.apply_chat_template, tokenize=False)
            if chat
            else None,
        )
        texts = [
            # args: context and answer, or context and a dict of generation settings
            "".join(part for part in request.args if isinstance(part, str))
            for request in task.instances
        ]
        ids = tokenizer(texts).input_ids if texts else []
        require_known_ids(ids, name, tokenizer=tokenizer, vocabulary=vocabulary)


def require_known_ids(
    sequences: Iterable[Iterable[int]], name: str, *, tokenizer: Any, vocabulary: int
) -> None:
    """Refuse token ids of a task's requests that are beyond the embedding."""
    # ids are rows of the embedding: if the largest fits, all do
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    require_known([largest], vocabulary=vocabulary, source=f"the task {name}", tokenizer=tokenizer)
