"""What papers print, beside what was measured here: never mixed in, never counted as a best.

`published.tsv` beside this file holds the values with paper and table (1,747 of them, transcribed
from arXiv 2301.00774, 2306.11695, 2311.04902, 2406.07831 and 2409.17481). A value is shown beside
ours only where model, method, sparsity, metric and protocol agree; what else may differ (the
calibration text and its size, the version of a task's prompt) is for the reader to see.
"""

from __future__ import annotations

import csv
import functools
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources

from prunebench.errors import UsageError
from prunebench.results.cell_score import CellScore
from prunebench.results.compare import Cell, Table
from prunebench.sparsity import Sparsity
from prunebench.spec import BOS_WINDOW, NO_RECOVERY

TOLERANCE = {"token_ppl": 0.02, "acc": 0.01}
"""How far a faithful run may be off: of a perplexity 2 %, of an accuracy one point."""

# 1100: SparseGPT's code joins the first 1,100 documents of a validation file of C4
_TEXTS = {"wikitext2": "wikitext2-raw/test", "ptb": "ptb/test", "c4": "c4/validation-1100"}
_ZERO_SHOT = {
    "arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "race", "rte",
    "winogrande",
}  # fmt: skip
# Over which tasks a paper's mean is; the presets of `--tasks` are the same (a test says so).
_MEANS = {
    ("2306.11695", "mean_of_7"): (
        "boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
    ("2409.17481", "mean_of_7"): (
        "hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
    ("2311.04902", "mean_of_6"): (
        "boolq", "rte", "hellaswag", "winogrande", "arc_easy", "openbookqa",
    ),
}  # fmt: skip
# Our aliases, by the name that papers print.
_MODELS = {
    "LLaMA-7B": "llama-7b", "LLaMA-13B": "llama-13b", "LLaMA-30B": "llama-30b",
    "LLaMA-65B": "llama-65b", "LLaMA-2-7B": "llama2-7b", "LLaMA-2-13B": "llama2-13b",
    "LLaMA-2-70B": "llama2-70b", "LLaMA-3-8B": "llama3-8b", "LLaMA-3.1-8B": "llama3.1-8b",
    "OPT-125m": "opt-125m", "OPT-350m": "opt-350m", "OPT-1.3B": "opt-1.3b",
    "OPT-2.7B": "opt-2.7b", "OPT-6.7B": "opt-6.7b", "OPT-13B": "opt-13b", "OPT-30B": "opt-30b",
    "OPT-66B": "opt-66b", "BLOOM-560m": "bloom-560m", "BLOOM-1.1B": "bloom-1b1",
    "BLOOM-1.7B": "bloom-1b7", "BLOOM-3B": "bloom-3b", "BLOOM-7.1B": "bloom-7b1",
    "BLOOM-176B": "bloom-176b",
}  # fmt: skip
_SAME_METHOD = ("", "5 seeds")  # variants that change nothing of the method
_ARXIV = re.compile(r"\d{4}\.\d{5}")


@dataclass(frozen=True)
class PublishedValue:
    """One number that was printed, or measured before, with all that must agree.

    Attributes:
        method: Our name of the method.
        model: Our alias of the model.
        sparsity: As in a spec: `0`, a ratio, or N:M.
        metric: `token_ppl` or `acc`.
        protocol: As in a result; of a published accuracy, without the task's version.
        value: As our metric is: an accuracy is a ratio.
        source: Paper and table, as a reader would cite them.
        std: Deviation over seeds, where it is printed.
        note: What the transcription remarks.
        paper: arXiv number; empty for a value that was measured.
        table: Where in the paper.
        allocation: How the ratio is spread over the layers.
        recover: How the kept weights were trained afterwards; papers' tables hold none of it.
        bits: Of a code, where the weights are quantized; those of papers' tables have 16 bits.
    """

    method: str
    model: str
    sparsity: str
    metric: str
    protocol: str
    value: float
    source: str
    std: float | None = None
    note: str = ""
    paper: str = ""
    table: str = ""
    allocation: str = "uniform"
    recover: str = NO_RECOVERY
    bits: int | None = None

    @property
    def dataset(self) -> str:
        """The name of the text or the task, `mean_of_7`, or `file` for any text file."""
        parts = self.protocol.split("/")
        if parts[0] == "lm-eval":
            return parts[1]
        if parts[0].startswith("file-"):  # what follows is its content's digest
            return "file"
        return parts[0].removesuffix("-raw").removesuffix("-sample")

    @property
    def seqlen(self) -> int | None:
        """Tokens of a perplexity window; None for an accuracy."""
        part = self.protocol.split("/")[2:3]
        return int(part[0]) if part and part[0].isdigit() else None

    @property
    def bos(self) -> str:
        """Where BOS is: `window` if every window begins with it."""
        return "window" if BOS_WINDOW in self.protocol.split("/") else "text"

    @property
    def limit(self) -> int | None:
        """How many documents of a task (or tokens of a text) were asked; None for all."""
        match = re.search(r"/first-(\d+)$", self.protocol)
        return int(match[1]) if match else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that an accuracy is the mean of."""
        return _MEANS.get((self.paper, self.dataset), (self.dataset,))

    def fits(self, column: str) -> bool:
        """Whether a column of a table is this metric under this protocol."""
        metric, _, protocol = column.partition(" ")
        if metric != self.metric:
            return False
        # lm-eval's task version is part of our protocol; papers do not print it
        versioned = rf"{re.escape(self.protocol)}/v[\d.]+"
        is_task = metric == "acc" and re.fullmatch(versioned, protocol) is not None
        return is_task or protocol == self.protocol


@dataclass(frozen=True)
class Twin:
    """A published value and ours, same model, method, sparsity, metric and protocol.

    Attributes:
        tolerance: How far off they may be: of a perplexity relative, of an accuracy absolute.
    """

    published: PublishedValue
    cell: Cell
    mean: float
    error: float | None
    tolerance: float

    @property
    def difference(self) -> float:
        """Ours minus theirs: of a perplexity as a share of theirs, else absolute."""
        gap = self.mean - self.published.value
        return gap / self.published.value if self.published.metric == "token_ppl" else gap

    @property
    def verdict(self) -> str:
        """`agrees` inside the tolerance or two deviations over seeds, else `better` or `worse`.

        A model that broke is worse.
        """
        if not math.isfinite(self.mean):
            return "worse"
        spread = math.hypot(self.error or 0.0, self.published.std or 0.0)
        within_noise = abs(self.mean - self.published.value) <= 2 * spread
        if abs(self.difference) <= self.tolerance or within_noise:
            return "agrees"
        higher_is_better = self.published.metric == "acc"
        return "better" if (self.difference > 0) == higher_is_better else "worse"


@functools.cache
def published_values() -> tuple[PublishedValue, ...]:
    """Return the values that a run of ours can stand beside, in the order of the file."""
    text = resources.files("prunebench.results").joinpath("published.tsv").read_text("utf-8")
    values = []
    for row in csv.DictReader(text.splitlines(), delimiter="\t"):
        sparsity = _sparsity(row)
        paper = _ARXIV.match(row["arxiv"])
        if (
            row["model"] in _MODELS
            and sparsity
            and paper
            and _is_plain(row)
            and _is_comparable(row)
        ):
            # papers print accuracies in percent, ours are ratios
            scale = 0.01 if row["metric"] == "acc" else 1.0
            values.append(
                PublishedValue(
                    method=row["method"],
                    model=_MODELS[row["model"]],
                    sparsity=sparsity,
                    metric=row["metric"],
                    protocol=_protocol(row),
                    value=float(row["value"]) * scale,
                    source=f"arXiv {paper[0]}, {row['table']}",
                    std=float(row["std"]) * scale if row["std"] else None,
                    note=row["note"] or "",
                    paper=paper[0],
                    table=row["table"],
                )
            )
    return tuple(values)


def _sparsity(row: dict[str, str]) -> str | None:
    if row["method"] == "dense":
        return "0"
    try:
        overall = str(Sparsity.parse(row["sparsity"]))  # refuses "layers 2:4: first 1/2"
        return str(Sparsity.parse(row["pattern"])) if ":" in row["pattern"] else overall
    except UsageError:
        return None


def _protocol(row: dict[str, str]) -> str:
    if row["metric"] == "token_ppl":
        return f"{_TEXTS[row['dataset']]}/{row['seqlen']}/v1"
    return f"lm-eval/{row['dataset']}/0-shot"


def _is_plain(row: dict[str, str]) -> bool:
    """Whether it is the method as it is, not one line of an ablation."""
    return row["variant"] in _SAME_METHOD or (row["method"], row["variant"]) == ("gblm", "(l1)")


def _is_comparable(row: dict[str, str]) -> bool:
    if row["metric"] == "token_ppl":
        return row["dataset"] in _TEXTS and bool(row["seqlen"])
    of_a_mean = any(row["arxiv"].startswith(p) and row["dataset"] == d for p, d in _MEANS)
    return row["metric"] == "acc" and (row["dataset"] in _ZERO_SHOT or of_a_mean)


def find_twins(
    tables: Iterable[Table],
    values: Sequence[PublishedValue] | None = None,
    *,
    tolerance: float | None = None,
) -> list[Twin]:
    """Pair published values with the cells of our tables.

    Args:
        tables: Ours.
        values: Which published values; None for all.
        tolerance: How far off ours may be; None for the metric's own.
    """
    twins = []
    for table in tables:
        for value in published_values() if values is None else values:
            if value.model != table.model:
                continue
            for cell in table.cells:
                ours = _ours(cell, value)
                if ours is not None:
                    allowed = TOLERANCE[value.metric] if tolerance is None else tolerance
                    twins.append(Twin(value, cell, *ours, allowed))
    return twins


def _ours(cell: Cell, value: PublishedValue) -> tuple[float, float | None] | None:
    """Return our mean and its deviation over seeds, or None where there is no such score."""
    settings = cell.settings
    cell_key = (
        cell.method, cell.sparsity, cell.bits, settings["allocation"] or "uniform",
        settings["recover"] or NO_RECOVERY,
    )  # fmt: skip
    if cell_key != (value.method, value.sparsity, value.bits, value.allocation, value.recover):
        return None
    if value.tasks == (value.dataset,):
        score = _score(cell, value)
        return (score.mean, score.std) if score else None
    # a mean stands beside ours only where every one of its tasks was run
    scores = [_score(cell, replace(value, protocol=f"lm-eval/{t}/0-shot")) for t in value.tasks]
    if any(score is None for score in scores):
        return None
    # no deviation: that of a mean does not follow from those of its tasks
    return statistics.fmean(score.mean for score in scores if score), None


def _score(cell: Cell, value: PublishedValue) -> CellScore | None:
    return next((score for column, score in cell.scores.items() if value.fits(column)), None)
