"""Layers, dense against packed: few tokens with the sweep of launches, then many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu_acceptance.measure import clock_of
from benchmarks.gpu_acceptance.record import Recorder
from prunebench.bench.layers import LayerBench, LayerResult, autotuned_dense
from prunebench.bench.shapes import SHAPES, LayerShape
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.backends.triton import Launch
from prunebench.sparse24.buckets import bucket_of
from prunebench.sparse24.policy import Policy, device_key, table_key

_DRY = (LayerShape("tiny", "square", 64, 256), LayerShape("tiny", "wide", 96, 512))
_FEW = (SHAPES[1], SHAPES[2], SHAPES[0])  # the promised ones first
_DECODE = (*_FEW, *SHAPES[3:6])  # LLaMA-2-7B, and one of OPT-175B
_LAUNCHES = tuple(
    Launch(parts, warps, stages) for parts, warps in ((2, 4), (4, 4), (8, 8)) for stages in (2, 3)
)
_TILES = (8, 32)  # rows of a tile, beside the default
_TUNING_SECONDS = 25.0  # of max-autotune, for one shape


def decode(record: Recorder) -> None:
    """One token on every shape, then 4, 8 and 64, then other tiles; against cuBLAS."""
    policy = Policy(record.device)
    shapes, few = (_DRY, _DRY[:1]) if record.dry else (_DECODE, _FEW)
    for shape in shapes:
        _cell(record, policy, shape, 1, launches=_LAUNCHES)
    for tokens in (4, 2, 8, 64):
        for shape in few:
            _cell(record, policy, shape, tokens)
    for rows in _TILES:
        for shape in few[:2]:
            _cell(record, policy, shape, 1, launches=_LAUNCHES, tile_rows=rows)


def prefill(record: Recorder) -> None:
    """2,048 tokens, then 512 and 8,192, with cuSPARSELt; max-autotune as a check, last."""
    policy = Policy(record.device, speed=True)
    shapes = _DRY if record.dry else _FEW + (SHAPES[4],)
    for tokens in (80,) if record.dry else (2048, 512):
        for shape in shapes:
            _cell(record, policy, shape, tokens)
    if not record.dry:
        for tokens, shape in ((1, SHAPES[1]), (2048, SHAPES[1]), (1, SHAPES[2])):
            _cell(record, policy, shape, tokens, tuned=True)
        _cell(record, policy, SHAPES[1], 8192)


def _cell(
    record: Recorder, policy: Policy, shape: LayerShape, tokens: int, *,
    launches: Sequence[Launch] = (), tile_rows: int | None = None, tuned: bool = False,
) -> None:  # fmt: skip
    """Measure one shape for one number of tokens, and write its rows."""
    name = f"{shape.rows} x {shape.width}, {tokens} tokens"
    with record.step(name, need=_TUNING_SECONDS if tuned else 2) as ready:
        if not ready:
            return
        takes = policy.verdicts((shape.rows, shape.width), torch.bfloat16, tokens)["triton"].ok
        options: dict[str, Any] = {"launches": launches if takes else ()}
        options |= {"tile_rows": tile_rows} if tile_rows else {}
        options |= {"compile_dense": autotuned_dense} if tuned else {}
        if record.dry:
            options["cold_bytes"] = 2 * shape.dense_bytes
        clock = clock_of(dry=record.dry)
        bench = LayerBench(shape, record.device, torch.bfloat16, policy, clock, **options)
        result = bench.measure(tokens)
        row = result.to_dict() | {"dense_kinds": ["cuBLAS", "max-autotune"][: 1 + tuned]}
        # As users get it: no launch that only the sweep has tried.
        used = [result.ratios[each] for each in backends() if each in result.ratios]
        row["as_used"] = max(used, default=None)
        row["launches"] = {f"triton#{i}": asdict(each) for i, each in enumerate(launches)}
        record.add("layer", tile_rows=tile_rows, **row)
        if not tile_rows and not record.dry:
            _speedups(record, policy, result)


def _speedups(record: Recorder, policy: Policy, result: LayerResult) -> None:
    """Write what the policy may choose by: each backend as users get it, against the best dense."""
    if not result.dense:
        return
    shape = (result.rows, result.width)
    right = {name: result.ratios[name] for name in backends() if name in result.ratios}
    if right:
        key = table_key(shape, torch.bfloat16, bucket_of(result.tokens))
        record.add("speedups", device=device_key(policy.device), key=key, ratios=right)
