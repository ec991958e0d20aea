"""A model several times larger than the memory it is allowed, pruned and scored from disk.

    python -m benchmarks.scripts.large_model               7B-shaped, within 6 GB
    python -m benchmarks.scripts.large_model --blocks 128 --hidden 1024 --ffn 2816 --allowance 1.1

A LLaMA of random weights is written in shards, one a block. Every method runs in a process of its
own, whose peak resident memory is the judge. Prints one line a method: time, split into waiting
for reads, writing and the rest; the peak; the bandwidth beside that of a plain copy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Make the model, run every method, return 1 if one takes more than it is allowed."""
    parser = argparse.ArgumentParser(prog="large_model", description=__doc__)
    for name, default in (
        ("blocks", 32), ("hidden", 4096), ("ffn", 11008), ("vocabulary", 32000), ("samples", 8),
        ("seqlen", 256),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--allowance-gb", type=float, default=6.0)
    parser.add_argument("--methods", default="wanda,sparsegpt,scheduler")
    parser.add_argument("--folder", type=Path, help="where the model is made (default: a new one)")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(prune_and_score(options.folder, options.child, options)))
        return 0
    missed = False
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = make_model(folder, options)
        copied = copy_rate(folder)
        print(f"model {size / 1e9:.2f} GB, allowed {options.allowance_gb:g} GB, "
              f"plain copy {copied / 1e9:.2f} GB/s")  # fmt: skip
        for method in options.methods.split(","):
            row = child(method, folder, options)
            missed |= row["peak"] > options.allowance_gb * 1e9
            print(
                f"{method:<10} prune {row['prune']:7.1f} s (waiting for reads {row['wait']:.1f}, "
                f"writing {row['write']:.1f}), score {row['score']:.1f} s, "
                f"peak {row['peak'] / 1e9:.2f} GB (anonymous {row['anonymous'] / 1e9:.2f}), "
                f"read {row['read_bytes'] / 1e9:.1f} GB at {row['read_rate'] / 1e9:.2f} GB/s, "
                f"wrote at {row['write_rate'] / 1e9:.2f} GB/s, "
                f"{'holds' if row['peak'] <= options.allowance_gb * 1e9 else 'MISSED'}",
                flush=True,
            )
    return int(missed)


def make_model(folder: Path, options: Any) -> int:
    """Write the shards; blocks are one random block, rolled. Returns their bytes."""
    import torch
    from transformers import LlamaConfig

    from prunebench.models.load import skeleton
    from prunebench.models.tensor_files import write_tensors

    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.ffn, vocab_size=options.vocabulary,
        num_hidden_layers=options.blocks, num_attention_heads=options.hidden // 128,
        num_key_value_heads=options.hidden // 128, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes = {
        name: tuple(parameter.shape) for name, parameter in skeleton(config).named_parameters()
    }
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).bfloat16()

    first = {k: draw(s) for k, s in shapes.items() if k.startswith("model.layers.0.")}
    rest = {k: draw(s) for k, s in shapes.items() if ".layers." not in k}
    where: dict[str, str] = {}
    for index in range(options.blocks + 1):
        tensors = rest
        if index < options.blocks:
            key = f"model.layers.{index}."
            tensors = {
                name.replace("model.layers.0.", key): tensor.roll(index, -1)
                for name, tensor in first.items()
            }
        file = f"model-{index:05d}.safetensors"
        write_tensors(folder / file, tensors)
        where |= dict.fromkeys(tensors, file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy_rate(folder: Path) -> float:
    """Return the bytes a second of copying one shard, the better of two."""
    source, target = folder / "model-00000.safetensors", folder / "copy"
    seconds = []
    for _ in range(2):
        start_time = time.perf_counter()
        shutil.copyfile(source, target)
        seconds.append(time.perf_counter() - start_time)
    target.unlink()
    return source.stat().st_size / min(seconds)


def child(method: str, folder: Path, options: Any) -> dict[str, float]:
    """Run one method in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.scripts.large_model", "--child", method]
    for name in ("samples", "seqlen", "vocabulary"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(
        [*words, "--folder", str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


class PeakAnonymous(threading.Thread):
    """Watches how much memory of this process no file backs, twenty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stop = threading.Event()

    def run(self) -> None:
        """Watch until `stop` is set."""
        while not self.stop.wait(0.05):
            rows = Path("/proc/self/status").read_text("utf-8").splitlines()
            anonymous_kb = next(int(row.split()[1]) for row in rows if row.startswith("RssAnon"))
            self.peak = max(self.peak, anonymous_kb * 1024)


def prune_and_score(folder: Path, method: str, options: Any) -> dict[str, float]:
    """Prune and score from disk; return times, bytes and peaks."""
    import torch

    from prunebench.allocators import ALLOCATORS
    from prunebench.evaluate.perplexity import token_ppl
    from prunebench.models.disk import DiskWeights, load_on_disk
    from prunebench.models.journal import RunJournal
    from prunebench.models.load import load_config
    from prunebench.models.walker import BlockWalker
    from prunebench.models.weights import weights_of
    from prunebench.pruners import METHODS
    from prunebench.run.result import peak_rss_bytes
    from prunebench.sparsity import Sparsity

    watch = PeakAnonymous()
    watch.start()
    generator = torch.Generator().manual_seed(1)
    shape = (options.samples, options.seqlen)
    tokens = torch.randint(options.vocabulary, shape, generator=generator)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        journal = RunJournal(Path(name))
        model = load_on_disk(
            folder,
            load_config(folder),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            journal=journal,
        )
        store = weights_of(model)
        assert isinstance(store, DiskWeights)
        start_time = time.perf_counter()
        walker = BlockWalker(model, token_ids=tokens)
        row = METHODS.find(method)
        target = Sparsity.parse("0.7" if row.sparsity == "0.7" else "2:4")
        requested = {linear.name: target for linear in walker.linears}
        if row.allocation != "uniform":
            allocator = ALLOCATORS.make(row.allocation, {"range": "auto"})
            ratios = allocator.allocate(walker, target.ratio).ratios
            requested = {name: target.with_ratio(ratio) for name, ratio in ratios.items()}
        METHODS.make(method, {}).prune(walker, requested)
        pruned = time.perf_counter()
        times = {"wait": store.wait_seconds, "write": journal.write_seconds}
        if not math.isfinite(token_ppl(model, tokens[:2])):
            raise AssertionError("the perplexity is not finite")
        scored = time.perf_counter()
        store.close()
    watch.stop.set()
    return times | {
        "prune": pruned - start_time,
        "score": scored - pruned,
        "peak": peak_rss_bytes(),
        "anonymous": watch.peak,
        "read_bytes": store.read_bytes,
        "read_rate": store.read_bytes / store.read_seconds,
        "write_rate": journal.written_bytes / max(journal.write_seconds, 1e-9),
        "pid": os.getpid(),
    }


if __name__ == "__main__":
    sys.exit(main())
