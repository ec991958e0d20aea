"""Walks of the real code over tiny models on fake GPUs: `python -m tests.fake_cuda.walks CASE...`.

A case is `prune/ARCHITECTURE/METHOD/SPARSITY/ORDER/GPUS`, or another of `CASES`. Each prints one
JSON line: what failed, where the host waited for the device, operations, and CPU seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from tests.fake_cuda import load

if __name__ == "__main__":
    load()
    os.environ["PRUNEBENCH_TRITON"] = "0"  # MaskLLM's kernels do not run on fake tensors

import torch
from torch import nn

from prunebench.bench.model import Decoder
from prunebench.calibration.training import Training
from prunebench.evaluate.perplexity import token_ppl
from prunebench.models import gradients
from prunebench.models.linears import find_linears
from prunebench.models.pruned_block import Recovery
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.recovery import RECOVERERS
from prunebench.sparse24.backends import triton_kernels
from prunebench.sparse24.layer import Conversion, convert
from prunebench.sparse24.policy import Policy
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model, tiny_tokens
from tests.fake_cuda.device import FakeCuda

BF16 = torch.bfloat16
HALF, PAIRS = Sparsity.parse("0.5"), Sparsity.parse("2:4")
OPTIONS = {
    "alps": {"steps": 4},
    "admm": {"steps": 4},
    "maskllm": {"steps": 2, "batch": 2, "eval_every": 2, "prior": "wanda", "train_seqlen": 24},
}
QUICK_DISTILL = {"steps": 2, "batch": 2, "seqlen": 24, "held_out": 2, "eval_every": 2}


def walker_of(model: nn.Module, *, gpus: int = 1, order: str = "joint", **options) -> BlockWalker:
    return BlockWalker(
        model,
        token_ids=tiny_tokens(samples=options.pop("samples", 4)),
        within_block=order,
        batch_tokens=48,  # two windows at a time: several batches, on several GPUs
        devices=[torch.device("cuda", i) for i in range(gpus)],
        **options,
    )


def training() -> Training:
    return Training(tiny_tokens(samples=4), tiny_tokens(samples=2, seed=1))


def prune(fake, architecture, method, sparsity, order, gpus, dtype=BF16, **options) -> None:
    """Prune a tiny model."""
    model = fake.model(tiny_model(architecture), dtype=dtype)
    given = {**OPTIONS.get(method, {}), **options}
    pruner = METHODS.make(method, METHODS.resolve_options(method, given, seed=0))
    with fake, tempfile.TemporaryDirectory() as folder, fake_files(model, Path(folder)):
        norms = None
        if pruner.needs.gradients is not None:
            tokens = tiny_tokens(samples=2)
            norms = gradients.gradient_norms(model, tokens, norm=pruner.needs.gradients)
        inputs = PrunerInputs(gradients=norms, training=training())
        walker = walker_of(model, gpus=int(gpus), order=order, inputs=inputs)
        target = Sparsity.parse(sparsity)
        pruner.prune(walker, {linear.name: target for linear in walker.linears})
    require_home(model, dtype)


@contextlib.contextmanager
def fake_files(model: nn.Module, folder: Path) -> Iterator[None]:
    """Stand in for what gradient norms do with bytes: fake weights have no hash and no file."""
    sizes = {
        linear.name: (linear.out_features, linear.in_features) for linear in find_linears(model)
    }
    with (
        mock.patch.object(gradients, "_cache_path", lambda *_: folder / "norms.safetensors"),
        mock.patch.object(
            gradients.GradientNorms, "read", lambda self, name: torch.empty(sizes[name])
        ),
    ):
        yield


def require_home(model: nn.Module, dtype: torch.dtype) -> None:
    """Check that the weights are where, and of the dtype that, they were."""
    for linear in find_linears(model):
        place = linear.stored.device, linear.stored.dtype
        assert place == (torch.device("cuda:0"), dtype), f"{linear.name} is now {place}"


def maskllm(fake, logits, states) -> None:
    """Learn masks: steps, held-out measurement, and the mask written into the weights."""
    options = {"logit_dtype": logits, "state_dtype": states}
    prune(fake, "llama", "maskllm", "2:4", "joint", 1, **options)


def block(fake, architecture, order, gpus) -> None:
    """Prune, and train each block's kept weights."""
    model = fake.model(tiny_model(architecture), dtype=BF16)
    with fake:
        recoverer = RECOVERERS.make("block", {"epochs": 1})
        asked = {linear.name: PAIRS for linear in find_linears(model)}
        walker = walker_of(
            model, gpus=int(gpus), order=order, samples=8,
            recovery=Recovery(recoverer, sparsity=asked),
        )  # fmt: skip
        METHODS.make("wanda", {}).prune(walker, asked)
    require_home(model, BF16)


