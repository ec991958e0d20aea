"""Dense products on a CPU, the rivals of packed ones: what torch offers, and our own.

torch multiplies by bfloat16 slower than by float32 on many CPUs, although it reads half the bytes.
A fair baseline is therefore the faster of the two, and our own dense kernel, in 16 bits, beside it
shows which part of a speedup is due to sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunebench.bench.timing import Call
from prunebench.sparse24.backends.cpu import MOST_TOKENS, matrix_arguments, multiply
from prunebench.sparse24.backends.cpu_build import Kernels, kernels

FLOAT32 = "dense, float32"
OURS = "dense, our kernel"
CACHES = 2
"""Distinct weights in a turn, in last-level caches."""

_DEFAULT_CACHE = 32 << 20  # where the size is unknown
_READ_BYTES = 256 << 20  # by `memory_bytes_per_second`


def torch_rivals(x: Tensor, weights: Sequence[Tensor]) -> dict[str, list[Call]]:
    """Return the calls of torch's dense products in other dtypes than the weight's.

    Args:
        x: [tokens, in].
        weights: Dense copies, [out, in].
    """
    wide = x.float()
    # The copies in float32 are twice as large: half of them fill the same number of caches.
    some = weights[: max(1, len(weights) // 2)]
    return {FLOAT32: [_linear(wide, weight.float()) for weight in some]}


def our_rivals(x: Tensor, weights: Sequence[Tensor]) -> dict[str, list[Call]]:
    """Return the calls of our dense kernel; none without a compiler, or for many tokens."""
    loaded = kernels()
    if isinstance(loaded, str) or x.shape[0] > MOST_TOKENS:
        return {}
    return {OURS: [_ours(loaded, x, weight) for weight in weights]}


class Dense16Linear(nn.Module):
    """A dense linear layer by our kernel: a model of these shows what the kernel alone buys.

    Args:
        linear: A linear layer in bfloat16 or float16, whose weight it shares.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        loaded = kernels()
        if isinstance(loaded, str):
            raise RuntimeError(loaded)
        self.kernels: Kernels = loaded
        self.linear = linear
        weight = linear.weight
        self.arguments = matrix_arguments(weight, (linear.out_features, linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias, [..., out]; x is [..., in]."""
        flat = x.reshape(-1, self.linear.in_features)  # [tokens, in]
        if not 1 <= flat.shape[0] <= MOST_TOKENS:
            return functional.linear(x, self.linear.weight, self.linear.bias)
        out = multiply(self.kernels, "dense16_multiply", self.arguments, flat, self.linear.bias)
        return out.view(*x.shape[:-1], self.linear.out_features)


def last_level_cache_bytes() -> int:
    """Return the size of the last-level cache; 32 MiB where the system does not say."""
    from pathlib import Path

    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text("utf-8").strip()
        number, unit = text.rstrip("KM"), text[-1:]
        if number.isdigit():
            sizes.append(int(number) << {"K": 10, "M": 20}.get(unit, 0))
    return max(sizes) or _DEFAULT_CACHE


def memory_bytes_per_second() -> float | None:
    """Return how fast all threads of torch read memory, the best of five; None without kernels."""
    import time

    loaded = kernels()
    if isinstance(loaded, str):
        return None
    threads = torch.get_num_threads() if loaded.has_threads else 1
    words = torch.zeros(_READ_BYTES // 8, dtype=torch.int64)
    words.fill_(1)  # written: untouched pages of zeros would share one page of memory
    rates = []
    for _ in range(5):
        start_time = time.perf_counter()
        loaded.library.read_words(words.data_ptr(), words.numel(), threads)
        rates.append(words.nbytes / (time.perf_counter() - start_time))
    return max(rates)


# Functions and not lambdas in a loop: those would all see the loop's last weight.
def _linear(x: Tensor, weight: Tensor) -> Call:
    return lambda: functional.linear(x, weight)


def _ours(loaded: Kernels, x: Tensor, weight: Tensor) -> Call:
    arguments = matrix_arguments(weight, (weight.shape[0], weight.shape[1]))

    def call() -> Tensor:
        # `weight` is used here: its memory must live as long as the call.
        return multiply(loaded, "dense16_multiply", arguments, x.to(weight.dtype), None)

    return call
