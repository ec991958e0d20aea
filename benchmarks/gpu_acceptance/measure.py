"""Times and differences that several parts need."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunebench.bench.timing import Clock, DryClock, GraphClock


def clock_of(*, dry: bool) -> Clock:
    """Return a clock that measures replays of CUDA graphs; in a dry run one that measures none."""
    return DryClock() if dry else GraphClock()


def wait_for(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device, *, repeats: int = 1) -> float:
    """Return the median seconds of a call, after one that is not counted if there are several."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[repeats > 1 :])


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; inf where it is NaN."""
    first, second = (each.detach().to("cpu", torch.float64) for each in (actual, expected))
    ratio = float((first - second).norm() / second.norm().clamp(min=1e-300))
    return ratio if ratio == ratio else float("inf")


def llama(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    """Return a LLaMA of random weights made on a device, frozen, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **sizes)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def llama_sizes(*, dry: bool, layers: int, vocabulary: int = 32000) -> dict[str, int]:
    """Return the sizes of LLaMA-2-7B with some layers; in a dry run, of a tiny one."""
    if dry:
        return {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": min(layers, 2),
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256,
            "max_position_embeddings": 4096,
        }  # fmt: skip
    return {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
    }  # fmt: skip


def random_windows(samples: int, length: int, *, vocabulary: int, seed: int = 0) -> Tensor:
    """Return token windows, int64 (samples, length), on the CPU: the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (samples, length), generator=generator)
