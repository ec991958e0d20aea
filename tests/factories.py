"""Results, matrices and command lines that tests of several packages make."""

from pathlib import Path

import torch

from prunebench.calibration.stats import StatsAccumulator
from prunebench.models.linears import find_linears
from prunebench.results.compare import compare
from prunebench.results.overview import overview
from prunebench.results.schema import Result
from prunebench.results.selection import Selection
from prunebench.results.store import new_run_id
from prunebench.sparse24.backends.cpu import CpuBackend
from prunebench.sparse24.backends.protocol import Support
from prunebench.sparse24.policy import Policy
from prunebench.spec import RunSpec
from prunebench.sweep.engines.job import Job
from prunebench.testing import tiny_model

HARDWARE = {"device": "cpu", "device_name": "c", "cpu": "c", "cpu_threads": 2, "memory_bytes": 1}
SOFTWARE = {"prunebench": "0", "python": "3", "torch": "2", "transformers": "5"}


def make_result(
    *, method="wanda", sparsity="0.5", value=40.0, dense=20.0, seed=0, model="m",
    created="2026-01-01", protocol="wiki/test/512/v1", status="ok", realised=0.5, **spec,
) -> Result:  # fmt: skip
    run = RunSpec(method=method, sparsity=sparsity, seed=seed, model=model, **spec)
    score = {
        "metric": "token_ppl", "dataset": protocol.split("/")[0], "origin": "o",
        "protocol": protocol, "value": value, "dense_value": dense, "higher_is_better": False,
        "targets": 10,
        "limited": False, "tokens_sha256": "t",
    }  # fmt: skip
    return Result(
        id=new_run_id(run), status=status, created_at=created, command="prunebench run",
        spec_id=run.spec_id, spec=run, scores=[score], hardware=HARDWARE, software=SOFTWARE,
        sparsity={
            "requested": sparsity, "realised_ratio": realised, "negative_zeros": 0,
            "pattern_violations": 0, "layers": [],
        },
        cost={
            "stage_seconds": {"prune": 3.0}, "prune_seconds": 3.0, "total_seconds": 9.0,
            "peak_rss_bytes": 10, "peak_gpu_bytes": None,
        },
    )  # fmt: skip


def with_tasks(method, *, stderr=0.01, metric="acc", asked="0-shot/v1.0", **values):
    """A result with accuracies instead of a perplexity."""
    result = make_result(method=method)
    score = result.scores[0].model_dump()
    scores = [
        {
            **score, "metric": metric, "dataset": task, "value": value, "dense_value": 0.7,
            "protocol": f"lm-eval/{task}/{asked}", "higher_is_better": True, "stderr": stderr,
        }
        for task, value in values.items()
    ]  # fmt: skip
    return type(result).model_validate({**result.model_dump(), "scores": scores})


def on_tokens(result, sha256):
    """The result with another hash of what was scored."""
    scores = [score.model_copy(update={"tokens_sha256": sha256}) for score in result.scores]
    return result.model_copy(update={"scores": scores})


def counted(result, *, parameters=1_200_000, prunable=1_000_000):
    """The result with the numbers of parameters from which its bytes are computed."""
    model = {
        "id": "m", "source": "folder", "revision": "r", "architecture": "a", "dtype": "float32",
        "parameters": parameters, "prunable_parameters": prunable, "dense_sha256": "d",
        "evaluated_sha256": "e",
    }  # fmt: skip
    return type(result).model_validate({**result.model_dump(), "model": model})


def recovered(method, value, *, seconds=120.0):
    """A result whose kept weights were trained block by block."""
    result = make_result(method=method, value=value, recover="block", recover_options={"lr": 0.008})
    block = {
        "name": "block", "implementation": "prunebench.recovery.block:Block", "version": "0.1.0",
        "options": {"lr": 0.008}, "windows": 28, "held_out_windows": 4, "seqlen": 512,
        "tokens": 43_008, "seconds": seconds, "recovered_blocks": 30, "held_out_before": 0.2,
        "held_out_after": 0.1, "blocks": [],
    }  # fmt: skip
    return type(result).model_validate({**result.model_dump(), "recovery": block})


def canonicalize(weight, keep):
    """The weight with +0.0 where it is not kept (`weight * keep` has -0.0), and instead of -0.0."""
    return torch.where(keep, weight, 0) + 0.0  # IEEE 754: -0.0 + 0.0 is +0.0


def random_24(rows, groups, *, seed=0, dtype=torch.bfloat16, kept=2):
    """A matrix that keeps `kept` of every four, at random places."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(rows, groups, 4, generator=generator).argsort(-1)[..., :kept]
    keep = torch.zeros(rows, groups, 4, dtype=torch.bool).scatter_(-1, places, True)
    weight = torch.randn(rows, groups * 4, generator=generator).to(dtype)
    return canonicalize(weight, keep.view(rows, -1))


def pruned(architecture="llama"):
    """A tiny model in bfloat16 whose linears are 2:4."""
    model = tiny_model(architecture).to(torch.bfloat16)
    for seed, linear in enumerate(find_linears(model)):
        weight = random_24(linear.out_features, linear.in_features // 4, seed=seed) * 0.2
        linear.stored.copy_(weight.T if linear.transposed else weight)
    return model


def inputs(tokens=400, width=96, *, seed=0):
    """Correlated inputs with heavy-tailed scales, as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    scales = torch.randn(width, generator=generator).exp()
    return torch.randn(tokens, width, generator=generator) @ mix * scales


def stats_of(x, *, samples=4):
    accumulator = StatsAccumulator(hessian=True)
    for batch in x.chunk(3):
        accumulator.add(batch)
    return accumulator.result(samples=samples, width=x.shape[1], device=x.device)


def weights(rows=24, width=96, *, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


RUN = ("-m", "magnitude", "--sparsity", "2:4", "--dtype", "bfloat16")


def line_of_run(model, target, text, *more):
    return [
        "run", "-M", model, *RUN, "--ppl", f"file:{text}", "--ppl-seqlen", "64", "--ppl-tokens",
        "128", "--save-model", target, *more,
    ]  # fmt: skip


# ---------------------------------------------------------------- every way out


WAYS = ("resident", "disk", "export", "packed24", "dense", "packed24 of strangers",
        "dense of strangers")  # fmt: skip


def job(*words, **settings):
    return Job(number=1, words=words, folder=str(Path.cwd()), settings=settings)


def only_table(results, *selectors):
    (table,) = compare(results, Selection.parse(selectors))
    return table


def blocks_of(results, **how):
    return overview(compare(results), **how).blocks


def rows_of(block):
    """What stands in the rows: mark, words, score, note; by sparsity."""
    score = block.columns[0]
    return {
        section.title: [
            (line.mark.strip() + " ".join(line.words), score.text(line.cell), line.note)
            for line in section.lines
        ]
        for section in block.sections
    }


CPU = torch.device("cpu")


def without_cpu_kernels(monkeypatch):
    """Let `cpu` be unavailable, as on a machine without a compiler: layers run by `reference`."""
    refusal = Support(False, "no C++ compiler")
    monkeypatch.setattr(CpuBackend, "available", lambda self, device: refusal)


def policy(**options):
    return Policy(CPU, **options)


def peak_bytes(action):
    """Return the most bytes that were allocated at a time while `action` ran."""
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        action()
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


class DeviceOf:
    """`torch.cuda.device_of` without a GPU: whose device is the current one, by address."""

    current = None

    def __init__(self, tensor):
        self.address = tensor.data_ptr()

    def __enter__(self):
        DeviceOf.current = self.address

    def __exit__(self, *error):
        DeviceOf.current = None
