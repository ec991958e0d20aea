"""Figures of pruning: time against plain forward passes, memory of gradients, losses, masks."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import (
    THREADS,
    Figure,
    at_least,
    at_most,
    default_model,
    default_tokens,
    figure,
    noted,
    plain_seconds,
    prune_seconds,
    run_cli,
)


def _passes(method: str, within_block: str, limit: float) -> list[Figure]:
    """Whole pruning as a share of two plain forward passes of the blocks."""
    tokens = default_tokens()
    figures = []
    for sparsity in ("0.5", "2:4"):
        runs = []
        for _ in range(2):
            model = default_model()
            plain_seconds(model, tokens[:2])
            before = plain_seconds(model, tokens)
            pruned = prune_seconds(
                method, model, tokens, sparsity=sparsity, within_block=within_block
            )
            runs.append(pruned / (before + plain_seconds(model, tokens)))
        title = f"{method}-{within_block}-{sparsity.replace(':', 'of')}"
        figures.append(at_most(title, limit, "of two plain passes", runs))
    return figures


for _method, _order, _limit in (
    ("wanda", "joint", 1.05),
    ("wanda", "sequential", 0.62),
    ("sparsegpt", "joint", 1.7),
    ("sparsegpt", "sequential", 1.2),
):
    figure(f"{_method}-{_order}")(functools.partial(_passes, _method, _order, _limit))


@figure("gblm")
def gblm() -> list[Figure]:
    """GBLM with and without cached gradients, against Wanda, both joint."""
    from prunebench.models.gradients import gradient_norms

    tokens = default_tokens()
    first, cached = [], []
    for _ in range(2):
        wanda = prune_seconds(
            "wanda", default_model(), tokens, sparsity="2:4", within_block="joint"
        )
        model = default_model()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PRUNEBENCH_CACHE"] = folder
            start_time = time.perf_counter()
            gradient_norms(model, tokens, norm="l1")
            fresh = time.perf_counter() - start_time
            start_time = time.perf_counter()
            gradients = gradient_norms(model, tokens, norm="l1")
            again = time.perf_counter() - start_time
            del os.environ["PRUNEBENCH_CACHE"]
            pruned = prune_seconds(
                "gblm", model, tokens, sparsity="2:4", within_block="joint", gradients=gradients
            )
        first.append((fresh + pruned) / wanda)
        cached.append((again + pruned) / wanda)
    return [
        at_most("gblm-first-use", 3.2, "times wanda", first),
        at_most("gblm-cached", 1.1, "times wanda", cached),
    ]


@figure("gblm-peak-rss")
def gblm_peak_rss() -> list[Figure]:
    """Peak resident memory of a whole run of GBLM that makes its gradients, over its allowance."""
    from prunebench.files import cache_dir

    with tempfile.TemporaryDirectory() as folder:
        shutil.rmtree(cache_dir() / "gradients", ignore_errors=True)
        run = ["run", "-m", "gblm", "--sparsity", "2:4", "--calibration", "c4@wheel", "--json"]
        _, out = run_cli([*run, "-q", "--ppl-tokens", "2048"], folder=Path(folder))
    result = json.loads(out)
    model, cost = result["model"], result["cost"]
    allowed = 4 * (model["parameters"] + model["prunable_parameters"]) / 1e9 + 0.5
    return [at_most("gblm-peak-rss", allowed, "GB", [cost["peak_rss_bytes"] / 1e9])]


@figure("alps-losses")
def alps_losses() -> list[Figure]:
    """Layers in which ALPS' exact loss is at or below SparseGPT's, on the same Hessian."""
    from prunebench.models.walker import BlockWalker
    from prunebench.pruners.alps import Alps
    from prunebench.pruners.sparsegpt import SparseGPT
    from prunebench.sparsity import Sparsity

    ratios = []
    for group in BlockWalker(default_model(), token_ids=default_tokens()).survey(hessian=True):
        targets = {linear.name: Sparsity.parse("2:4") for linear in group.linears}
        alps = [pruned.loss for pruned in Alps().prune_group(group, targets)]
        sparsegpt = [pruned.loss for pruned in SparseGPT().prune_group(group, targets)]
        ratios += [a / b for a, b in zip(alps, sparsegpt, strict=True) if a is not None and b]
        del group
    share = sum(ratio <= 1 for ratio in ratios) / len(ratios)
    return [
        at_least("alps-losses", 0.95, "of layers <= SparseGPT", [share]),
        noted("alps-loss", "of SparseGPT's loss, median layer", ratios),
    ]


# ---------------------------------------------------------------- masks


def _reference_mask(score: Any, *, keep_count: int, group: int) -> Any:
    """Top-k group after group, as the papers' scripts do it."""
    import torch

    prune = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], group):
        lowest = (
            score[:, start : start + group].topk(group - keep_count, dim=1, largest=False).indices
        )
        prune.scatter_(1, start + lowest, True)
    return ~prune


@figure("nm-mask")
def nm_mask() -> list[Figure]:
    """The N:M keep mask of a 4096 x 4096 matrix against the per-group loop."""
    import torch

    from prunebench.pruners.keep import keep_rows
    from prunebench.sparsity import Sparsity

    torch.set_num_threads(THREADS)
    order = torch.randperm(4096 * 4096, generator=torch.Generator().manual_seed(0))
    score = order.float().view(4096, 4096)  # all different: top-k takes any of two equal scores
    figures = []
    for keep_count, group in ((2, 4), (4, 8), (16, 32)):
        sparsity = Sparsity.of_pattern(keep_count, group)
        runs = []
        for attempt in range(6):
            start_time = time.perf_counter()
            loop = _reference_mask(score, keep_count=keep_count, group=group)
            middle = time.perf_counter()
            ours = keep_rows(score, sparsity)
            ended = time.perf_counter()
            if not torch.equal(loop, ours):
                raise AssertionError("the masks differ")
            if attempt:
                runs.append((middle - start_time) / (ended - middle))
        name = f"nm-mask-{keep_count}of{group}"
        unit = "times faster than the loop"
        figures.append(at_least(name, 10, unit, runs) if group == 4 else noted(name, unit, runs))
    return figures
