"""docs/findings.md: its tables say what the committed results and samples say."""

import functools
import re
import statistics
import tomllib
from collections import defaultdict
from pathlib import Path

from prunebench.options import options_of
from prunebench.results.paired import pair, read_sides
from prunebench.results.store import ResultStore
from prunebench.spec import RunSpec

ROOT = Path(__file__).parent.parent
FINDINGS = (ROOT / "docs" / "findings.md").read_text("utf-8")


@functools.cache
def committed() -> list:
    """Return the committed results."""
    return ResultStore(ROOT / "results").read()[0]


def groups() -> dict[tuple, list]:
    """Return the committed results, those that differ only in seed together."""
    grouped = defaultdict(list)
    for result in committed():
        cell = {name for name, option in options_of(RunSpec).items() if option.about.cell}
        spec = result.spec.model_dump(include=cell - {"method_options"})
        options = {key: value for key, value in result.method.options.items() if key != "seed"}
        texts = {score.protocol for score in result.scores if score.metric == "token_ppl"}
        for text in texts:
            grouped[(text, str(spec), str(options))].append(result)
    return grouped


def spread_of(protocol: str, results: list) -> tuple[float, float | None]:
    """Return mean and standard deviation of a perplexity over seeds, one result each."""
    values = {
        result.spec.seed: score.value
        for result in sorted(results, key=lambda result: result.created_at)
        for score in result.scores
        if (score.protocol, score.metric) == (protocol, "token_ppl")
    }
    several = statistics.stdev(values.values()) if len(values) > 1 else None
    return statistics.fmean(values.values()), several


RECOVERED = "43bce88c-20261129T094744Z-bef5b46a"


def paired_differences() -> dict[str, tuple[float, float, float]]:
    """Return the recovered model against each with 500 questions: points, error, corrected p."""
    store = ResultStore(ROOT / "results")
    (recovered, _) = read_sides(store.find(RECOVERED))
    differences = {}
    for path in sorted((ROOT / "results" / "smollm2-135m-q4").glob("*/*.samples.jsonl")):
        name = path.name.removesuffix(".samples.jsonl")
        side, _ = read_sides(store.find(name))
        if not any(protocol.endswith("/first-500") for protocol, _, _ in side.items):
            continue
        if name != RECOVERED:
            (acc, _) = pair(recovered, side).pooled
            differences[name] = (100 * acc.difference, 100 * acc.stderr, acc.p_holm)
    return differences


def test_the_paired_differences_of_the_findings_are_those_of_the_samples():
    rows = dict(re.findall(r"^\| ([^|]+) \| ([+-][\d.]+ ± [\d.]+ \| [\d.]+) \|$", FINDINGS, re.M))
    assert len(rows) == 4
    found = {f"{d:+.1f} ± {e:.1f} | {p:.2g}" for d, e, p in paired_differences().values()}
    assert set(rows.values()) <= found


def test_the_table_of_rounding_is_what_was_measured():
    text = (ROOT / "prunebench" / "results" / "rounding.toml").read_text("utf-8")
    columns = {row["method"]: row for row in tomllib.loads(text)["measured"]}
    lines = FINDINGS.splitlines()
    start = lines.index("| | magnitude | Wanda | SparseGPT | ALPS |")
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[start : start + 9]]
    for name, _, *values, agreement in zip(*cells, strict=True):
        measured = columns[name.lower()]
        assert values == [f"{value:,.2f}" for value in measured["values"]]
        assert float(agreement.rstrip("%")) == round(100 * measured["least_mask_agreement"], 2)


def test_the_table_of_wikitext2_is_what_was_scored():
    scored, beside_dense = set(), set()
    for score in (score for result in committed() for score in result.scores):
        for value in (score.value, score.dense_value):
            ratio = f"{value / score.dense_value:#.3g}"
            if score.protocol == "wikitext2-raw/test/512/v1":
                scored.add((f"{value:#.4g}", ratio))
            elif score.protocol == "wiki-sample/held-out/512/v1":
                beside_dense.add(ratio)
    table = FINDINGS[FINDINGS.index("| | WikiText-2 |") :].split("\n\n")[0]
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.M)
    assert len(rows) == 6
    assert {(value, ratio) for value, ratio, _ in rows} <= scored
    assert {ratio for *_, ratio in rows} <= beside_dense


def test_the_numbers_of_the_findings_are_those_of_the_results():
    printed = set()
    for (protocol, *_), results in groups().items():
        mean, spread = spread_of(protocol, results)
        printed |= {f"{mean:.1f}", f"{mean:.2f}", f"{mean:,.0f}"}
        if spread is not None:
            printed |= {f"{mean:.1f} ± {spread:.1f}", f"{mean:,.0f} ± {spread:.0f}"}
            printed |= {f"{mean:,.0f} ± {round(spread, -1):.0f}"}
        for result in results:
            for score in result.scores:
                printed |= {f"{score.value:.1f}", f"{score.value:.2f}", f"{score.value:,.0f}"}
                printed |= {f"{score.dense_value:.2f}"}
                for value, error in (
                    (score.value, score.stderr),
                    (score.dense_value, score.dense_stderr),
                ):
                    printed |= {f"{100 * value:.1f}% ± {100 * (error or 0):.1f}"}
    printed |= {f"{d:.1f} ± {e:.1f}" for d, e, _ in paired_differences().values()}
    tables = [line for line in FINDINGS.splitlines() if line.startswith("| ")]
    numbers = [n for line in tables for n in re.findall(r"[\d,.]+%? ± [\d.]+", line)]
    assert len(numbers) > 20
    assert set(numbers) <= printed
    kept = re.findall(r"^\| (?:`|the preset).*? \| \**([\d.]+)\** \|", FINDINGS, re.MULTILINE)
    assert len(kept) == 12
    assert set(kept) <= printed
