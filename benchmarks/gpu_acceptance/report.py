"""`make gpu-acceptance-report`: a run against what is promised, as text or Markdown.

python3 -m benchmarks.gpu_acceptance.report OUT.json
python3 -m benchmarks.gpu_acceptance.report OUT.json --markdown
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_acceptance.promises import (
    Document,
    Row,
    Verdict,
    environment_of,
    rows_of,
    verdicts,
)

NOT_MEASURED = "not measured"
_PROMISED = ("what", "promised", "measured", "ratio", "")
_LAYERS = ("layer", "tokens", "backend", "of dense", "best launch", "TB/s")
_CASES = ("LLaMA-2-7B", "batch", "tokens", "storage", "of dense", "tokens/s")
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of a file; returns 2 where there is none."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_acceptance.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="OUT.json")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    try:
        document = json.loads(options.file.read_text("utf-8"))
        text = "\n".join(lines(document, markdown=options.markdown))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{options.file} is no run of make gpu-acceptance: {error!r}", file=sys.stderr)
        print("make one: python3 -m benchmarks.gpu_acceptance OUT.json", file=sys.stderr)
        return 2
    print(text)
    return 0


def lines(document: Document, *, markdown: bool = False) -> list[str]:
    """Return the report, line by line; what was not measured says so."""
    text = [*_machine(document), ""]
    for title, head, rows in _tables(document):
        if rows:
            text += ([f"## {title}", ""] if markdown else [title]) + (
                _markdown(head, rows) if markdown else _plain(head, rows)
            )
            text.append("")
    return text[:-1]


def fatal(document: Document) -> str:
    """Return why nothing could be measured; "" if something was."""
    rows = rows_of(document, "machine", "problem", fatal=True)
    return str(next((row["why"] for row in rows), ""))


def is_whole(document: Document) -> bool:
    """Return whether every part has ended by itself, no step of it failed, and all checks hold."""
    states = {entry["state"] for entry in document["parts"]}
    kinds = {row["row"] for entry in document["parts"] for row in entry["rows"]}
    return states == {"done"} and "failed" not in kinds and not _wrong(document)


def _machine(document: Document) -> list[str]:
    place = environment_of(document)
    gpu = place.get("gpu") or place.get("device") or "no device"
    versions = ", ".join(
        f"{name} {place.get(name) or 'none'}"
        for name in ("torch", "cuda", "cusparselt", "triton", "transformers")
    )
    dry = ", a dry run: no speed is measured" if document["dry"] else ""
    text = [f"{gpu}, {versions}", f"{document['created_at']}, {document['seconds']:.0f} s{dry}"]
    clocks = {row["when"]: row for kind in ("machine", "after")
              for row in rows_of(document, kind, "clocks")}  # fmt: skip
    for when in ("before", "after"):
        if clock := clocks.get(when, {}).get("clocks.sm"):
            text.append(f"clocks {when}: {clock}, {clocks[when].get('temperature.gpu')} C")
    for row in rows_of(document, "machine", "ceiling"):
        rate = row.get("bytes_per_second")
        text.append(
            f"{row['what']}: "
            + (f"{rate / 1e12:.2f} TB/s" if rate else f"{row['flops'] / 1e12:.0f} TFLOP/s")
        )
    problems = rows_of(document, "machine", "problem")
    return text + [f"problem: {row['why']}: {row['costs']}" for row in problems]


def _tables(document: Document) -> list[Table]:
    return [
        ("Promises", _PROMISED, [_promise(verdict) for verdict in verdicts(document)]),
        ("Why not", ("", "why", "promise"), _reasons(document)),
        ("Parts", ("part", "ended", "seconds", "limit", "why"), _parts(document)),
        ("What failed or was left out", ("part", "step", "why"), _failed(document)),
        ("Checks that do not hold", ("check", "value", "allowed"), _wrong(document)),
        ("CUDA graphs", ("backend", "tokens", "captured", "why"), _capture(document)),
        ("Layers", _LAYERS, _layers(document)),
        ("Whole model", _CASES, _cases(document)),
        ("Pruning", ("method", "sparsity", "2 blocks", "32 blocks"), _pruning(document)),
        ("Stages of pruning", ("stage", "ms"), _stages(document)),
        ("MaskLLM", ("variant", "windows", "of a dense step", "peak GB"), _maskllm(document)),
        ("Passes of MaskLLM", ("variant", "pass", "GB/s"), _passes(document)),
    ]


def _promise(verdict: Verdict) -> tuple[str, ...]:
    promise, ratio = verdict.promise, verdict.ratio
    measured = NOT_MEASURED if verdict.measured is None else f"{verdict.measured:.4g}"
    state = "" if verdict.state == NOT_MEASURED else verdict.state
    sign = {"at least": ">=", "at most": "<="}[promise.goal]
    shown = "" if ratio is None else f"{ratio:.2f}"
    return promise.title, f"{sign} {promise.limit:g}", measured, shown, state


def _reasons(document: Document) -> list[tuple[str, ...]]:
    """Return why promises were not measured or are not asked for, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts(document):
        if verdict.why:
            reasons.setdefault((verdict.state, verdict.why), []).append(verdict.promise.name)
    return [
        (state, why, ", ".join(names) if len(names) < 4 else f"{len(names)} of them")
        for (state, why), names in reasons.items()
    ]


