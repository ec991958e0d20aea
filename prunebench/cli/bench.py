"""`prunebench bench`: quality, bytes and speed of a pruned checkpoint, beside the dense model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunebench.cli.console import print_columns, print_hanging, terminal_width
from prunebench.cli.exit_codes import command_line, say
from prunebench.cli.fitting import hanging
from prunebench.cli.progress import choose_progress
from prunebench.cli.summary import full_protocol, short_title
from prunebench.errors import UsageError, nearest
from prunebench.results.bench_schema import Bench, write_bench
from prunebench.results.render import number, value_text
from prunebench.results.store import ResultStore

if TYPE_CHECKING:
    from prunebench.sparse24.layer import Explained

_STORAGE = ("memory", "speed")


def bench_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT|RUN",
            help="Folder of a pruned model (plain, packed24 or sparse-24-bitmask), or the id of a "
            "result whose weights were saved.",
        ),
    ],
    vs: Annotated[
        str, typer.Option(help="What it is compared with: dense, the same weights unpacked.")
    ] = "dense",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[
        str | None,
        typer.Option(help="triton, cslt, cpu, decompress or reference. (default: the fastest)"),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            help="memory keeps one form of a layer (0.5625); speed may keep cuSPARSELt's beside it."
        ),
    ] = "memory",
    grid: Annotated[
        bool,
        typer.Option("--grid", help="Measure layers of LLaMA-2-7B, OPT-175B and BLOOM-176B too."),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Only print which backend runs each layer, why, and why not the others.",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON there.")
    ] = None,
    results_dir: Annotated[
        Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
    ] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure a pruned checkpoint against the dense model: quality, bytes and speed.

    Speed is measured on a GPU, or on a CPU with a C++ compiler; elsewhere bytes are computed. The
    bench of a checkpoint that has a result in the results folder is saved beside it; compare shows
    both in one row.
    """
    if vs != "dense":
        raise UsageError(f"--vs {vs!r} is not known", fix="use --vs dense")
    if storage not in _STORAGE:
        raise UsageError(f"--storage {storage!r} is not known", fix=nearest(storage, _STORAGE))
    progress = choose_progress(quiet=quiet)
    with progress.stage("start", detail="loading torch and transformers"):
        from prunebench.bench.bench import (
            BenchSetup,
            bench,
            explain_checkpoint,
        )
        from prunebench.checkpoints.find import find_checkpoint
        from prunebench.models.device import choose_device
        from prunebench.sparse24.backends.table import require_backend
    store = ResultStore(results_dir)
    folder, result = find_checkpoint(checkpoint, store)
    place = choose_device(device)
    if backend is not None:
        require_backend(backend, place)
    setup = BenchSetup(
        folder, result, place, backend, storage == "speed", grid, command_line(), progress
    )
    if explain:
        _print_explained(explain_checkpoint(setup), as_json=as_json)
        return
    report = bench(setup)
    saved_path = None
    # a checkpoint carries its result; it is filed only if the results folder has that result, too
    if result is not None and (path := store.path_of(result)).is_file():
        saved_path = write_bench(path, report)
    if output is not None:
        from prunebench.files import write_text

        write_text(output, report.model_dump_json(indent=1) + "\n")
    if as_json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        _print_summary(report, result, saved_path)


def _print_summary(report: Bench, result: Any, saved_path: Path | None) -> None:
    title = report.checkpoint
    if result is not None:
        title = f"{result.spec.method} {result.spec.sparsity} on {result.spec.model}, {title}"
    typer.echo(title)
    if not report.quality:
        typer.echo("  quality: unknown, the folder holds no result")
    for score in report.quality:
        dense = ""
        if score.dense_value:
            ratio = number(score.value / score.dense_value)
            dense = f"  (dense {value_text(score.metric, score.dense_value)}, {ratio}x)"
        line = f"{short_title(score)}  {value_text(score.metric, score.value)}{dense}"
        print_hanging("  ", line + full_protocol(score))
    if result is not None and result.sparsity and result.sparsity.removal:
        _print_removal(result)
    for line in _storage_lines(report):
        typer.echo(line)
    if report.layers:
        scored = f", scored in {result.model.dtype}" if result and result.model else ""
        typer.echo(f"  speed, measured in {report.environment['dtype']}{scored}")
        _print_layers(report)
    if report.speed == "measured":
        _print_cases(report)
    else:
        print_hanging("  speed: ", report.speed)
    for warning in report.environment["warnings"]:
        say(f"warning: {warning}")
    if saved_path:
        typer.echo(f"  saved to {saved_path}")


