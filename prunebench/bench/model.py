"""A whole model, masked dense against packed: prefill, decode, memory, and the same tokens.

Decode is our own greedy loop with a static cache: one step is captured in a CUDA graph, and the
token is written back on the device. Both models are in memory and are measured interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.bench.timing import BLOCKS, Clock, Ratio, interleaved
from prunebench.calibration.vocabulary import vocabulary_size

PREFILL = ((1, 512), (1, 2048), (8, 2048))
DECODE_BATCHES = (1, 8, 64)
CONTEXTS = (128, 2048)
_STEPS = 8  # decode steps in a turn


@dataclass(frozen=True)
class ModelResult:
    """One case, both models measured in one run.

    Attributes:
        case: `prefill` or `decode`.
        dense_seconds: Per forward pass, or per decode step of the whole batch.
        packed_seconds: The same, of the packed model.
        tokens_per_second: Decoded by the packed model, over the batch.
        peak_bytes: Peak of allocated memory, by model; None if not measured.
        skipped: Why the case could not be measured.
    """

    case: str
    batch: int
    context: int
    dense_seconds: float | None
    packed_seconds: float | None
    ratio: Ratio | None
    tokens_per_second: float | None
    peak_bytes: dict[str, int] | None
    skipped: str = ""


class Decoder:
    """Greedy decoding with a static cache; `step` can be captured in a CUDA graph."""

    def __init__(self, model: nn.Module, prompt: Tensor, *, room: int) -> None:
        from transformers import StaticCache

        self.model: Any = model
        self.cache = StaticCache(config=self.model.config, max_cache_len=prompt.shape[1] + room)
        self.more: dict[str, Tensor] = {}
        if self.model.config.model_type == "opt":
            # Without a mask OPT makes one as long as the cache is filled, a number that it waits
            # for: not possible in a capture. Positions and causality hide the free places.
            size = (prompt.shape[0], prompt.shape[1] + room)
            self.more["attention_mask"] = torch.ones(size, dtype=torch.long, device=prompt.device)
        # On the device: a captured graph reads the position from memory, and `step` advances it
        # there.
        self.position = torch.full((1, 1), prompt.shape[1], device=prompt.device)
        self.token = self._next(prompt, torch.arange(prompt.shape[1], device=prompt.device)[None])
        self.first = self.token.clone()

    def step(self) -> None:
        """Decode one token of every sequence."""
        # In place: a replayed graph reads and writes the same addresses.
        self.token.copy_(self._next(self.token, self.position))
        self.position.add_(1)

    @torch.no_grad()
    def _next(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits = self.model(  # [batch, 1, vocabulary]
            input_ids=ids,
            position_ids=positions.expand(ids.shape[0], -1),
            past_key_values=self.cache,
            use_cache=True,
            # Only the last position's: for a whole prompt they would be [batch, context,
            # vocabulary].
            logits_to_keep=1,
            **self.more,
        ).logits
        token: Tensor = logits[:, -1].argmax(-1, keepdim=True)  # [batch, 1]
        return token

    def tokens(self, count: int) -> Tensor:
        """Return the first `count` tokens, [batch, count], by eager steps."""
        tokens = [self.first]
        for _ in range(count - 1):
            self.step()
            # clone(): the next step overwrites the token in place.
            tokens.append(self.token.clone())
        return torch.cat(tokens, dim=1)  # [batch, count]


def measure_prefill(
    models: dict[str, nn.Module], *, batch: int, prompt: int, clock: Clock, blocks: int = BLOCKS
) -> ModelResult:
    """Measure the forward pass over a random prompt, with the logits of its last token."""
    device = next(models["dense"].parameters()).device
    ids = _random_ids(models["dense"], batch, prompt, device)

    def call(model: Any) -> Callable[[], object]:
        @torch.no_grad()
        def forward() -> object:
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        return forward

    calls = {name: call(model) for name, model in models.items()}
    peaks = {name: _peak(forward, device) for name, forward in calls.items()}
    timings = interleaved({name: [fn] for name, fn in calls.items()}, clock, blocks=blocks)
    return _result("prefill", batch, prompt, timings, clock, peaks, tokens=None)


def measure_decode(
    models: dict[str, nn.Module], *, batch: int, context: int, clock: Clock, blocks: int = BLOCKS
) -> ModelResult:
    """Measure decode steps after a context of random tokens.

    Every turn starts at the same position, so that a replayed graph never overruns the cache.
    """
    device = next(models["dense"].parameters()).device
    ids = _random_ids(models["dense"], batch, context, device)
    # Static cache: its size is fixed before the first step.
    room = _STEPS * (blocks + 4) * 4
    decoders = {name: Decoder(model, ids, room=room) for name, model in models.items()}

    def turn(decoder: Decoder) -> Callable[[], object]:
        start = decoder.position.clone()

        def steps() -> None:
            # Part of the captured turn, so that every replay starts at the same position.
            decoder.position.copy_(start)
            _rewind(decoder.cache, start)
            for _ in range(_STEPS):
                decoder.step()

        return steps

    turns = {name: turn(decoder) for name, decoder in decoders.items()}
    peaks = {name: _peak(steps, device) for name, steps in turns.items()}
    timings = interleaved({name: [fn] for name, fn in turns.items()}, clock, blocks=blocks)
    return _result("decode", batch, context, timings, clock, peaks, tokens=batch * _STEPS)


def same_tokens(models: dict[str, nn.Module], *, prompt: int = 32, count: int = 16) -> float:
    """Return the share of greedy tokens that both models agree on, from one random prompt."""
    device = next(models["dense"].parameters()).device
    ids = _random_ids(models["dense"], 1, prompt, device)
    first, second = (Decoder(model, ids, room=count).tokens(count) for model in models.values())
    # After the first difference the contexts differ too: a share, not a yes or no.
    return float((first == second).float().mean())


def _rewind(cache: Any, position: Tensor) -> None:
    """Reset the length that static layers count on the device (in transformers 5.2x)."""
    for layer in cache.layers:
        length = getattr(layer, "cumulative_length", None)
        if isinstance(length, Tensor):
            length.copy_(position.view(()))


def _peak(call: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    # The peak includes what is allocated already: both models, and their caches.
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


def _random_ids(model: Any, batch: int, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Ids 0 to 2 are special tokens in LLaMA's vocabulary. On the CPU: the same ids for any GPU.
    return torch.randint(3, vocabulary_size(model), (batch, length), generator=generator).to(device)


def _result(
    case: str, batch: int, context: int, timings: Any, clock: Clock,
    peaks: dict[str, int | None], *, tokens: int | None,
) -> ModelResult:  # fmt: skip
    if not clock.measures_speed:
        return ModelResult(case, batch, context, None, None, None, None, None)
    # A call of decode is a whole turn of steps.
    each = 1 if tokens is None else _STEPS
    packed = timings.median("packed")
    return ModelResult(
        case,
        batch,
        context,
        timings.median("dense") / each,
        packed / each,
        timings.ratio("dense", "packed"),
        None if tokens is None else tokens / packed,
        {name: peak for name, peak in peaks.items() if peak is not None},
    )
