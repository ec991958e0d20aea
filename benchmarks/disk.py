"""The figures of `--weights disk`: time against the resident run, memory against the plan, cost."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import (
    MODEL,
    Figure,
    at_most,
    default_model,
    default_tokens,
    figure,
    noted,
    prune_seconds,
)


def _on_disk(folder: Path, journal_folder: Path) -> Any:
    import torch

    from prunebench.models.disk import load_on_disk
    from prunebench.models.journal import RunJournal
    from prunebench.models.load import load_config

    journal = RunJournal(journal_folder)
    journal.lock()
    return load_on_disk(
        folder,
        load_config(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        journal=journal,
    )


def _local() -> Path:
    from prunebench.models.source import fetch_model, find_model
    from prunebench.progress import Silent

    return fetch_model(find_model(MODEL), Silent()).path


@figure("disk-time")
def disk_time() -> list[Figure]:
    """Pruning from disk with a warm page cache against pruning in memory, one after the other."""
    tokens, runs = default_tokens(), []
    for _ in range(2):
        resident = prune_seconds(
            "wanda", default_model(), tokens, sparsity="2:4", within_block="joint"
        )
        with tempfile.TemporaryDirectory() as journal_folder:
            model = _on_disk(_local(), Path(journal_folder))
            runs.append(
                prune_seconds("wanda", model, tokens, sparsity="2:4", within_block="joint")
                / resident
            )
    return [at_most("disk-prune", 1.3, "times the resident prune", runs)]


@figure("disk-memory")
def disk_memory() -> list[Figure]:
    """Peak anonymous memory of pruning from disk, in a fresh process, over what the plan says."""
    done = subprocess.run(
        [sys.executable, "-c", "import benchmarks.disk as d; d.memory_in_this_process()"],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    row = json.loads(done.stdout.splitlines()[-1])
    share = row["measured"] / row["planned"]
    return [
        at_most("disk-memory", 1.1, "of the planned peak", [share]),
        noted("disk-memory-measured", "GB anonymous", [row["measured"] / 1e9]),
    ]


def memory_in_this_process() -> None:
    """Prune the default model from disk; print what was planned and what was measured."""
    import torch

    from benchmarks.scripts.large_model import PeakAnonymous
    from prunebench.models.footprint import count_footprint
    from prunebench.models.linears import find_linears
    from prunebench.models.load import load_config, skeleton
    from prunebench.models.walker import BATCH_TOKENS
    from prunebench.pruners import METHODS
    from prunebench.run.forecast import anonymous_bytes, groups_of
    from prunebench.run.memory import Workload, model_sizes, plan_memory
    from prunebench.run.probe import probe_method
    from prunebench.sparsity import Sparsity

    tokens, config = default_tokens(), load_config(_local())
    model = skeleton(config)
    samples, seqlen = tokens.shape
    batch = BATCH_TOKENS["cpu"] // seqlen
    work = Workload(samples, seqlen, batch, windows=0, window=seqlen, scored=1, sequential=False,
                hessian=True)  # fmt: skip
    footprint = count_footprint(
        config, torch.float32, calibration=(batch, seqlen), scoring=(1, seqlen), hessian=True
    )
    cost = probe_method(METHODS.make("sparsegpt", {}), Sparsity.parse("2:4"), torch.device("cpu"))
    need = plan_memory(
        model_sizes(model, torch.float32), config.hidden_size, footprint, work,
        method_peak=max(cost.peak(*group) for group in groups_of(find_linears(model))),
        dtype=torch.float32, weights="disk", placement="device", on_gpu=False,
        process=anonymous_bytes(),
    )  # fmt: skip
    watch = PeakAnonymous()
    watch.start()
    with tempfile.TemporaryDirectory() as journal_folder:
        prune_seconds(
            "sparsegpt", _on_disk(_local(), Path(journal_folder)), tokens, sparsity="2:4",
            within_block="joint",
        )  # fmt: skip
    watch.stop.set()
    print(json.dumps({"planned": need.device_total, "measured": watch.peak}))


@figure("large-model")
def large_model() -> list[Figure]:
    """A LLaMA of random weights three times larger than its allowance, pruned and scored."""
    words = "--blocks 128 --hidden 1024 --ffn 2816 --vocabulary 8192 --allowance-gb 1.1"
    words += " --samples 2 --seqlen 64"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scripts.large_model", *words.split()], check=False
    )
    return [at_most("large-model-missed", 0, "methods above their allowance", [done.returncode])]


@figure("cost-exponents")
def cost_exponents() -> list[Figure]:
    """How pruning grows with the width of a matrix, with blocks and with tokens, beside theory.

    Scores of a matrix take its weights, and SparseGPT's elimination their product with the width.
    What a block needs is the same for every block; a forward pass and a Hessian take the tokens,
    the elimination does not.
    """
    figures = []
    for method, by_width, by_tokens in (("wanda", "2", "1"), ("sparsegpt", "3", "below 1")):
        points = [(width, _solve_seconds(method, width)) for width in (1024, 2048, 4096)]
        figures.append(_exponent(f"{method}-width", by_width, points))
        points = [(blocks, _walk_seconds(method, blocks=blocks)) for blocks in (4, 8, 16)]
        figures.append(_exponent(f"{method}-blocks", "1", points))
        points = [(256 * n, _walk_seconds(method, samples=n)) for n in (8, 16, 32)]
        figures.append(_exponent(f"{method}-tokens", by_tokens, points))
    return figures


def _exponent(name: str, theory: str, points: list[tuple[int, float]]) -> Figure:
    """Fit seconds = c * size^exponent by least squares of the logarithms."""
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    exponent = statistics.linear_regression(x, y).slope
    return noted(name, f"exponent (theory: {theory})", [exponent])


def _walk_seconds(method: str, *, blocks: int = 4, samples: int = 16) -> float:
    """Prune a LLaMA of random weights, 512 wide, on windows of 256 tokens; the better of two."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=blocks, num_attention_heads=8,
        vocab_size=1024,
    )  # fmt: skip
    tokens = torch.randint(1024, (samples, 256), generator=torch.Generator().manual_seed(0))
    return min(
        prune_seconds(
            method, LlamaForCausalLM(config).eval(), tokens, sparsity="2:4", within_block="joint"
        )
        for _ in range(2)
    )


def _solve_seconds(method: str, width: int) -> float:
    import torch

    from prunebench.calibration.stats import StatsAccumulator
    from prunebench.models.linears import Linear
    from prunebench.models.walker import LinearGroup
    from prunebench.pruners import METHODS
    from prunebench.sparsity import Sparsity

    pruner = METHODS.make(method, {})
    module = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
    linear = Linear("one", "one.weight", 0, module, "weight", width, width)
    sums = StatsAccumulator(hessian=pruner.needs.hessian)
    sums.add(torch.randn(width, width).add_(0.1))
    stats = sums.result(samples=4, width=width, device=torch.device("cpu"))
    times = []
    for _ in range(2):
        start_time = time.perf_counter()
        group = LinearGroup((linear,), stats)
        list(pruner.prune_group(group, {"one": Sparsity.parse("0.5")}))
        times.append(time.perf_counter() - start_time)
    return min(times)
