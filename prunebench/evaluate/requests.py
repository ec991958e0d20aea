"""Whether the model has a row for every token that lm-eval will ask about.

Asked before any weight is loaded, and only where the tokenizer knows tokens that the model does
not. `evaluate.tasks` looks at what lm-eval then really asks once more.
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
            "".join(part for part in request.args if isinstance(part, str))
            for request in task.instances
        ]
        ids = tokenizer(texts).input_ids if texts else []
        require_known_ids(ids, name, tokenizer=tokenizer, vocabulary=vocabulary)


def require_known_ids(
    sequences: Iterable[Iterable[int]], name: str, *, tokenizer: Any, vocabulary: int
) -> None:
    """Refuse sequences of token ids, asked by a task, of which one is beyond the embedding."""
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    require_known([largest], vocabulary=vocabulary, source=f"the task {name}", tokenizer=tokenizer)