def _parts(document: Document) -> list[tuple[str, ...]]:
    return [
        (
            entry["name"], entry["state"], f"{entry['seconds']:.0f}", f"{entry['limit']:.0f}",
            entry["why"],
        )
        for entry in document["parts"]
    ]  # fmt: skip


def _failed(document: Document) -> list[tuple[str, ...]]:
    return [
        (entry["name"], row["step"], row["why"])
        for entry in document["parts"]
        for row in entry["rows"]
        if row["row"] in ("failed", "skipped", "context lost")
    ]


def _wrong(document: Document) -> list[tuple[str, ...]]:
    rows = rows_of(document, "correct", "check", holds=False)
    return [
        (row["what"], f"{row['value']:.3g}", f"{row['goal']} {row['allowed']:.3g}") for row in rows
    ]


def _capture(document: Document) -> list[tuple[str, ...]]:
    names = {True: "yes", False: "NO", None: "cannot run"}
    return [
        (row["backend"], str(row["tokens"]), names[row["works"]], row["why"])
        for row in rows_of(document, "capture", "capture")
    ]


def _layers(document: Document) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for part in ("decode", "prefill"):
        for row in rows_of(document, part, "layer"):
            name = f"{row['rows']} x {row['width']}"
            name += f", tiles of {row['tile_rows']}" if row["tile_rows"] else ""
            backend = "WRONG NUMBERS" if not row["numerics_hold"] else row["backend"] or "none"
            if row["dense"] == "dense, max-autotune":
                backend += " against max-autotune"
            rate = row["bytes_per_second"]
            speed = f"{rate / 1e12:.2f}" if rate else ""
            speed += ", from the cache" if row["cache_suspected"] else ""
            rows.append((
                name, str(row["tokens"]), backend, _number(row["as_used"]),
                _spread(row["ratio"]), speed,
            ))  # fmt: skip
    return rows


def _cases(document: Document) -> list[tuple[str, ...]]:
    return [
        (
            row["case"], str(row["batch"]), str(row["context"]), row.get("storage", ""),
            _spread(row["ratio"]), _number(row.get("tokens_per_second"), ",.0f", missing=""),
        )
        for row in rows_of(document, "end-to-end", "case")
    ]  # fmt: skip


def _pruning(document: Document) -> list[tuple[str, ...]]:
    return [
        (
            row["method"], row["sparsity"], _number(row["seconds"], ".1f"),
            _number(row["of_all_blocks"], ".0f"),
        )
        for row in rows_of(document, "pruning", "pruning")
    ]  # fmt: skip


def _stages(document: Document) -> list[tuple[str, ...]]:
    rows = rows_of(document, "pruning", "stage")
    return [
        (row["stage"], _number(row["seconds"] and 1000 * row["seconds"], ".1f")) for row in rows
    ]


def _maskllm(document: Document) -> list[tuple[str, ...]]:
    return [
        (
            row["variant"], " x ".join(map(str, row["windows"])), _number(row["of_a_dense_step"]),
            _number(_gigabytes(row["memory"].get("peak")), ".1f"),
        )
        for row in rows_of(document, "maskllm", "step")
    ]  # fmt: skip


def _passes(document: Document) -> list[tuple[str, ...]]:
    return [
        (row["variant"], row["name"], _number(_gigabytes(row["bytes_per_second"]), ".0f"))
        for row in rows_of(document, "maskllm", "pass")
    ]


def _gigabytes(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def _number(value: float | None, kind: str = ".2f", *, missing: str = NOT_MEASURED) -> str:
    return missing if value is None else format(value, kind)


def _spread(ratio: Row | None) -> str:
    if ratio is None:
        return NOT_MEASURED
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _plain(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  " + "  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table: list[Sequence[Any]] = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]


if __name__ == "__main__":
    sys.exit(main())
