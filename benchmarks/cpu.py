"""Figures of packed 2:4 on a CPU: a layer and a whole model, beside what memory allows."""

from __future__ import annotations

from typing import Any

from benchmarks.figures import MODEL, THREADS, Figure, at_least, at_most, figure, noted

ROWS, WIDTH = 4096, 11008
_BLOCKS = 9
_PACKED_BITS = 9.0  # of a weight, with a 16-bit value for every second one and a bit of mask


@figure("cpu-layer")
def cpu_layer() -> list[Figure]:
    """4096 x 11008 at one token, not in cache, against torch's dense products and our own."""
    import torch

    from prunebench.bench.cpu_dense import OURS, memory_bytes_per_second
    from prunebench.bench.layers import LayerBench
    from prunebench.bench.shapes import LayerShape
    from prunebench.bench.timing import CpuClock
    from prunebench.sparse24.policy import Policy

    torch.set_num_threads(THREADS)
    device = torch.device("cpu")
    bench = LayerBench(
        LayerShape("LLaMA-2-7B", "down", ROWS, WIDTH), device, torch.bfloat16, Policy(device),
        CpuClock(), compile_dense=compiled_dense,
    )  # fmt: skip
    figures = []
    for tokens in (1, 4, 8):
        row = bench.measure(tokens, blocks=_BLOCKS)
        if row.ratio is None or row.cache_suspected:
            raise AssertionError(f"the cpu backend was not measured: {row.refused}, {row.copies}")
        packed, ours = row.seconds["cpu"], row.seconds[OURS] / row.seconds["cpu"]
        name = f"cpu-{tokens}-token" + ("s" if tokens > 1 else "")
        spread = [row.ratio.median, row.ratio.low, row.ratio.high]
        if tokens == 1:
            figures += [
                at_least(f"{name}-torch", 1.5, f"times torch's best ({row.dense})", spread),
                at_least(f"{name}-ours", 1.3, "times our dense bfloat16", [ours]),
            ]
        else:
            figures += [
                noted(f"{name}-torch", f"times torch's best ({row.dense})", spread),
                noted(f"{name}-ours", "times our dense bfloat16", [ours]),
            ]
        for rival, seconds in row.seconds.items():
            figures.append(noted(f"  {rival}", "ms", [seconds * 1e3]))
        rate = row.stored_bytes / packed / 1e9
        figures.append(noted("  read by cpu", "GB/s of the packed weight", [rate]))
    stream = memory_bytes_per_second()
    return [*figures, *_limits(None if stream is None else stream / 1e9)]


def _limits(stream: float | None) -> list[Figure]:
    """What bytes allow: a product by one token reads every weight once."""
    limits = [
        noted("limit-16-bit", "times dense 16-bit weights, by bytes", [16 / _PACKED_BITS]),
        noted("limit-float32", "times dense float32 weights, by bytes", [32 / _PACKED_BITS]),
        noted("limit-float32-packed", "times float32, if packed in float32", [32 / 17]),
    ]
    if stream is not None:
        weights = ROWS * WIDTH / 8e6  # millions of bits to MB
        limits += [
            noted("memory", "GB/s read by all threads", [stream]),
            noted("roofline-packed", "ms at that rate", [_PACKED_BITS * weights / stream]),
            noted("roofline-16-bit", "ms at that rate", [16 * weights / stream]),
            noted("roofline-float32", "ms at that rate", [32 * weights / stream]),
        ]
    return limits


def compiled_dense() -> Any:
    """Return torch's dense product, compiled for the CPU by `torch.compile`."""
    import torch
    from torch.nn import functional

    torch.compiler.reset()
    return torch.compile(functional.linear, dynamic=False)


@figure("cpu-decode")
def cpu_decode() -> list[Figure]:
    """Greedy decoding by the default model at 2:4, packed against dense, and its bytes."""
    import torch

    from benchmarks.figures import default_model
    from prunebench.bench.bench import weight_bytes, with_our_kernel
    from prunebench.bench.cpu_dense import FLOAT32, OURS
    from prunebench.bench.model import measure_decode
    from prunebench.bench.timing import CpuClock
    from prunebench.models.linears import find_linears
    from prunebench.sparse24.layer import convert
    from prunebench.sparse24.policy import Policy

    def pruned(dtype: str) -> Any:
        model = default_model(dtype)
        for linear in find_linears(model):
            magnitude_24(linear.stored)
        return model

    torch.set_num_threads(THREADS)
    dense, packed = pruned("bfloat16"), pruned("bfloat16")
    dense_bytes = sum(parameter.nbytes for parameter in dense.parameters())
    linears = find_linears(packed)
    linear_bytes = sum(linear.stored.nbytes for linear in linears)
    conversion = convert(packed, linears, policy=Policy(torch.device("cpu")), strict=True)
    models = {
        "dense": dense, "packed": packed, OURS: with_our_kernel(dense), FLOAT32: pruned("float32"),
    }  # fmt: skip
    row = measure_decode(models, batch=1, context=128, clock=CpuClock(), blocks=_BLOCKS)
    if row.ratio is None or row.packed_seconds is None or row.tokens_per_second is None:
        raise AssertionError("decoding was not measured")
    ours = row.seconds[OURS] / row.packed_seconds
    resident = weight_bytes(packed, conversion)
    # The head and the embedding stay dense: what is read for a token, and what bytes allow.
    limit = dense_bytes / resident
    spread = [row.ratio.median, row.ratio.low, row.ratio.high]
    return [
        at_least("cpu-decode", 1.3, f"times torch's best ({row.dense})", spread),
        noted("cpu-decode-ours", "times our dense bfloat16", [ours]),
        noted("cpu-decode-tokens", f"tokens/s of {MODEL}", [row.tokens_per_second]),
        *(noted(f"  {name}", "ms a token", [time * 1e3]) for name, time in row.seconds.items()),
        noted("cpu-decode-limit", "times dense 16-bit, by bytes", [limit]),
        at_most("cpu-resident-linears", 0.6, "of the dense bytes of the linears",
                [conversion.stored_bytes / linear_bytes]),
        noted("cpu-resident-model", "of all dense bytes, in 16 bits", [resident / dense_bytes]),
    ]  # fmt: skip


def magnitude_24(weight: Any) -> None:
    """Zero the two smaller of every four weights, in place."""
    four = weight.view(weight.shape[0], -1, 4)  # [out, groups, 4]
    smallest = four.abs().topk(2, dim=-1, largest=False).indices
    four.scatter_(-1, smallest, 0)