def _print_removal(result: Any) -> None:
    removal, parameters = result.sparsity.removal, result.model.parameters
    left = parameters - removal.removed_parameters
    text = (
        f"{len(removal.blocks)} of {removal.blocks_before} blocks were removed, "
        f"{left / parameters:.2%} of the dense model's parameters are left: bytes and speed below "
        "are of what is left"
    )
    print_hanging("  ", text)


def _storage_lines(report: Bench) -> list[str]:
    store = report.storage
    lines = [f"  bytes, dense       {store.dense_bytes:>15,}  1.0000  computed"]
    forms = [("2:4 packed", store.packed24_bytes), ("bitmap", store.bitmap_bytes)]
    for name, size in forms:
        if size is not None and size < store.dense_bytes:
            saved = store.dense_bytes - size
            alone = (store.pruned_bytes - saved) / store.pruned_bytes
            start = f"  bytes, {name:<11} {size:>15,}  {size / store.dense_bytes:.4f}  "
            text = f"computed; pruned alone {alone:.4f}"
            lines += hanging(start, text, terminal_width())
    if report.resident_bytes is not None:
        share = report.resident_bytes / store.dense_bytes
        lines.append(f"  bytes, in memory   {report.resident_bytes:>15,}  {share:.4f}  measured")
    return lines


def _print_layers(report: Bench) -> None:
    titles = ("layer", "shape", "tokens", "times dense", "spread", "TB/s", "dense", "backend")
    rows = []
    for layer in report.layers:
        ratio, rate = layer["ratio"], layer["bytes_per_second"]
        cache = " (cache!)" if layer["cache_suspected"] else ""
        rows.append(
            [
                f"{layer['model']} {layer['layer']}",
                f"{layer['rows']} x {layer['width']}",
                f"{layer['tokens']:,}",
                f"{ratio['median']:.2f}" if ratio else "-",
                f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "-",
                f"{rate / 1e12:.2f}{cache}" if rate else "-",
                layer["dense"] or "-",
                layer["backend"] or "-",
            ]
        )
    print_columns(titles, rows, right=titles[1:7])


def _print_cases(report: Bench) -> None:
    for case in report.cases:
        where = f"  {case['case']}, batch {case['batch']}, {case['context']:,} tokens"
        ratio = case["ratio"]
        if ratio is None:
            print_hanging(f"{where}: ", f"not measured: {case['skipped']}")
            continue
        rate = case["tokens_per_second"]
        typer.echo(
            f"{where}: {ratio['median']:.2f} times dense ({ratio['low']:.2f}-{ratio['high']:.2f})"
            + (f", {rate:,.0f} tokens/s" if rate else f", {case['packed_seconds'] * 1e3:.1f} ms")
        )


def _print_explained(rows: list[Explained], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    for layers, shape, text in _alike(rows):
        print_hanging("", f"{', '.join(layers)}  {shape}")
        for prefix, reason in text:
            print_hanging(prefix, reason)
    typer.echo("* is the number of a block; --json lists every layer by itself")


def _alike(rows: list[Explained]) -> list[tuple[list[str], str, list[tuple[str, str]]]]:
    """Group layers of one shape that run alike; names have `*` for blocks that are all alike."""
    explained: dict[str, list[Explained]] = {}
    for row in rows:
        explained.setdefault(row.layer, []).append(row)
    groups: dict[str, tuple[list[str], str, list[tuple[str, str]]]] = {}
    for layer, of_layer in explained.items():
        lines = _explain_lines(of_layer)
        shape = " x ".join(map(str, of_layer[0].shape)) if of_layer[0].tokens else ""
        groups.setdefault(f"{shape} {lines}", ([], shape, lines))[0].append(layer)
    starred = {layer: re.sub(r"(?<=\.)\d+(?=\.)", "*", layer) for layer in explained}
    # a name whose blocks are not all in one group is no name of this group
    homes: dict[str, set[str]] = {}
    for key, (layers, _, _) in groups.items():
        for layer in layers:
            homes.setdefault(starred[layer], set()).add(key)
    return [
        (
            list(
                dict.fromkeys(
                    starred[layer] if len(homes[starred[layer]]) == 1 else layer for layer in layers
                )
            ),
            shape,
            lines,
        )
        for layers, shape, lines in groups.values()
    ]


def _explain_lines(rows: list[Explained]) -> list[tuple[str, str]]:
    """Return prefix and text of each line; sizes of a batch that run alike share one."""
    tokens: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        key = (row.backend or "", row.why, *(f"{k}: {why}" for k, why in row.why_not.items()))
        tokens.setdefault(key, []).append(row.tokens)
    lines = []
    for (backend, why, *others), sizes in tokens.items():
        if not sizes[0]:
            lines.append(("  dense: ", why))
            continue
        lines.append(
            (f"  {', '.join(f'{size:,}' for size in sizes)} tokens: ", f"{backend}, {why}")
        )
        lines += [("    not ", other) for other in others]
    return lines
