"""What a model wrote, beside what the dense model wrote: `run --log-text` and its readers."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict, Field

PROMPTS_VERSION = "v1"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water is made of",
    "def fibonacci(n):\n",
    "Question: I have 3 apples and buy 4 more. How many apples do I have?\nAnswer:",
    "The three primary colors are",
    "To make a cup of tea, first",
    "English: Good morning. French:",
    "The opposite of hot is",
    "In 1969, the first human",
    "Photosynthesis is the process by which",
    "The best thing about reading books is",
)
"""What `run --log-text N` completes; a change is another `PROMPTS_VERSION`."""

LOGGED_TOKENS = 48


class LoggedCompletion(BaseModel):
    """What the pruned model and the dense one wrote after a prompt.

    Attributes:
        text: Of the pruned model, without the prompt.
        dense_text: Of the dense model.
        tokens: Tokens of `text`, an end-of-text token included.
        dense_tokens: The same of `dense_text`.
        same_tokens: So many tokens are equal before the first that differs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    text: str
    dense_text: str
    tokens: int
    dense_tokens: int
    same_tokens: int


class CompletionsBlock(BaseModel):
    """Greedy completions of fixed prompts.

    Attributes:
        prompts: Version of the list of prompts.
        max_new_tokens: A completion ends there, or at an end-of-text token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: str
    max_new_tokens: int = Field(ge=1)
    completions: list[LoggedCompletion]


def leaves_at(text: str, dense: str) -> int | None:
    """Return where a text leaves another: the beginning of its first word that differs.

    None if the texts are equal.
    """
    if text == dense:
        return None
    same = len(os.path.commonprefix([text, dense]))
    # inside a word: back to its beginning, "Paris" and "Parma" differ as words
    while same > 0 and _inside_word(text, same) | _inside_word(dense, same):
        same -= 1
    return same


def _inside_word(text: str, place: int) -> bool:
    return text[place - 1].isalnum() and text[place : place + 1].isalnum()
