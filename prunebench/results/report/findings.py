"""One computed sentence a model: what was found, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from prunebench.results.compare import Cell
from prunebench.results.render import column_title, score_text, value_text
from prunebench.results.report.data import ModelPart
from prunebench.results.report.payload import clean, relative_text

_PLAIN = ("", "")
_MAX_SPARSITIES = 3


def finding(part: ModelPart) -> str:
    """Return which method keeps most at which sparsity, among the defaults of the methods.

    Only sparsities with several methods are compared, those with the most first; methods that are
    within noise of the best are named with it.
    """
    column = part.column
    scored = [cell for cell in part.defaults.cells if column in cell.scores]
    dense = next((cell.scores[column] for cell in scored if cell.method == "dense"), None)
    of_dense = f" (dense {value_text(dense.metric, dense.mean)})" if dense else ""
    subject = f"{clean(part.table.model)}, {clean(column_title(column))}{of_dense}"
    by_sparsity: dict[str, list[Cell]] = {}
    for cell in scored:
        if cell.method != "dense":
            by_sparsity.setdefault(cell.sparsity, []).append(cell)
    rivals = [cells for cells in by_sparsity.values() if len(cells) > 1]
    # stable: of those with equally many methods, the sparsity that comes first in the table
    chosen = sorted(rivals, key=lambda cells: -len(cells))[:_MAX_SPARSITIES]
    if not chosen:
        count = sum(cell.method != "dense" for cell in part.table.cells)
        return f"{subject}: {count} pruned rows, no two methods at the same sparsity."
    chosen.sort(key=lambda cells: cells[0].order)
    setting = f", each method at its default ({part.shared})" if part.shared else ""
    return f"{subject}{setting}: {'; '.join(_best(cells, column) for cells in chosen)}."


def _best(cells: Sequence[Cell], column: str) -> str:
    best = min(cells, key=lambda cell: not cell.scores[column].best)
    ties = [cell.method for cell in cells if cell.scores[column].within_noise]
    score = best.scores[column]
    text = score_text(score, bold=_PLAIN).partition(" (")[0]
    relative = relative_text(score).replace(" x", " times dense")
    tied = f" ({', '.join(map(clean, ties))} within noise of it)" if ties else ""
    against = f", {relative}" if relative else ""
    return (
        f"at {best.sparsity}, {clean(best.method)} is best of {len(cells)} with {text}"
        f"{against}{tied}"
    )
