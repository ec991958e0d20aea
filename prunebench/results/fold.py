"""Seeds folded into mean and deviation, the best of a sparsity, and what equals it in effect.

Two scores are the same within noise where their means differ by at most two standard errors of
what is known to vary: the seeds, or, of an accuracy of a single seed, the documents; of a
perplexity also rounding, where it was measured. A perplexity of a single seed is taken to vary as
its rivals do over their seeds. Perplexities are compared as mean losses: they are exponentials, and
their tails are heavy.

A protocol names a text, not its tokens: two folders that share a name may have two tokenizers. What
was scored on other tokens is then another column, and never a rival. Nor are other weights under
one name: their dense model is another.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prunebench.results.cell_score import NOISE_STANDARD_ERRORS
from prunebench.results.names import short_text
from prunebench.results.rounding import rounding_of
from prunebench.results.shown_options import default_options
from prunebench.spec import NO_RECOVERY

if TYPE_CHECKING:
    from pandas import DataFrame, Series

_SCORE = ["cell", "metric", "protocol"]
_RIVALS = ["model", "model_revision", "target", "metric", "protocol"]
DATA = "data-"
"""Before the hash in the name of a column whose protocol was scored on several data."""
_OF_CELL = ["model", "method", "target", "sparsity", "dtype", "model_revision"]
_MEASURED = {
    "allocation": "uniform", "recover": NO_RECOVERY, "within_block": "joint", "calibration": "c4",
    "seqlen": "512", "calibration_bos": "text",
}  # fmt: skip
"""The settings that rounding was measured with, beside those of its table and the options."""
_LEAST_RIVALS = 3
"""Of fewer a median deviation says little."""
_OF_ROUNDING = [*_MEASURED, "method_options", "calibration_samples"]


def fold_scores(frame: DataFrame) -> DataFrame:
    """Return one row a cell, metric and protocol, cells in the order of their first run.

    Columns: those of `CellScore`, and `cell`, `model`, `method`, `target`, `sparsity`, `dtype`,
    `model_revision`, `protocol`.

    Args:
        frame: Scores, as `load_results` gives them.
    """
    counted = frame[frame["newest"]].copy()
    counted["protocol"] = _protocols(counted)
    counted["loss"] = _losses(counted)
    counted["is_stale"] = counted["stale"].notna()
    groups = counted.groupby(_SCORE, sort=False)
    scores = groups.agg(
        **{name: (name, "first") for name in (*_OF_CELL, *_OF_ROUNDING)},
        values=("value", tuple),
        mean=("value", "mean"),
        std=("value", "std"),
        seeds=("value", "size"),
        finite=("value", "count"),
        dense=("dense", "mean"),
        stderr=("stderr", "mean"),
        dense_stderr=("dense_stderr", "mean"),
        higher_is_better=("higher_is_better", "first"),
        member_of=("member_of", "first"),
        loss=("loss", "mean"),
        loss_std=("loss", "std"),
        stale=("is_stale", "any"),
    ).reset_index()
    # pandas leaves a NaN out of a mean: one seed that gave NaN would be as if it had not been run
    scores.loc[scores["finite"] < scores["seeds"], ["mean", "loss"]] = float("nan")
    rounding = [_rounding(row) for row in scores.to_dict("records")]
    scores["known_std"] = _known_deviations(scores, rounding)
    scores["error"] = _errors(scores)
    scores = scores.drop(columns=_OF_ROUNDING)
    return _with_best(scores)


def fold_dense(scores: DataFrame) -> DataFrame:
    """Return the dense model's scores by model, dtype and revision, from what all runs measured.

    Every run scores its dense model too, so a dense row needs no run of its own; where there is
    one, its values count.
    """
    measured = scores[scores["dense"].notna()]
    # False sorts before True: a run of the dense model itself is first
    own_first = measured.sort_values("method", key=lambda method: method != "dense", kind="stable")
    rows = own_first.drop_duplicates(["model", "dtype", "model_revision", "metric", "protocol"])
    return rows.assign(
        method="dense", sparsity="0", target="0", values=rows["dense"].map(lambda value: (value,)),
        mean=rows["dense"], std=float("nan"), stderr=rows["dense_stderr"], seeds=1,
        best=False, within_noise=False,
    )  # fmt: skip


def fold_runs(frame: DataFrame) -> DataFrame:
    """Return one row a cell: its settings, and the cost, devices and bench of its runs.

    Seconds are medians: a run beside other work may take ten times as long, and a mean
    would tell of that work. Bytes and speed are those of the newest run that has a bench.
    """
    runs = frame.drop_duplicates("result_id")
    cells = runs.drop_duplicates("cell").set_index("cell")
    groups = runs.groupby("cell", sort=False)
    cells["realised_ratio"] = groups["realised_ratio"].mean()
    cells["removed_ratio"] = groups["removed_ratio"].mean()
    # of 16 seeds, one may have a zero more
    cells["size_bytes"] = groups["size_bytes"].median()
    cells["size_ratio"] = groups["size_ratio"].median()
    cells["prune_seconds"] = groups["prune_seconds"].median()
    cells["recover_seconds"] = groups["recover_seconds"].median()
    counted = frame[frame["newest"] & frame["stale"].notna()].drop_duplicates("cell")
    cells["stale"] = counted.set_index("cell")["stale"].reindex(cells.index)
    cells["devices"] = groups["device"].unique().map(_sorted_tuple)
    cells["threads"] = groups["cpu_threads"].unique().map(_sorted_tuple)
    cells["result_ids"] = groups["result_id"].unique().map(_sorted_tuple)
    benches = runs[runs["storage"].notna()].drop_duplicates("cell", keep="last").set_index("cell")
    for name in BENCH:
        cells[name] = benches[name].reindex(cells.index)
    return cells


def _sorted_tuple(values: Any) -> tuple[Any, ...]:
    return tuple(sorted(values.tolist()))


BENCH = ("storage", "bytes_ratio", "decode_speedup", "prefill_speedup", "speed", "gpu")


def _protocols(counted: DataFrame) -> Series:
    """Return the protocols; with the hash of the data where a model has several under one."""
    groups = counted.groupby(["model", "metric", "protocol"], sort=False)
    several = groups["tokens_sha256"].transform("nunique") > 1
    named = counted["protocol"] + f"/{DATA}" + counted["tokens_sha256"].str[:8]
    return counted["protocol"].where(~several, named)


def _losses(counted: DataFrame) -> Series:
    """Return the values as they are compared: of a perplexity the logarithm."""
    import numpy as np

    # a value of 0 or less has no logarithm; then no seed of its cell is taken as one
    smallest = counted.groupby(_SCORE, sort=False)["value"].transform("min")
    logarithmic = counted["metric"].str.endswith("_ppl") & (smallest > 0)
    positive = counted["value"].where(logarithmic.astype(bool), 1.0)
    return counted["value"].where(~logarithmic.astype(bool), np.log(positive))


def _errors(scores: DataFrame) -> Series:
    """Return the standard error of each mean loss; NaN where nothing is known to vary."""
    of_seeds = scores["loss_std"] / scores["seeds"] ** 0.5
    # the spread of a perplexity over windows is no noise: all rows have the same windows
    of_documents = scores["stderr"].where(scores["higher_is_better"])
    errors = of_seeds.where(scores["seeds"] > 1, of_documents)
    # each seed was rounded in one way: seeds that happen to agree do not make that smaller
    least = scores["known_std"] / scores["seeds"] ** 0.5
    return errors.where(~(least > errors.fillna(-1.0)), least)


def _known_deviations(scores: DataFrame, rounding: list[float | None]) -> Series:
    """Return the least deviation of each log perplexity; NaN where nothing is known of it.

    That of rounding; of a single seed at least that of its rivals over their seeds, the median,
    for a model that broke varies as no other does.
    """
    import pandas as pd

    perplexity = scores["metric"].str.endswith("_ppl")
    # a method without data has the same values for all seeds, which says nothing of the others
    seeded = scores[perplexity & ~scores["stale"].astype(bool) & (scores["loss_std"] > 0)]
    rivals = seeded.groupby(_RIVALS, dropna=False)["loss_std"].agg(["median", "size"]).reset_index()
    rivals = rivals[rivals["size"] >= _LEAST_RIVALS]
    of_rivals = scores[_RIVALS].merge(rivals, how="left", on=_RIVALS)["median"]
    of_rivals = of_rivals.set_axis(scores.index)
    single = perplexity & (scores["seeds"] == 1)
    of_rounding = pd.Series(rounding, index=scores.index, dtype="float64")
    return pd.concat([of_rounding, of_rivals.where(single)], axis=1).max(axis=1)


def _rounding(score: dict[Any, Any]) -> float | None:
    """Return the deviation of a loss by rounding; None where it was not measured."""
    import pandas as pd

    if not score["metric"].endswith("_ppl") or str(score["dtype"]) != "float32":
        return None
    # a method that has no use for a setting has NA
    known = {name: value for name in _MEASURED if not pd.isna(value := score[name])}
    if any(short_text(str(value)) != _MEASURED[name] for name, value in known.items()):
        return None
    options = json.loads(score["method_options"])
    defaults = default_options("method", score["method"], options)
    if not options.items() <= defaults.items():
        return None
    samples = str(score["calibration_samples"])
    count = int(samples) if samples.isdecimal() else None
    return rounding_of(score["model"], score["method"], score["target"], count)


def _with_best(scores: DataFrame) -> DataFrame:
    """Mark the best of the pruned rows of each sparsity, and those that equal it in effect."""
    import numpy as np

    rivals = scores[scores["method"] != "dense"]
    turned = rivals["mean"].where(~rivals["higher_is_better"], -rivals["mean"])
    # what nobody can measure again is not the best, nor is a model that broke
    sound = np.isfinite(turned) & ~rivals["stale"].astype(bool)
    # stable, and the first of equals is kept: of two equal values only the first is the best
    best = rivals.assign(turned=turned)[sound].sort_values("turned", kind="stable")
    best = best.drop_duplicates(_RIVALS)
    top = rivals[_RIVALS].merge(best[[*_RIVALS, "loss", "error"]], on=_RIVALS, how="left")
    top.index = rivals.index
    several = rivals.groupby(_RIVALS)["cell"].transform("size") > 1
    both = np.hypot(rivals["error"].fillna(0.0), top["error"].fillna(0.0))
    near = (rivals["loss"] - top["loss"]).abs() <= NOISE_STANDARD_ERRORS * both
    # perplexities of a single seed: nothing is known to vary, so no tie is claimed
    near &= rivals["error"].notna() | top["error"].notna()
    is_best = rivals.index.isin(best.index)
    scores["best"] = (several & is_best).reindex(scores.index, fill_value=False)
    within = several & near & ~is_best
    scores["within_noise"] = within.reindex(scores.index, fill_value=False)
    return scores
