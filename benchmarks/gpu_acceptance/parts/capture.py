"""Which backend can be captured in a CUDA graph, each by itself, and what the replay computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_acceptance.measure import difference
from benchmarks.gpu_acceptance.record import Recorder, one_line
from prunebench.bench.layers import random_packed
from prunebench.bench.timing import DryClock, GraphClock
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.layouts import FileLayout, WeightLayout
from prunebench.sparse24.policy import Policy

TOKENS = (1, 4, 64, 2048)


def run(record: Recorder) -> None:
    """Try each backend for few and many tokens; a failure is that row's."""
    size = (64, 256) if record.dry else (4096, 4096)
    packed = random_packed(size, dtype=torch.bfloat16, device=record.device, seed=0)
    policy = Policy(record.device, speed=True)
    for tokens in TOKENS:
        for name, verdict in policy.verdicts(size, torch.bfloat16, tokens).items():
            if not verdict.ok:
                record.add("capture", backend=name, tokens=tokens, works=None, why=verdict.reason)
                continue
            with record.step(f"{name}, {tokens} tokens", need=2) as ready:
                if ready:
                    backend = backends()[name]
                    layout: WeightLayout = backend.layout(packed) or FileLayout(packed)
                    product = backend.build(layout)
                    x = torch.randn(tokens, size[1], device=record.device, dtype=torch.bfloat16)
                    why = _replayed(partial(product.run, x, None), record.device)
                    record.add("capture", backend=name, tokens=tokens, works=not why, why=why)


def _replayed(call: Callable[[], torch.Tensor], device: torch.device) -> str:
    """Return why a call cannot be captured and replayed; "" if it can."""
    clock = GraphClock() if device.type == "cuda" else DryClock()
    expected = call()  # an algorithm is searched here, not in the capture
    outputs: list[torch.Tensor] = []
    try:
        turn = clock.prepare([lambda: outputs.append(call())])
        turn()
    except Exception as error:  # a library can fail in any way
        return one_line(error)
    differs = difference(outputs[-1], expected)
    return "" if differs < 1e-2 else f"the replay differs by {differs:.1e}"
