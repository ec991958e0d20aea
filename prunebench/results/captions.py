"""What is said about a block of the short table once: captions, settings in words, the legend."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunebench.options import options_of
from prunebench.results.columns import Ranking, member_columns, plus_minus, task_means
from prunebench.results.compare import Cell, Table
from prunebench.results.fold import DATA
from prunebench.results.names import short_method, short_names, short_protocol, short_text
from prunebench.results.render import SETTING_NAMES, metric_name, setting_text, usual_texts
from prunebench.spec import RunSpec

_OPTIONS = options_of(RunSpec)
_WORD_ALONE = ("within_block", "allocation", "dtype")  # their values need no name beside them
_IN_CAPTION = ("calibration", "calibration_samples", "seqlen", *_WORD_ALONE)


@dataclass(frozen=True)
class Names:
    """Short names that are unique in what is shown."""

    protocols: Mapping[str, str]
    methods: Mapping[str, str]
    texts: Mapping[str, str]

    @classmethod
    def of(cls, tables: Sequence[Table]) -> Names:
        """Shorten the names in some tables."""
        cells = [cell for table in tables for cell in table.cells]
        texts = [cell.settings["calibration"] for cell in cells if cell.settings["calibration"]]
        protocols = [column.partition(" ")[2] for table in tables for column in table.columns]
        return cls(
            short_names(protocols, short_protocol),
            short_names((cell.name for cell in cells), short_method),
            short_names(texts, short_text),
        )

    def of_column(self, column: str) -> str:
        """Return `wiki` for a perplexity, `acc/piqa` for another metric."""
        metric, _, protocol = column.partition(" ")
        short = self.protocols[protocol]
        return short if metric == "token_ppl" else f"{metric_name(metric)}/{short}"


def usual_settings(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the settings that most rows have, without recovery and options of methods."""
    usual = {}
    for name, option in _OPTIONS.items():
        # a recovery stands behind the name of its method
        if not option.about.shown or name.endswith("_options") or name == "recover":
            continue
        values = [json.dumps(c.settings[name]) for c in cells if c.settings[name] is not None]
        counts = Counter(values)
        if counts:
            usual[name] = json.loads(max(counts, key=functools.partial(_usualness, counts, name)))
    return usual


def _usualness(counts: Mapping[str, int], name: str, word: str) -> tuple[int, bool, str]:
    """Return how usual a value is; of two that are as frequent, the default of its option."""
    value = json.loads(word)
    plain = short_text(value) if isinstance(value, str) else value
    return counts[word], plain == _OPTIONS[name].value, word


def setting_words(cell: Cell, usual: Mapping[str, Any], names: Names) -> tuple[str, ...]:
    """Return in what the setting of a cell differs from the usual one: `owl`, `seqlen=2048`."""
    words = []
    of_method = cell.shown["method_options"] or {}
    for name, value in cell.shown.items():
        if name == "recover":
            continue  # it stands behind the method
        if isinstance(value, dict):
            for key, v in value.items():
                # the words of --set, where an option of the method stands there by that name too
                twice = name == "recover_options" and key in of_method
                word = f"recover.{key}" if twice else key
                words.append(f"{word}={setting_text(v, missing='None')}")
        elif value is not None and value != usual.get(name, value):
            words.append(_word(name, value, names))
    return tuple(words)


def stale_words(cell: Cell) -> tuple[str, ...]:
    """Return the mark of a row that the same run would not give today."""
    return ("stale",) if cell.stale else ()


def stale_texts(tables: Sequence[Table]) -> list[str]:
    """Return what the mark of stale rows means, and what changed."""
    reasons = {cell.stale: None for table in tables for cell in table.cells if cell.stale}
    texts = ["stale: the same run now gives other numbers"] if reasons else []
    return [*texts, *reasons]


def _word(name: str, value: Any, names: Names) -> str:
    text = names.texts.get(value, value) if name == "calibration" else setting_text(value)
    if name in _WORD_ALONE:
        return str(text)
    return f"{SETTING_NAMES.get(name, name).replace(' ', '_')}={text}"


