"""A whole decoder of LLaMA-2-7B's shape with random weights: dense and packed in turns.

The packed side chooses its backends by what the parts before have measured on this machine; where
they have measured nothing, the decode kernel is forced, so that its speed is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.fixtures.shaped import (
    LLAMA2_7B,
    TINY,
    Decoder,
    Weights,
    dense_bytes,
    stored_bytes,
)
from benchmarks.gpu_acceptance.measure import clock_of
from benchmarks.gpu_acceptance.record import Recorder, smaller_speedups
from prunebench.bench.timing import interleaved
from prunebench.sparse24.policy import Policy

_STEPS = 8
_DECODE = ((1, 128), (1, 2048), (8, 128), (64, 128))  # batch, context
_PREFILL = ((1, 2048), (8, 512))


def run(record: Recorder) -> None:
    """Same tokens, bytes, decode and prefill; then prefill with the second copy."""
    weights = Weights(TINY if record.dry else LLAMA2_7B, device=record.device, dtype=torch.bfloat16)
    table = measured_table(record)
    record.add("policy", measured=sorted(table), forced=None if table else "triton")
    sides: dict[str, Any] = {}
    with record.step("weights"):
        sides["dense"] = weights.dense_blocks()
        policy = Policy(record.device, forced=None if table else "triton", table=table)
        sides["packed"] = weights.packed_blocks(policy)
        record.add("model", **_bytes(weights, sides["packed"]), **_same(weights, sides))
    if len(sides) < 2:
        return
    for batch, context in ((1, 16), (2, 16)) if record.dry else _DECODE:
        with record.step(f"decode, batch {batch}, context {context}", need=3) as ready:
            if ready:
                _decode(record, weights, sides, batch=batch, context=context)
    for batch, prompt in ((1, 16),) if record.dry else _PREFILL:
        with record.step(f"prefill, batch {batch}, {prompt} tokens", need=3) as ready:
            if ready:
                _prefill(record, weights, sides, batch=batch, prompt=prompt, storage="balanced")
    del sides["packed"]
    with record.step("prefill with a second copy", need=8) as ready:
        if ready:
            fast = Policy(record.device, forced=None if table else "cslt", speed=True, table=table)
            sides["packed"] = weights.packed_blocks(fast)
            prompt = 16 if record.dry else 2048
            _prefill(record, weights, sides, batch=1, prompt=prompt, storage="speed")
            record.add("model with a second copy", **_bytes(weights, sides["packed"]))


def measured_table(record: Recorder) -> dict[str, dict[str, float]]:
    """Return the speedups that the parts before have measured, as `Policy` reads them."""
    rows = [row for part in ("decode", "prefill") for row in record.earlier(part, "speedups")]
    return {key: ratios for (_, key), ratios in smaller_speedups(rows).items()}


def _bytes(weights: Weights, blocks: list[Any]) -> dict[str, Any]:
    stored, dense = stored_bytes(weights, blocks), dense_bytes(weights)
    return {
        "shape": asdict(weights.shape), "stored_bytes": stored, "dense_bytes": dense,
        "resident": stored / dense,
    }  # fmt: skip


def _ids(weights: Weights, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(weights.shape.vocabulary, (batch, length), generator=generator)
    return ids.to(weights.device)


def _same(weights: Weights, sides: dict[str, Any]) -> dict[str, float]:
    """Compare logits and greedy tokens of both sides."""
    logits, tokens = {}, {}
    for name, blocks in sides.items():
        decoder = Decoder(weights, blocks, batch=1, room=64)
        logits[name] = decoder.prefill(_ids(weights, 1, 32)).float()
        made = []
        for _ in range(16):
            made.append(int(decoder.token[0, 0]))
            decoder.step()
        tokens[name] = made
    error = (logits["packed"] - logits["dense"]).norm() / logits["dense"].norm()
    same = sum(a == b for a, b in zip(tokens["dense"], tokens["packed"], strict=True)) / 16
    return {"logits_error": float(error), "same_greedy_tokens": same}


def _decode(
    record: Recorder, weights: Weights, sides: dict[str, Any], *, batch: int, context: int
) -> None:
    calls = {}
    for name, blocks in sides.items():
        decoder = Decoder(weights, blocks, batch=batch, room=context + _STEPS)
        decoder.prefill(_ids(weights, batch, context))
        calls[name] = [_steps(decoder, context)]
    _case(record, calls, tokens=batch * _STEPS, case="decode", batch=batch, context=context)


def _steps(decoder: Decoder, start: int) -> Callable[[], None]:
    def steps() -> None:  # from the same place every time
        decoder.position.fill_(start)
        for _ in range(_STEPS):
            decoder.step()

    return steps


def _prefill(
    record: Recorder, weights: Weights, sides: dict[str, Any], *,
    batch: int, prompt: int, storage: str,
) -> None:  # fmt: skip
    ids = _ids(weights, batch, prompt)
    calls = {}
    for name, blocks in sides.items():
        decoder = Decoder(weights, blocks, batch=batch, room=prompt)
        calls[name] = [lambda decoder=decoder: decoder.prefill(ids)]
    _case(record, calls, tokens=None, case="prefill", batch=batch, context=prompt, storage=storage)


def _case(record: Recorder, calls: dict[str, Any], *, tokens: int | None, **case: Any) -> None:
    clock = clock_of(dry=record.dry)
    if record.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timings = interleaved(calls, clock, blocks=5 if clock.measures_speed else 1)
    if not clock.measures_speed:
        record.add("case", **case, ratio=None)
        return
    packed = timings.median("packed")
    record.add(
        "case", **case, ratio=asdict(timings.ratio("dense", "packed")),
        dense_seconds=timings.median("dense"), packed_seconds=packed,
        tokens_per_second=tokens / packed if tokens else None,
        peak_bytes=torch.cuda.max_memory_allocated(),
    )  # fmt: skip
