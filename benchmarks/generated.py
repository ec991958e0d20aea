"""Results that look like real ones, as many as one wants: what a group's shared table grows into.

They are for measuring and for looking at `compare` and `report`; no number in them means anything.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunebench.results.schema import LayerSparsity, Result, Score
from prunebench.results.store import ResultStore, new_run_id
from prunebench.spec import RunSpec

_HARDWARE = {
    "device": "cuda", "device_name": "NVIDIA H100", "cpu": "AMD EPYC", "cpu_threads": 16,
    "memory_bytes": 128 << 30,
}  # fmt: skip
_SOFTWARE = {
    "prunebench": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0",
    "lm_eval": "0.4.13",
}  # fmt: skip
_MODULES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip
_HARM = {"magnitude": 1.9, "wanda": 1.0, "sparsegpt": 0.85, "alps": 0.75, "random": 6.0}
_SPARSITIES = ("0.5", "2:4", "0.3", "0.6", "0.7", "4:8", "0.4", "0.8")
_TASKS = {"piqa": (0.68, 1838), "arc_easy": (0.58, 2376), "winogrande": (0.53, 1267)}
_PERPLEXITIES = {"wikitext2-raw/test/2048/v1": 16.5, "c4/validation/2048/v1": 24.1}


def generate_results(
    count: int, *, models: tuple[str, ...] = ("tiny-1b", "small-3b"), blocks: int = 30
) -> Iterator[Result]:
    """Yield `count` results, the same at every call but for their ids.

    Methods x allocations x sparsities x seeds x models, two perplexities and three tasks each,
    every layer filled in.
    """
    for spec in itertools.islice(_specs(models), count):
        yield generate_result(spec, blocks=blocks)


def _specs(models: tuple[str, ...]) -> Iterator[RunSpec]:
    for lot in itertools.count(1):
        for model, sparsity, method, allocation, seed in itertools.product(
            models, _SPARSITIES, _HARM, ("uniform", "owl"), range(5)
        ):
            if allocation == "uniform" or ":" not in sparsity:
                yield RunSpec(
                    method=method, model=model, sparsity=sparsity, allocation=allocation, seed=seed,
                    model_revision="sha256:" + "0" * 64, calibration_samples=32 * lot,
                    tasks=tuple(_TASKS), ppl=tuple(_PERPLEXITIES),
                )  # fmt: skip


def generate_result(spec: RunSpec, *, blocks: int = 30, **changes: Any) -> Result:
    """Return one finished result of a spec, with plausible scores; `changes` replace fields."""
    draw = random.Random(spec.canonical_json())
    kept, _, group = spec.sparsity.partition(":")
    ratio = 1 - int(kept) / int(group) if group else float(kept)
    layers = [
        _layer(spec, draw, block=block, module=module, ratio=ratio, blocks=blocks)
        for block in range(blocks)
        for module in _MODULES
    ]
    size = sum(layer.out_features * layer.in_features for layer in layers)
    harm = _HARM.get(spec.method, 1.0) * (1.3 if group else 1.0) * 2.2 * ratio**2.5
    harm *= 0.8 if spec.allocation != "uniform" else 1.0
    seconds = {"magnitude": 1.0, "random": 1.0}.get(spec.method, 60.0) * draw.uniform(0.9, 1.1)
    tokens = hashlib.sha256(f"{spec.calibration}{spec.seed}".encode()).hexdigest()
    fields: dict[str, Any] = {
        "id": new_run_id(spec),
        "status": "ok",
        "created_at": f"2026-11-{1 + spec.seed:02}T10:00:00+00:00",
        "command": f"prunebench run -m {spec.method} -M {spec.model} --sparsity {spec.sparsity} "
        f"--allocation {spec.allocation} --seed {spec.seed}",
        "spec_id": spec.spec_id,
        "spec": spec,
        "model": {
            "id": spec.model, "source": "hub", "revision": "0" * 40, "dtype": spec.dtype,
            "architecture": "LlamaForCausalLM", "parameters": size + 28346688,
            "prunable_parameters": size, "dense_sha256": "d" * 64,
            "evaluated_sha256": hashlib.sha256(spec.spec_id.encode()).hexdigest(),
        },
        "method": {
            "name": spec.method, "implementation": f"prunebench.pruners.{spec.method}:Method",
            "version": "prunebench 0.1.0", "options": {},
        },
        "calibration": {
            "text": "c4", "origin": "hub:allenai/c4@0000/file", "samples": 128, "seqlen": 2048,
            "seed": spec.seed, "packed": False, "tokens_sha256": tokens,
        },
        "sparsity": {
            "requested": spec.sparsity, "negative_zeros": 0, "pattern_violations": 0,
            "realised_ratio": sum(layer.zeros for layer in layers) / size, "layers": layers,
        },
        "scores": [*_perplexities(draw, harm=harm), *_accuracies(draw, harm=harm)],
        "cost": {
            "stage_seconds": {"load": 2.0, "prune": seconds, "score": 30.0},
            "prune_seconds": seconds, "total_seconds": seconds + 32, "peak_rss_bytes": 3 << 30,
            "peak_gpu_bytes": int(draw.uniform(6, 9) * (1 << 30)),
        },
        "hardware": _HARDWARE,
        "software": _SOFTWARE,
    }  # fmt: skip
    return Result(**{**fields, **changes})


def publish_results(folder: Path, count: int) -> None:
    """Fill a results folder."""
    store = ResultStore(folder)
    for result in generate_results(count):
        path = store.path_of(result)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result.to_json(), encoding="utf-8")  # no fsync: nobody waits for these


def _layer(
    spec: RunSpec, draw: random.Random, *, block: int, module: str, ratio: float, blocks: int
) -> LayerSparsity:
    rows, columns = _MODULES[module]
    if spec.allocation != "uniform":  # early and late blocks are spared; the mean is about the same
        ratio += 0.12 * math.sin(math.pi * (block + 0.5) / blocks) - 0.0764
    known = spec.method in ("sparsegpt", "alps")
    loss = (
        10 ** (-2 + 3 * block / blocks + draw.gauss(0, 0.25)) * (4 if "down" in module else 1)
        if known
        else None
    )
    return LayerSparsity(
        name=f"model.layers.{block}.{module}", out_features=rows, in_features=columns,
        requested=spec.sparsity if ":" in spec.sparsity else f"{ratio:.4f}",
        zeros=int(rows * columns * ratio), loss=loss,
    )  # fmt: skip


def _perplexities(draw: random.Random, *, harm: float) -> Iterator[Score]:
    for protocol, dense in _PERPLEXITIES.items():
        yield Score(
            metric="token_ppl", dataset=protocol.split("/")[0], origin="hub:x@0", protocol=protocol,
            value=dense * math.exp(harm * draw.gauss(1, 0.03)), dense_value=dense,
            higher_is_better=False, targets=300000, limited=False, tokens_sha256="e" * 64,
            stderr=dense * 0.01, dense_stderr=dense * 0.01,
        )  # fmt: skip


def _accuracies(draw: random.Random, *, harm: float) -> Iterator[Score]:
    for task, (dense, documents) in _TASKS.items():
        chance = 0.25 if task.startswith("arc") else 0.5
        value = chance + (dense - chance) * math.exp(-0.7 * harm) + draw.gauss(0, 0.004)
        value = min(max(value, 0.0), 1.0)
        yield Score(
            metric="acc", dataset=task, origin="hub:x@0", protocol=f"lm-eval/{task}/0-shot/v1.0",
            value=value, dense_value=dense, higher_is_better=True, targets=documents, limited=False,
            tokens_sha256="f" * 64, stderr=math.sqrt(value * (1 - value) / documents),
            dense_stderr=math.sqrt(dense * (1 - dense) / documents),
        )  # fmt: skip