def caption_of(
    ranking: Ranking, dense: Sequence[Cell], cells: Sequence[Cell], usual: Mapping[str, Any],
    names: Names, *, dense_rows: bool,
) -> list[str]:  # fmt: skip
    """Return the parts of a caption: the score, that of dense, and what most rows share."""
    score = ranking.of_any([*cells, *dense])
    if len(ranking.columns) > 1:
        what = f"mean {metric_name(score.metric)} of {len(ranking.columns)} tasks"
    else:
        what = f"{metric_name(score.metric)} on {names.protocols[ranking.key.partition(' ')[2]]}"
    parts = [what + ("" if dense_rows else _dense_text(ranking, dense))]
    parts += _usual_texts(usual, names)
    devices = sorted({device for cell in cells for device in cell.devices})
    threads = sorted({count for cell in cells for count in cell.cpu_threads})
    if devices == ["cpu"] and threads:
        parts.append(f"pruned on cpu, {_range(threads)} thread{'' if threads == [1] else 's'}")
    elif len(devices) == 1:
        parts.append(f"pruned on {devices[0]}")
    # a speed that was not measured is said to be so, and why
    speeds = {cell.bench.speed for cell in cells if cell.bench and cell.bench.decode is None}
    return [*parts, *(f"speed {reason}" for reason in sorted(speeds))]


def _dense_text(ranking: Ranking, dense: Sequence[Cell]) -> str:
    scores = [(cell, score) for cell in dense if (score := ranking.score_of(cell))]
    if len(scores) == 1:
        return f", dense {plus_minus(scores[0][1])}"
    differing = [
        name for name in ("dtype", "model_revision")
        if len({cell.settings[name] for cell, _ in scores}) > 1
    ]  # fmt: skip
    texts = [
        f"{plus_minus(score)} ({', '.join(setting_text(cell.settings[n]) for n in differing)})"
        for cell, score in scores
    ]
    return f", dense {', '.join(texts)}" if texts else ""


def _usual_texts(usual: Mapping[str, Any], names: Names) -> list[str]:
    """Return what most rows share; of what few people change, only what is not the default."""
    parts = []
    if usual.get("calibration"):
        size = f"{usual.get('calibration_samples')}x{usual.get('seqlen')}"
        parts.append(f"calibrated on {names.texts[usual['calibration']]} {size}")
    parts += [f"{name} {usual[name]}" for name in ("within_block", "allocation") if name in usual]
    parts += [str(usual[name]) for name in ("dtype",) if name in usual]
    parts += [
        _word(name, value, names)
        for name, value in usual.items()
        if name not in (*_IN_CAPTION, "model_revision") and value != _OPTIONS[name].value
    ]
    return parts


def _range(numbers: Sequence[int]) -> str:
    between = "or" if len(numbers) == 2 else "to"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} {between} {numbers[-1]}"


def legend_of(
    tables: Sequence[Table], marks: set[str], scores: Sequence[str], names: Names, *, full: bool
) -> list[str]:
    """Return what the marks and names mean.

    Args:
        tables: What is shown.
        marks: The marks of the rows that are shown.
        scores: The texts of their scores.
        names: Short names.
        full: Whether to add the options that no row shows, and the ids of tasks.
    """
    parts = ["* best"] if "*" in marks else []
    parts += ["~ within noise of it (2 standard errors)"] if "~" in marks else []
    parts += stale_texts(tables)
    if any("±" in text for text in scores):
        of_documents = any("%" in text for text in scores)
        parts.append("± std over seeds" + (", of one: over documents" if of_documents else ""))
    if any(table.has_bench for table in tables):
        parts.append("bytes, decode, prefill: beside dense")
    if any(table.has_sizes for table in tables):
        parts.append("size: bytes beside dense in 16 bits, computed")
    means = [mean for table in tables for mean in task_means(table.cells)]
    parts += dict.fromkeys(f"{mean.title} = mean of {mean.words}" for mean in means)
    folded = {column.partition(" ")[2] for mean in means for column in mean.columns}
    members = member_columns(cell for table in tables for cell in table.cells)
    folded |= {column.partition(" ")[2] for column in members}
    shortened = [*names.protocols.items(), *names.methods.items()]
    parts += [f"{short} = {long}" for long, short in shortened
              if short != long and (full or long not in folded)]  # fmt: skip
    if any(f"/{DATA}" in protocol for protocol in names.protocols):
        parts.append(f"{DATA}HASH: scored on other tokens or documents, so never ranked together")
    parts += [f"calibration {s} = {long}" for long, s in names.texts.items() if s != long]
    if full:
        parts += [
            f"{who} where it says nothing else: {words}" for who, words in usual_texts(tables)
        ]
    return parts
