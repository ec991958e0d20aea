"""Weights that stay on disk with pinned prefetch, and batches that are halved out of memory."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_acceptance.measure import llama, llama_sizes, random_windows, seconds_of
from benchmarks.gpu_acceptance.record import Recorder
from prunebench.evaluate.perplexity import window_losses
from prunebench.models.disk import load_on_disk
from prunebench.models.journal import RunJournal
from prunebench.models.linears import find_linears
from prunebench.models.load import load_config
from prunebench.models.out_of_memory import on_batch_halved
from prunebench.models.walker import BlockWalker
from prunebench.models.weights import weights_of
from prunebench.pruners import METHODS
from prunebench.sparsity import Sparsity

_MARGIN = 0.6  # of what a batch takes beside the model: a whole one no longer fits


def run(record: Recorder) -> None:
    """Score from disk against the resident model; then prune with too little memory."""
    sizes = llama_sizes(dry=record.dry, layers=3, vocabulary=2048)  # 1.2 GB in bfloat16
    model = llama(sizes, record.device, torch.bfloat16)
    windows = random_windows(8, 32 if record.dry else 2048, vocabulary=sizes["vocab_size"])
    with record.step("disk", need=5):
        _disk(record, model, windows)
    with record.step("halving", need=3) as ready:
        # Tiny batches do not fill a GPU, and a CPU has no limit to set.
        if ready and not record.dry:
            _halving(record, model, windows)


def _disk(record: Recorder, model: Any, windows: Tensor) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        journal = RunJournal(folder / "journal")
        journal.lock()
        stored = load_on_disk(
            folder / "model", load_config(folder / "model"), dtype=torch.bfloat16,
            device=record.device, journal=journal,
        )  # fmt: skip
        losses: dict[str, list[float]] = {}

        def score(side: str, each: Any) -> None:
            losses[side] = window_losses(each, windows)

        resident = seconds_of(lambda: score("resident", model), record.device, repeats=2)
        from_disk = seconds_of(lambda: score("disk", stored), record.device, repeats=2)
        weights: Any = weights_of(stored)
        record.add(
            "disk", same=losses["disk"] == losses["resident"], read_bytes=weights.read_bytes,
            **_unless_dry(
                record, resident_seconds=resident, disk_seconds=from_disk,
                ratio=from_disk / resident, read_seconds=weights.read_seconds,
                wait_seconds=weights.wait_seconds,
            ),
        )  # fmt: skip


def _unless_dry(record: Recorder, **values: float) -> dict[str, float | None]:
    return {name: None if record.dry else value for name, value in values.items()}


def _halving(record: Recorder, model: Any, windows: Tensor) -> None:
    """Prune with enough memory, then with a limit under which a whole batch does not fit."""
    twin = copy.deepcopy(model)
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _prune(twin, windows)
    needed = torch.cuda.max_memory_allocated() - base
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(record.device).total_memory
    limit = torch.cuda.memory_reserved() + _MARGIN * needed
    halved: list[int] = []
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        with on_batch_halved(lambda what, size: halved.append(size)):
            _prune(model, windows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    pairs = zip(find_linears(model), find_linears(twin), strict=True)
    shares = [float(((a.stored == 0) == (b.stored == 0)).double().mean()) for a, b in pairs]
    record.add("halving", batches=halved, same_masks=min(shares), needed_bytes=needed)


def _prune(model: Any, windows: Tensor) -> None:
    walker = BlockWalker(
        model, token_ids=windows, within_block="joint", batch_tokens=windows.numel()
    )
    target = Sparsity.parse("2:4")
    METHODS.make("wanda", {}).prune(walker, {linear.name: target for linear in walker.linears})
