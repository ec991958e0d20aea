"""Complete tables: Markdown, LaTeX, CSV, parquet, JSON, and the texts of their cells."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunebench.results.cell_score import CellScore
from prunebench.results.compare import Cell, Table

if TYPE_CHECKING:
    from pandas import DataFrame

MISSING = "-"
_METRIC_NAMES = {"token_ppl": "ppl"}
_RATIOS = ("acc", "acc_norm", "exact_match", "top1_changed")  # shown in percent
FROM_ZERO = ("kl_divergence", "top1_changed")  # the dense model has 0: the value is the difference
SETTING_NAMES = {
    "method_options": "options",
    "allocation_options": "allocation options",
    "recover": "recovery",
    "recover_options": "recovery options",
    "within_block": "within block",
    "calibration_samples": "samples",
    "calibration_bos": "calibration BOS",
    "model_revision": "revision",
}
LEGEND = (
    "mean ± std over seeds, (difference to dense); best of its sparsity in bold; "
    "~ within noise of the best (2 standard errors)"
)
_LEGEND_BENCH = (
    "bytes: of the dense model's, computed; decode, prefill: times the speed of dense, both in one "
    "run (prunebench bench)"
)
_LEGEND_SIZE = "size: bytes of the checkpoint beside those of the dense model in 16 bits, computed"
_BENCH_FIELDS = {
    "storage": "form", "bytes_ratio": "bytes_ratio", "decode_speedup": "decode",
    "prefill_speedup": "prefill", "speed": "speed", "gpu": "gpu",
}  # fmt: skip
_SIZE_FIELDS = {"stored_as": "form", "size_bytes": "total_bytes", "size_ratio": "ratio"}
_BENCH_NUMBERS = ("bytes_ratio", "decode_speedup", "prefill_speedup")
_LEGEND_STDERR = "± of a single seed: standard error over documents"


def legend(tables: Sequence[Table]) -> str:
    """Return what the marks in the tables mean."""
    scores = [score for table in tables for cell in table.cells for score in cell.scores.values()]
    parts = [LEGEND]
    reasons = sorted({cell.stale for table in tables for cell in table.cells if cell.stale})
    parts += [f"stale: the same run now gives other numbers ({'; '.join(reasons)})"] * bool(reasons)
    if any(score.std is None and score.stderr is not None for score in scores):
        parts.append(_LEGEND_STDERR)
    if any(table.has_sizes for table in tables):
        parts.append(_LEGEND_SIZE)
    if any(table.has_bench for table in tables):
        parts.append(_LEGEND_BENCH)
    parts += [f"{who} where it says nothing else: {words}" for who, words in usual_texts(tables)]
    return "; ".join(parts)


def usual_texts(tables: Sequence[Table]) -> list[tuple[str, str]]:
    """Return what the rows of a method (or allocator) have where they say nothing, in words."""
    several = len(tables) > 1
    return [
        (f"{who} on {table.model}" if several else who, setting_text(options))
        for table in tables
        for who, options in sorted(table.usual.items())
    ]


def header(table: Table) -> list[str]:
    """Return the column titles."""
    settings = [SETTING_NAMES.get(name, name) for name in table.settings]
    scores = [column_title(column) for column in table.columns]
    bench = ["bytes", "decode", "prefill"] if table.has_bench else []
    size = ["size"] if table.has_sizes else []
    return ["method", "sparsity", *settings, *scores, "zeros", *size, *bench, "prune", "seeds"]


def text_columns(table: Table) -> int:
    """Return how many of the first columns hold words, which are aligned on the left."""
    return 2 + len(table.settings)


def column_title(column: str) -> str:
    """Return `ppl wiki-sample/held-out/512/v1` for a column key."""
    metric, _, protocol = column.partition(" ")
    return f"{metric_name(metric)} {protocol}"


def score_title(column: str, protocols: Mapping[str, str]) -> str:
    """Return `ppl wiki` for a column key; `protocols` has the short names of protocols."""
    metric, _, protocol = column.partition(" ")
    return f"{metric_name(metric)} {protocols.get(protocol, protocol)}"


def metric_name(metric: str) -> str:
    """Return what people call a metric: `ppl` for `token_ppl`."""
    return _METRIC_NAMES.get(metric, metric)


def row(table: Table, cell: Cell, *, bold: tuple[str, str]) -> list[str]:
    """Return the texts of one row; `bold` is what goes around the best value."""
    settings = [setting_text(cell.shown[name]) for name in table.settings]
    scores = [score_text(cell.scores.get(column), bold=bold) for column in table.columns]
    seeds = max((score.seeds for score in cell.scores.values()), default=0)
    return [
        f"{cell.method} (stale)" if cell.stale else cell.method,
        cell.target if cell.method != "dense" else MISSING,
        *settings,
        *scores,
        f"{cell.realised_ratio:.1%}" if cell.method != "dense" else MISSING,
        *([_size_text(cell)] if table.has_sizes else []),
        *(_bench_texts(cell) if table.has_bench else []),
        MISSING if cell.prune_seconds is None else f"{cell.prune_seconds:.0f} s",
        str(seeds) if cell.method != "dense" else MISSING,
    ]


def _size_text(cell: Cell) -> str:
    """Return bytes and form: `0.557 (2:4)`."""
    return f"{cell.size.ratio:.3f} ({cell.size.form})" if cell.size else MISSING


def _bench_texts(cell: Cell) -> list[str]:
    """Return bytes and speed: `0.60 (2:4)`, `1.41x`; `not measured` where no GPU was there."""
    bench = cell.bench
    if bench is None:
        return [MISSING] * 3
    speeds = ["not measured" if s is None else f"{s:.2f}x" for s in (bench.decode, bench.prefill)]
    return [f"{bench.bytes_ratio:.3f} ({bench.form})", *speeds]


def score_text(score: CellScore | None, *, bold: tuple[str, str]) -> str:
    """Return `48.81 ± 0.12 (+23.19)` or `65.3% ± 0.4 (97.3% of dense)`, the best between `bold`."""
    if score is None:
        return MISSING
    text = value_text(score.metric, score.mean)
    if score.error is not None:
        # a deviation is in points, not in percent of the value: 65.3% ± 0.4
        text += f" ± {value_text(score.metric, score.error).removesuffix('%')}"
    if score.best:
        text = f"{bold[0]}{text}{bold[1]}"
    if score.within_noise:
        text = f"~{text}"
    beside_dense = against_dense(score)
    return f"{text} ({beside_dense})" if beside_dense else text


def against_dense(score: CellScore) -> str:
    """Return what was lost: the difference to dense, or of an accuracy the share that is left."""
    if score.dense is None or score.mean == score.dense or score.metric in FROM_ZERO:
        return ""
    if score.metric in _RATIOS and score.higher_is_better:
        return f"{score.mean / score.dense:.1%} of dense" if score.dense else ""
    sign = "+" if score.mean >= score.dense else "-"
    return f"{sign}{value_text(score.metric, abs(score.mean - score.dense))}"


def value_text(metric: str, value: float) -> str:
    """Return a value of a metric: ratios in percent with a decimal, divergences with four."""
    if metric in _RATIOS:
        return f"{value:.1%}"
    return f"{value:.4f}" if metric == "kl_divergence" else number(value)


def number(value: float) -> str:
    """Return a value with four digits or two decimals; millions as `4.97e7`."""
    # from 999,500 on, three digits round to a million: 1.00e6
    if 999_500 <= value < math.inf:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits}e{int(exponent)}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def to_markdown(tables: Sequence[Table]) -> str:
    """Return the tables as Markdown, byte-stable for the same results."""
    lines: list[str] = []
    for table in tables:
        titles = header(table)
        lines += [f"## {escape(table.model)}", ""]
        lines.append("| " + " | ".join(map(escape, titles)) + " |")
        words = text_columns(table)
        lines.append("|" + "---|" * words + "---:|" * (len(titles) - words))
        for cell in table.cells:
            texts = row(table, cell, bold=("**", "**"))
            lines.append("| " + " | ".join(map(escape, texts)) + " |")
        lines.append("")
    return "\n".join([*lines, f"{legend(tables)}.", ""])


def to_latex(tables: Sequence[Table]) -> str:
    """Return one LaTeX `table` with booktabs rules a model; it needs nothing but `booktabs`."""
    lines: list[str] = []
    for table in tables:
        words = text_columns(table)
        columns = "l" * words + "r" * (len(header(table)) - words)
        lines += [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        metrics, protocols = zip(*map(_latex_title, header(table)), strict=True)
        lines.append(_latex_row(metrics))
        if any(protocols):
            lines.append(_latex_row(protocols))
        last = None
        for cell in table.cells:
            if cell.target != last:
                lines.append(r"\midrule")
            last = cell.target
            # NUL marks bold: no text holds one, and escaping does not touch it
            lines.append(_latex_row(map(_latex, row(table, cell, bold=("\0", "\0")))))
        caption = _latex(f"{table.model}: {legend([table])}.")
        lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}", ""]
    return "% \\usepackage{booktabs}\n" + "\n".join(lines)


def _latex_title(title: str) -> tuple[str, str]:
    """Return the metric and, for the line below it, the protocol."""
    metric, _, protocol = title.partition(" ") if "/" in title else (title, "", "")
    return _latex(metric), rf"{{\scriptsize {_latex(protocol)}}}" if protocol else ""


def _latex_row(texts: Iterable[str]) -> str:
    return " & ".join(texts) + r" \\"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "^": r"\textasciicircum{}", "~": r"$\sim$", "±": r"$\pm$",
    "<": r"$<$", ">": r"$>$", "|": r"$|$",
}  # fmt: skip


def _latex(text: str) -> str:
    """Escape a text; what is between two NULs becomes bold."""
    parts = " ".join(text.split()).split("\0")
    escaped = ["".join(_LATEX.get(character, character) for character in part) for part in parts]
    return "".join(rf"\textbf{{{part}}}" if i % 2 else part for i, part in enumerate(escaped))


def to_frame(tables: Sequence[Table]) -> DataFrame:
    """Return all cells in long form, one row a cell and score, full precision."""
    import pandas as pd

    names = sorted({name for table in tables for cell in table.cells for name in cell.settings})
    rows = []
    for cell in (cell for table in tables for cell in table.cells):
        settings = {name: setting_text(cell.settings[name], missing="") for name in names}
        of_cell = {
            "model": cell.model,
            "method": cell.method,
            "sparsity": cell.sparsity,
            **settings,
        }
        cost = {"realised_ratio": cell.realised_ratio, "prune_seconds": cell.prune_seconds}
        bench = {title: getattr(cell.bench, name, None) for title, name in _BENCH_FIELDS.items()}
        size: dict[str, Any] = {"target": cell.target}
        size |= {title: getattr(cell.size, name, None) for title, name in _SIZE_FIELDS.items()}
        origin = {
            "devices": " ".join(cell.devices), "cpu_threads": " ".join(map(str, cell.cpu_threads)),
            "result_ids": " ".join(cell.result_ids), "recover_seconds": cell.recover_seconds,
            "structure": cell.structure, "removed_ratio": cell.removed_ratio,
            "stale": cell.stale or None,
        }  # fmt: skip
        for column, score in cell.scores.items():
            metric, _, protocol = column.partition(" ")
            rows.append(
                {**of_cell, "metric": metric, "protocol": protocol, "mean": score.mean,
                 "std": score.std, "seeds": score.seeds, "dense": score.dense, "best": score.best,
                 "within_noise": score.within_noise, **cost, "stderr": score.stderr,
                 "dense_stderr": score.dense_stderr, "higher_is_better": score.higher_is_better,
                 **bench, **origin, **size}
            )  # fmt: skip
    frame = pd.DataFrame(rows)
    # columns that are missing in every row have no type of their own
    numbers = [
        "std",
        "dense",
        "prune_seconds",
        "recover_seconds",
        "stderr",
        "dense_stderr",
        *_BENCH_NUMBERS,
        "size_ratio",
    ]
    words = [
        "stored_as",
        "stale",
        *(title for title in _BENCH_FIELDS if title not in _BENCH_NUMBERS),
    ]
    types = dict.fromkeys(numbers, "float64") | dict.fromkeys(words, "string")
    return frame.astype(types | {"size_bytes": "Int64"})


def to_csv(tables: Sequence[Table]) -> str:
    """Return long-form CSV: one line a cell and score."""
    frame = to_frame(tables)
    # the score of a broken model is not a missing one
    frame["mean"] = frame["mean"].astype(object).fillna("nan")
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_parquet(tables: Sequence[Table]) -> bytes:
    """Return the rows of `to_csv` as a parquet file."""
    buffer = io.BytesIO()
    to_frame(tables).to_parquet(buffer, index=False)
    return buffer.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """Return one JSON document with all tables."""
    return json.dumps([dataclasses.asdict(table) for table in tables], indent=1) + "\n"


def setting_text(value: Any, *, missing: str = MISSING) -> str:
    """Return a setting of a spec as a table shows it."""
    if value is None or value == {}:
        return missing
    if isinstance(value, dict):
        return " ".join(
            f"{key}={setting_text(option, missing='None')}" for key, option in sorted(value.items())
        )
    text = str(value)
    # the prefix and 12 digits of a hash
    return text[:19] if text.startswith("sha256:") else text


def escape(text: str) -> str:
    """Return a text that Markdown shows as it is, in a table too."""
    # a | would end the table's cell, a < could begin an HTML tag
    return text.replace("|", "\\|").replace("<", "&lt;")
