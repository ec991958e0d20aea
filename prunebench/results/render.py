"""Tables as text: Markdown, CSV, JSON, and the cells that the terminal shows."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

from prunebench.results.compare import Cell, CellScore, Table

MISSING = "-"
_METRIC_NAMES = {"token_ppl": "ppl"}
_SETTING_NAMES = {
    "method_options": "options",
    "allocation_options": "allocation options",
    "within_block": "within block",
    "calibration_samples": "samples",
    "model_revision": "revision",
}
LEGEND = (
    "mean ± std over seeds, (difference to dense); best of its sparsity in bold; "
    "~ not to be told from the best one (2 standard errors)"
)


def header(table: Table) -> list[str]:
    """Return the column titles."""
    settings = [_SETTING_NAMES.get(name, name) for name in table.settings]
    scores = [column_title(column) for column in table.columns]
    return ["method", "sparsity", *settings, *scores, "zeros", "prune", "seeds"]


def column_title(column: str) -> str:
    """Return `ppl wiki-sample/held-out/512/v1` for a column key."""
    metric, _, protocol = column.partition(" ")
    return f"{_METRIC_NAMES.get(metric, metric)} {protocol}"


def row(table: Table, cell: Cell, *, bold: tuple[str, str]) -> list[str]:
    """Return the texts of one row; `bold` is what goes around the best value."""
    settings = [_setting(cell.shown[name]) for name in table.settings]
    scores = [score_text(cell.scores.get(column), bold=bold) for column in table.columns]
    seeds = max((score.seeds for score in cell.scores.values()), default=0)
    return [
        cell.method,
        cell.sparsity if cell.method != "dense" else MISSING,
        *settings,
        *scores,
        f"{cell.realised_ratio:.1%}" if cell.method != "dense" else MISSING,
        MISSING if cell.prune_seconds is None else f"{cell.prune_seconds:.0f} s",
        str(seeds) if cell.method != "dense" else MISSING,
    ]


def score_text(score: CellScore | None, *, bold: tuple[str, str]) -> str:
    """Return `48.81 ± 0.12 (+23.19)`, with the best value between `bold`."""
    if score is None:
        return MISSING
    text = number(score.mean)
    if score.std is not None:
        text += f" ± {number(score.std)}"
    if score.best:
        text = f"{bold[0]}{text}{bold[1]}"
    if score.within_noise:
        text = f"~{text}"
    if score.dense is not None and score.mean != score.dense:
        sign = "+" if score.mean >= score.dense else "-"
        text += f" ({sign}{number(abs(score.mean - score.dense))})"
    return text


def number(value: float) -> str:
    """Return a value with four significant digits or two decimals, never in exponents."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def to_markdown(tables: Sequence[Table]) -> str:
    """Return the tables as Markdown, byte-stable for the same results."""
    lines: list[str] = []
    for table in tables:
        titles = header(table)
        lines += [f"## {_escape(table.model)}", ""]
        lines.append("| " + " | ".join(map(_escape, titles)) + " |")
        lines.append("|" + "|".join("---" if i < 2 else "---:" for i in range(len(titles))) + "|")
        for cell in table.cells:
            texts = row(table, cell, bold=("**", "**"))
            lines.append("| " + " | ".join(map(_escape, texts)) + " |")
        lines.append("")
    return "\n".join([*lines, f"{LEGEND}.", ""])


def to_csv(tables: Sequence[Table]) -> str:
    """Return long-form CSV: one line a cell and column, full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = sorted({name for table in tables for cell in table.cells for name in cell.settings})
    titles = ["model", "method", "sparsity", *names, "metric", "protocol", "mean", "std", "seeds"]
    writer.writerow([*titles, "dense", "best", "within_noise", "realised_ratio", "prune_seconds"])
    for table in tables:
        for cell in table.cells:
            for column, score in cell.scores.items():
                metric, _, protocol = column.partition(" ")
                settings = [_setting(cell.settings[name], missing="") for name in names]
                writer.writerow(
                    [cell.model, cell.method, cell.sparsity, *settings, metric, protocol]
                    + [score.mean, score.std, score.seeds, score.dense]
                    + [score.best, score.within_noise, cell.realised_ratio, cell.prune_seconds]
                )
    return out.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """Return one JSON document with all tables."""
    return json.dumps([dataclasses.asdict(table) for table in tables], indent=1) + "\n"


def _setting(value: Any, *, missing: str = MISSING) -> str:
    if value is None or value == {}:
        return missing
    if isinstance(value, dict):
        return " ".join(f"{key}={one}" for key, one in sorted(value.items()))
    text = str(value)
    return text[:19] if text.startswith("sha256:") else text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