def distill(fake, rank) -> None:
    """Train the kept weights of a pruned model end to end."""
    model = fake.model(tiny_model("llama"), dtype=BF16)
    with fake:
        dense = {linear.name: linear.stored.clone() for linear in find_linears(model)}
        options = RECOVERERS.resolve_options(
            "distill", {**QUICK_DISTILL, "rank": int(rank)}, seed=0
        )
        RECOVERERS.make("distill", options).recover_model(model, dense, training())
    require_home(model, BF16)


def packed(fake, model, backend) -> Conversion:
    """Convert a model to packed 2:4 weights."""
    policy = Policy(torch.device("cuda:0"), None if backend == "policy" else backend)
    linears = find_linears(model)
    conversion = convert(model, linears, policy=policy, strict=True)
    assert len(conversion.layers) == sum(linear.expert is None for linear in linears)
    return conversion


def score(fake, architecture, backend) -> None:
    """Score a model dense, packed, and dense again."""
    model = fake.model(tiny_model(architecture), dtype=BF16)
    with fake, unpacking():
        windows = tiny_tokens(samples=3)
        token_ppl(model, windows)
        conversion = packed(fake, model, backend)
        token_ppl(model, windows)
        conversion.restore()
    require_home(model, BF16)


def decode(fake, architecture, backend, batch) -> None:
    """Capture decode steps in a CUDA graph, where the host can read nothing."""
    model = fake.model(tiny_model(architecture), dtype=BF16)
    with fake, unpacking():
        if backend != "dense":
            packed(fake, model, backend)
        decoder = Decoder(model, tiny_tokens(samples=int(batch)).to("cuda:0"), room=8)
        decoder.step()  # what happens once, such as building a product, is before the capture
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            decoder.step()


def unpacking() -> mock._patch:
    """Stand in for the kernel that unpacks a tiled weight: Triton launches nothing here."""

    def unpack(words, meta, out) -> None:
        assert words.device == meta.device == out.device

    return mock.patch.object(triton_kernels, "unpack", unpack)


# ---------------------------------------------------------------- what must fail


def gradient_product(fake, dtype) -> None:
    """GBLM's product: the check that allows it compares values, which fake tensors do not have."""
    with fake:
        sums = object.__new__(gradients._Accumulators)
        sums.norm, sums._scale, sums._buffer = "l1", 0.5, torch.empty(0, device="cuda:0")
        sums._sums = {"x": torch.zeros(16, 24, device="cuda:0")}
        linear = SimpleNamespace(name="x", out_features=16, in_features=24)
        outer, inputs = (
            torch.ones(32, width, device="cuda:0", dtype=getattr(torch, dtype))
            for width in (16, 24)
        )
        sums.add_product(linear, outer, inputs)


def mixed_devices(fake) -> None:
    with fake:
        torch.ones(4, 4, device="cuda:0") @ torch.ones(4, 4, device="cuda:1")


def mixed_dtypes(fake) -> None:
    with fake:
        torch.ones(4, 4, device="cuda:0") @ torch.ones(4, 4, device="cuda:0", dtype=BF16)


def host_read_in_a_graph(fake) -> None:
    with fake:
        total = torch.ones(4, device="cuda:0").sum()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            float(total)


def mixed_devices_backward(fake) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient @ torch.ones(4, 4, device="cuda:1")

    with fake:
        x = torch.ones(4, 4, device="cuda:0", requires_grad=True)
        Wrong.apply(x).sum().backward()


CASES: dict[str, Callable[..., None]] = {
    walk.__name__: walk
    for walk in (prune, maskllm, block, distill, score, decode, gradient_product,
                 mixed_devices, mixed_dtypes, host_read_in_a_graph, mixed_devices_backward)
}  # fmt: skip


def run(case: str) -> dict[str, object]:
    """Run a case and return what came of it; a failure is one line."""
    name, *arguments = case.split("/")
    fake, failure, start_time = FakeCuda(), "", time.process_time()
    try:
        CASES[name](fake, *arguments)
    except Exception as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "prunebench" in f.filename]
        places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[:-5:-1])
        if os.environ.get("FAKE_CUDA_TRACE"):
            traceback.print_exc()
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({places})"
    reads = {f"{place} {what}": count for (place, what), count in sorted(fake.reads.items())}
    return {
        "case": case, "failure": failure, "reads": reads, "operations": fake.operations,
        "seconds": round(time.process_time() - start_time, 2),
    }  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for each in sys.argv[1:]:
        sys.stdout.write(json.dumps(run(each)) + "\n")
        sys.stdout.flush()
