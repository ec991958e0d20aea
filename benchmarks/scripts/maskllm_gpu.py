"""`make bench-maskllm-gpu`: a training step of MaskLLM at the size of LLaMA-2-7B, random weights.

    python -m benchmarks.scripts.maskllm_gpu                       table on stdout, maskllm-gpu.json
    python -m benchmarks.scripts.maskllm_gpu --shape tiny --device cpu   only to see that it runs

Says the time of a step beside a dense one of the same tokens (forward and backward with weight
gradients, no optimizer), memory by item, and the bandwidth of the passes over the logits. The
promise is for a step of 32 windows or more (the recipes take 32 and 256): masks are made and logits
updated once a step, about as long as a dense pass over 4,096 tokens, so a step of one window, which
is measured too, takes about twice a dense one. Without a CUDA device it says that nothing was
measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.__main__ import line
from benchmarks.figures import Figure, at_most, noted
from benchmarks.packages import PRUNING, require_packages

LATEST = Path(__file__).parents[1] / "maskllm-gpu.json"
TOKENS, ROUNDS = 4096, 3
WINDOWS = 32  # in a step, from which the promise holds
SHAPES: dict[str, dict[str, int]] = {
    "llama2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": TOKENS,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256,
        "max_position_embeddings": TOKENS,
    },
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({"logit_dtype": "float32", "state_dtype": "bfloat16"}, 110.0),
    "lean": ({"logit_dtype": "bfloat16", "state_dtype": "int8"}, 75.0),
}
"""Options of each variant, and how many GB a step may take at the size of LLaMA-2-7B."""


def main() -> int:
    """Measure; returns 1 if a promise is missed."""
    require_packages(PRUNING, program="benchmarks.scripts.maskllm_gpu")
    import torch

    parser = argparse.ArgumentParser(prog="benchmarks.scripts.maskllm_gpu", description=__doc__)
    parser.add_argument("--shape", default="llama2-7b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows in a step")
    parser.add_argument("--out", type=Path, default=LATEST)
    options = parser.parse_args()
    document: dict[str, Any] = {"name": "maskllm-gpu", "shape": options.shape}
    if options.device == "cuda" and not torch.cuda.is_available():
        document["not_measured"] = "no CUDA device"
        print("maskllm-gpu: not measured (no CUDA device)")
        _save(document, options.out)
        return 0
    shape = SHAPES[options.shape] | (
        {"num_hidden_layers": options.layers} if options.layers else {}
    )
    size = (options.windows, options.tokens)
    bench = Bench(shape, torch.device(options.device), size=size)
    whole = options.shape == "llama2-7b" and not options.layers and options.windows >= WINDOWS
    figures = bench.run(limits=whole)
    document |= {"shape": shape, "windows": options.windows, "tokens": options.tokens}
    document["machine"] = bench.machine()
    document |= {"figures": [asdict(figure) for figure in figures], "memory_gb": bench.memory}
    document["not_measured"] = bench.not_measured
    _save(document, options.out)
    print("\n".join(map(line, figures)))
    for variant, items in bench.memory.items():
        print(f"memory of {variant}: " + ", ".join(f"{k} {v:.3g} GB" for k, v in items.items()))
    for variant, why in bench.not_measured.items():
        print(f"{variant}: not measured ({why})")
    return 0 if all(figure.holds is not False for figure in figures) else 1


class Bench:
    """One model of random weights, and what is measured of it.

    Attributes:
        memory: GB by item, for every variant; peaks are None where there is no CUDA.
        not_measured: Variants that do not fit, and why.
    """

    def __init__(self, shape: dict[str, int], device: Any, *, size: tuple[int, int]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = device
        self.memory: dict[str, dict[str, float]] = {}
        self.not_measured: dict[str, str] = {}
        config = AutoConfig.for_model("llama", **shape)
        torch.manual_seed(0)
        with device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model.requires_grad_(False).eval()
        self.windows = torch.randint(shape["vocab_size"], size, device=device)
        self.counts = sorted({1, len(self.windows)})  # windows of the steps that are measured

    def run(self, *, limits: bool) -> list[Figure]:
        """Measure the dense step, then every variant that fits."""
        self._dense_step(1)
        dense = {
            count: [self._seconds(self._dense_step, count) for _ in range(ROUNDS)]
            for count in self.counts
        }
        self._drop()
        figures = [noted(f"dense-step-{count}", "s", runs) for count, runs in dense.items()]
        medians = {count: statistics.median(runs) for count, runs in dense.items()}
        for name, (options, most) in VARIANTS.items():
            need, have = self._need(options), self._free()
            if have is not None and need > have:
                self.not_measured[name] = f"needs about {need:.0f} GB, {have:.0f} GB are free"
                continue
            variant = self._variant(name, options, medians, limits=limits)
            figures += variant
            peak = self.memory[name].get("peak")
            if peak is not None:
                unit = "GB at the peak of a step"
                title = f"maskllm-{name}-memory"
                limit = at_most(title, most, unit, [peak]) if limits else noted(title, unit, [peak])
                figures.append(limit)
            self._drop()
        return figures

    def machine(self) -> dict[str, Any]:
        """Describe device and software, and whether the kernels were used."""
        import torch

        from prunebench.pruners.maskllm.dispatch import kernels_match_torch
        from prunebench.run.result import describe_hardware, describe_software

        hardware = describe_hardware(torch.device(self.device)).model_dump()
        software = describe_software().model_dump()
        return {**hardware, **software, "triton_kernels": kernels_match_torch(self.device)}

    # ------------------------------------------------------------ steps

    def _dense_step(self, count: int) -> None:
        """Forward and backward of some windows with weight gradients of the linears."""
        import torch

        from prunebench.models.linears import find_linears

        linears = find_linears(self.model)
        for linear in linears:
            linear.module.weight.requires_grad_(True)
        for window in torch.split(self.windows[:count], 1):
            self.model(input_ids=window, labels=window, use_cache=False).loss.backward()
        for linear in linears:
            linear.module.weight.requires_grad_(False)
            linear.module.weight.grad = None

    def _variant(
        self, name: str, options: dict[str, Any], dense: dict[int, float], *, limits: bool
    ) -> list[Figure]:
        import torch

        from prunebench.models.replay import plain_inference
        from prunebench.models.walker import BlockWalker
        from prunebench.pruners.maskllm.candidates import candidates
        from prunebench.pruners.maskllm.method import MaskLLM
        from prunebench.training.shards import Shards

        most, tokens = self.windows.shape
        options = {"batch": most, "train_seqlen": tokens, "micro_tokens": tokens, **options}
        method = MaskLLM(preset="paper", prior="scratch", **options)
        walker = BlockWalker(self.model)
        learner = method.filled().learner(walker, None, candidates(2, 4), Shards())
        figures: list[Figure] = []
        with plain_inference(self.model), torch.enable_grad():
            learner._backward.prepare(self.windows[:1, :128])
            learner.batch = 1
            learner._step(0, self.windows)  # compiles
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for count in self.counts:
                learner.batch = count
                steps = range(1, 1 + ROUNDS)
                runs = [self._seconds(learner._step, step, self.windows) for step in steps]
                ratios = [taken / dense[count] for taken in runs]
                title, unit = f"maskllm-{name}-ratio-{count}", "of a dense step"
                figures += [
                    noted(f"maskllm-{name}-step-{count}", "s", runs),
                    at_most(title, 1.25, unit, ratios)
                    if limits and count >= WINDOWS
                    else noted(title, unit, ratios),
                ]
        self.memory[name] = self._items(learner)
        return [*figures, *self._passes(name, learner)]

    def _passes(self, name: str, learner: Any) -> list[Figure]:
        """Bandwidth of the passes over all logits: what is read and written, by the time."""
        import torch

        from prunebench.pruners.maskllm import dispatch
        from prunebench.pruners.maskllm.optimise import sum_squares
        from prunebench.pruners.maskllm.relaxation import WeightGradient

        how = learner.schedule.relaxation(1, seed=0, draw=1)
        optimizer, layers = learner.optimizer, learner.layers
        kind = learner._sums._dtype

        def slopes(linear: Any) -> Any:
            zeros = [
                torch.zeros(n, device=self.device)
                for n in (linear.out_features, linear.in_features)
            ]
            gradient = torch.zeros(linear.stored.shape, dtype=kind, device=self.device)
            return WeightGradient(gradient, *zeros)

        def soften() -> None:
            for linear, layer in layers.items():
                dispatch.soften(layer, linear.stored, how, torch.empty_like(linear.stored))

        def squares() -> None:
            for linear, layer in layers.items():
                sum_squares(optimizer.directions(layer, linear.stored, slopes(linear), how))

        def update() -> None:
            for linear, layer in layers.items():
                ascent = optimizer.directions(layer, linear.stored, slopes(linear), how)
                optimizer.step(layer, ascent, how, rate=0.0, unit=1.0)

        logits = sum(layer.logits.nbytes for layer in layers.values())
        moments = sum(_moments(layer) for layer in layers.values())
        weights = sum(linear.stored.nbytes for linear in layers)
        slope = sum(linear.size for linear in layers) * kind.itemsize
        passes: list[tuple[str, Callable[[], None], int]] = [
            ("mask-pass", soften, logits + 2 * weights),
            ("squares-pass", squares, logits + weights + 2 * slope),  # the slope is also made
            ("update-pass", update, 2 * logits + 2 * moments + weights + 2 * slope),
        ]
        figures = []
        for title, work, moved in passes:
            self._seconds(work)
            runs = [self._seconds(work) for _ in range(ROUNDS)]
            figures.append(noted(f"maskllm-{name}-{title}", "s", runs))
            rates = [moved / 1e9 / taken for taken in runs]
            figures.append(noted(f"maskllm-{name}-{title}-rate", "GB/s", rates))
        return figures

    # ------------------------------------------------------------ memory

    def _items(self, learner: Any) -> dict[str, float]:
        import torch

        layers = learner.layers
        items = {
            "model": sum(p.nbytes for p in self.model.parameters()),
            "logits": sum(layer.logits.nbytes for layer in layers.values()),
            "moments": sum(_moments(layer) for layer in layers.values()),
            "workspace": learner._store._workspace.nbytes,
            "gradients": sum(linear.size for linear in layers) * learner._sums._dtype.itemsize,
        }
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            items["activations and the rest"] = peak - sum(items.values())
            items["peak"] = peak
        return {name: size / 1e9 for name, size in items.items()}

    def _need(self, options: dict[str, Any]) -> float:
        """Return GB that a variant takes beside the model, with 8 for activations."""
        from prunebench.models.linears import find_linears

        sizes = {"float32": 4, "bfloat16": 2, "int8": 1}
        size = sum(linear.size for linear in find_linears(self.model)) / 1e9
        a_logit = sizes[options["logit_dtype"]] + 2 * sizes[options["state_dtype"]]
        return 1.5 * size * a_logit + size * sizes["bfloat16"] + 8

    def _free(self) -> float | None:
        import torch

        return torch.cuda.mem_get_info()[0] / 1e9 if self.device.type == "cuda" else None

    def _drop(self) -> None:
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _seconds(self, work: Callable[..., Any], *arguments: Any) -> float:
        import torch

        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        start_time = time.perf_counter()
        work(*arguments)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start_time


def _moments(layer: Any) -> int:
    return sum(moment.values.nbytes + moment.scales.nbytes for moment in layer.state.values())


def _save(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
