"""The completions of a model's rows, by prompt: what the page shows of `run --log-text`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prunebench.results.completions import CompletionsBlock, leaves_at
from prunebench.results.report.data import Row
from prunebench.results.report.payload import clean

MAX_ROWS = 40  # each is several paragraphs


def completion_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return for each prompt the texts of the dense model and of the rows that have any.

    A text is `[id, name, same, rest]`: `same` is what it shares with the dense model's text,
    `rest` what comes then, None where nothing differs. The id of a dense text is None.
    """
    prompts: dict[str, tuple[list[str], list[list[str | None]]]] = {}
    # stable: the rows of the short table first
    in_order = sorted(rows, key=lambda row: not row.short)
    for row, block in list(_with_completions(in_order))[:MAX_ROWS]:
        for completion in block.completions:
            dense, texts = prompts.setdefault(completion.prompt, ([], []))
            # rows of one model share a dense text, unless their dtypes differ
            if completion.dense_text not in dense:
                dense.append(completion.dense_text)
            if row.cell.method == "dense":
                continue
            at = leaves_at(completion.text, completion.dense_text)
            rest = None if at is None else completion.text[at:]
            texts.append([row.anchor, clean(row.name), completion.text[:at], rest])
    return [
        {"prompt": prompt, "texts": [*([None, "dense", text, None] for text in dense), *texts]}
        for prompt, (dense, texts) in prompts.items()
    ]


def _with_completions(rows: Sequence[Row]) -> Iterator[tuple[Row, CompletionsBlock]]:
    """Yield the rows with completions, each with those of its newest result that has any."""
    for row in rows:
        blocks = [result.completions for result in row.results if result.completions]
        if blocks:
            yield row, blocks[0]
