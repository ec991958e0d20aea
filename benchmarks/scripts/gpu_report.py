"""`make bench-gpu-report`: the JSON of `make bench-gpu` as a table, against what is promised."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fixtures.shaped import LLAMA2_7B
from prunebench.bench.shapes import (
    END_TO_END,
    MENDED_LIBRARY,
    RESIDENT,
    Promise,
    promise,
)

NOT_MEASURED = "not measured"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of a file; returns 2 where there is none."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    path = Path(words[0]) if words else Path("benchmarks/gpu.json")
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        print(f"{path} cannot be read: {error}; run make bench-gpu first", file=sys.stderr)
        return 2
    print("\n".join(lines(document)))
    return 0


def lines(document: dict[str, Any]) -> list[str]:
    """Return the report, line by line; what was not measured says so."""
    place = document["environment"]
    text = [
        f"{place['gpu'] or place['device']}, torch {place['torch']}, CUDA {place['cuda']}, "
        f"cuSPARSELt {place['cusparselt']}, triton {place['triton']}",
        f"speed: {document.get('speed', NOT_MEASURED)}; {document.get('seconds', 0):.0f} s in all",
        *(f"warning: {warning}" for warning in place.get("warnings", [])),
        "",
    ]
    text += [f"{name}: {state}" for name, state in dict(document.get("capture") or {}).items()]
    text += ["", _HEAD]
    library = place["cusparselt"]
    text += [_layer(row, library) for row in document.get("layers", [])]
    return [*text, "", *_model(document.get("model") or {}, library)]


_HEAD = f"{'layer':<28}{'shape':>15}{'tokens':>8}  {'times dense':<34}{'TB/s':>6}  how"


def _layer(row: dict[str, Any], library: int | None) -> str:
    shape = f"{row['rows']} x {row['width']}"
    start = f"{row['model'] + ' ' + row['layer']:<28}{shape:>15}{row['tokens']:>8}  "
    if "skipped" in row:
        return f"{start}{NOT_MEASURED}: {row['skipped']}"
    if not row["numerics_hold"]:
        return f"{start}WRONG NUMBERS: {row['errors']}"
    promised = promise(row["rows"], row["width"], row["tokens"], library)
    rate = row["bytes_per_second"]
    speed = f"{rate / 1e12:.2f}" if rate else "-"
    how = f"{row['backend']} {row['chosen']} against {row['dense']}".rstrip()
    if row["cache_suspected"]:
        how += "; the cache was measured"
    return f"{start}{_ratio(row['ratio'], promised):<34}{speed:>6}  {how if row['ratio'] else ''}"


def _ratio(ratio: dict[str, Any] | None, promised: Promise | None) -> str:
    """Return `1.47 (1.45-1.49) target 1.45 held`."""
    if ratio is None:
        return NOT_MEASURED
    text = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return f"{text} {_verdict(ratio['median'], promised)}".rstrip()


def _verdict(value: float, promised: Promise | None) -> str:
    if promised is None:
        return ""
    if value >= promised.target:
        return f"target {promised.target:.2f} held"
    if value >= promised.floor:
        return f"under target {promised.target:.2f}"
    return f"UNDER FLOOR {promised.floor:.2f}"


def _model(model: dict[str, Any], library: int | None) -> list[str]:
    if "error" in model or not model:
        return [f"model: {NOT_MEASURED}: {model.get('error', 'no time left')}"]
    ratio = model["resident_ratio"]
    held = ""
    if model["shape"]["width"] == LLAMA2_7B.width:
        held = ", held" if ratio <= RESIDENT.target else f", over {RESIDENT.target}"
    rows = [
        f"model of {model['shape']['layers']} layers, width {model['shape']['width']}",
        f"weights: {model['stored_bytes']:,} of {model['dense_bytes']:,} bytes ({ratio:.4f}{held})",
        f"logits differ by {model['logits_error']:.2e}, "
        f"{model['same_greedy_tokens']:.0%} of greedy tokens are the same",
    ]
    for case in model["cases"]:
        start = f"{case['case']}, batch {case['batch']}, {case['context']} tokens"
        start += ", storage speed" if case.get("storage") == "speed" else ""
        if "skipped" in case:
            rows.append(f"{start}: {NOT_MEASURED}: {case['skipped']}")
            continue
        promised = _promised(case, library)
        rate = case.get("tokens_per_second")
        tail = f", {rate:,.0f} tokens/s" if rate else ""
        rows.append(f"{start}: {_ratio(case['ratio'], promised)}{tail}")
    return rows


def _promised(case: dict[str, Any], library: int | None) -> Promise | None:
    """Return what a case of one sequence should reach; prefill only with a mended cuSPARSELt."""
    if case["batch"] != 1 or (case["case"] == "decode" and case["context"] != 128):
        return None
    if case["case"] == "decode":
        return END_TO_END["decode"]
    mended = case.get("storage") == "speed" and (library or 0) >= MENDED_LIBRARY
    return END_TO_END["prefill"] if mended else None


if __name__ == "__main__":
    sys.exit(main())
