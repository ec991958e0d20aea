"""Completions of a prompt, by the `generate` of transformers: greedy, or sampled with a seed.

The settings that a checkpoint suggests (`generation_config.json`: a temperature, a repetition
penalty) are left out, so that two models are decoded alike; only its end-of-text tokens count.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunebench.calibration.vocabulary import require_known
from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.load import context_length, quiet_transformers

LEAST_STEPS = 8
"""Fewer decode steps than these give no tokens per second."""

Finish = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: A completion has at most so many.
        temperature: 0 takes the most likely token (greedy); above, tokens are sampled.
        seed: Of the sampling, for every prompt anew.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
        prompt_ids: The tokens that it was given.
        token_ids: The tokens that it wrote.
        text: The same as text, without special tokens.
        finish: `stop` at an end-of-text token, `length` at `max_new_tokens`, `context` where the
            model's context is full.
        steps: Timed decode steps; the first token, which reads the prompt, is none of them.
        seconds: Of these steps.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish: Finish
    steps: int
    seconds: float


def same_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two completions share before the first that differs."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def require_prompt(prompt: str, *, option: str) -> None:
    """Raise `UsageError` if a prompt is empty."""
    if not prompt.strip():
        raise UsageError(f"{option} is empty", fix='give a text, as in --prompt "Once upon a time"')


def encode_prompt(
    prompt: str, tokenizer: Any, config: Any, vocabulary: int, *, name: str, chat: bool = False
) -> tuple[int, ...]:
    """Return the tokens of a prompt, with special tokens as the tokenizer puts them.

    Args:
        prompt: A text; with `chat` the first message of a user.
        tokenizer: Of the model.
        config: Of the model.
        vocabulary: Rows of its embedding.
        name: Of the model, for errors.
        chat: Whether to apply the chat template.

    Raises:
        UsageError: It has no room for a token more in the context of the model.
        IncompatibleData: There is no chat template, or the model does not know a token.
    """
    if chat:
        text = _apply_chat_template(prompt, tokenizer, name)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise UsageError(f"the prompt {prompt!r} has no token", where=f"of {name}")
    limit = context_length(config)
    if limit is not None and len(ids) >= limit:
        raise UsageError(
            f"a prompt has {len(ids):,} tokens, the context of {name} is {limit:,}",
            where=f"it begins with {prompt[:40]!r}",
            fix=f"shorten it to {limit - 1:,} tokens or less",
        )
    require_known(
        torch.tensor([ids]), vocabulary=vocabulary, source="the prompt", tokenizer=tokenizer
    )
    return tuple(ids)


def _apply_chat_template(prompt: str, tokenizer: Any, name: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise IncompatibleData(
            f"{name} has no chat template",
            where="its tokenizer names none",
            fix="leave --chat out, or sample a model that was trained to chat",
        )
    messages = [{"role": "user", "content": prompt}]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    # a template is a program of the checkpoint: it can raise anything
    except Exception as error:
        raise IncompatibleData(
            f"the chat template of {name} fails",
            where=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
            fix="leave --chat out",
        ) from error


def complete(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> Completion:
    """Return the completion of a prompt.

    Ctrl-C ends it: what was written so far is returned, with `finish` = `interrupted`.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Of the model.
        prompt_ids: From `encode_prompt`.
        decoding: How tokens are chosen.
        advance: Called with 1 after each token.

    Raises:
        IncompatibleData: The logits are NaN or infinite: the model is broken.
    """
    limit = context_length(model.config)
    count = decoding.max_new_tokens
    if limit is not None:
        count = min(count, limit - len(prompt_ids))
    ends = _end_tokens(model, tokenizer)
    clock = _TokenClock(advance)
    interrupted = False
    try:
        _generate(model, prompt_ids, decoding, count=count, ends=ends, clock=clock)
    except KeyboardInterrupt:
        interrupted = True
    token_ids = tuple(clock.token_ids)
    finish: Finish = "length" if count == decoding.max_new_tokens else "context"
    if token_ids and token_ids[-1] in ends:
        finish = "stop"
    text = _text_after(prompt_ids, token_ids, tokenizer)
    if interrupted:
        finish = "interrupted"
    steps = max(0, len(clock.times) - 1)
    seconds = clock.times[-1] - clock.times[0] if steps else 0.0
    return Completion(tuple(prompt_ids), token_ids, text, finish, steps, seconds)


@dataclass
class _TokenClock:
    """A streamer of transformers: called with the prompt first, then with every token."""

    advance: Callable[[int], None]
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _after_prompt: bool = False

    def put(self, value: Tensor) -> None:
        if not self._after_prompt:
            self._after_prompt = True
            return
        # the copy to the host waits for the device, so the time is that of a finished step
        self.token_ids += value.flatten().tolist()
        self.times.append(time.perf_counter())
        self.advance(1)

    def end(self) -> None:
        pass


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: those of the model, and the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ids = ends if isinstance(ends, list) else [ends]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}


@torch.no_grad()
def _generate(
    model: Any, prompt_ids: Sequence[int], decoding: Decoding, *, count: int, ends: set[int],
    clock: _TokenClock,
) -> None:  # fmt: skip
    from transformers import GenerationConfig, LogitsProcessorList

    device = next(model.parameters()).device
    samples = decoding.temperature > 0
    # top_k: the library's default would cut the distribution to 50 tokens
    sampling = {"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0} if samples else {}
    settings = GenerationConfig(
        do_sample=samples,
        max_new_tokens=count,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        **sampling,
    )
    ids = torch.tensor([list(prompt_ids)], device=device)  # [1, prompt]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _plain_settings(model), quiet_transformers():
        torch.manual_seed(decoding.seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_require_finite]),
            streamer=clock,
        )


def _require_finite(ids: Tensor, scores: Tensor) -> Tensor:
    """Refuse logits [1, vocabulary] of a broken model: argmax of NaN is a token, too."""
    if not bool(torch.isfinite(scores.amax(-1)).all()):  # amax of a row with NaN is NaN
        raise IncompatibleData(
            "the model's logits are NaN or infinite",
            where=f"after {ids.shape[1]:,} tokens",
            fix="use --dtype float32 or bfloat16, or a lower sparsity",
        )
    return scores


@contextlib.contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Take the generation settings of a checkpoint away: they fill what a call leaves out."""
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


def _text_after(prompt_ids: Sequence[int], token_ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of the new tokens as it continues the prompt."""

    def text_of(ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    # decoded alone, the first token of a sentencepiece model would lose its space
    whole, start = text_of([*prompt_ids, *token_ids]), text_of(prompt_ids)
    return whole[len(start) :] if whole.startswith(start) else text_of(token_ids)
