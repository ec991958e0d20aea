"""`make gpu-acceptance`: a part that fails costs its own figures; nothing unmeasured is claimed."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_acceptance import __main__ as command
from benchmarks.gpu_acceptance import document as documents
from benchmarks.gpu_acceptance import report
from benchmarks.gpu_acceptance.child import recorder
from benchmarks.gpu_acceptance.parts import machine
from benchmarks.gpu_acceptance.plan import BUDGET, LEAST, PARTS, Part
from benchmarks.gpu_acceptance.promises import PROMISES, failures, rows_of, verdicts
from benchmarks.gpu_acceptance.record import Recorder, read_log
from benchmarks.gpu_acceptance.runner import Run
from prunebench.sparse24 import policy as policies
from prunebench.sparse24.policy import Policy

ROOT = Path(__file__).parents[2]
CHILD = (sys.executable, "-m", "tests.bench.gpu_child")
# What a machine with a GPU has: torch, triton, transformers, and wheels that are carried.
MISSING = ("lm_eval", "datasets", "accelerate", "pandas", "gguf", "submitit", "ray", "altair")
BLOCK = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.split(".")[0] in {MISSING!r} else find(name, path, target)
PathFinder.find_spec = staticmethod(find_others)
"""


def run(tmp_path, *names, budget=60.0, seconds=20.0, dry=False):
    parts = [Part(name, name, seconds, f"tests.bench.gpu_child:{name}") for name in names]
    said = []
    here = Run(tmp_path / "out.json", budget=budget, child=CHILD, say=said.append, dry=dry)
    document = here.parts(parts)
    assert json.loads((tmp_path / "out.json").read_text()) == document
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    return {part["name"]: part for part in document["parts"]}


# ---------------------------------------------------------------- the runner


def test_a_part_that_crashes_or_loses_its_context_costs_its_own_figures(tmp_path):
    parts = run(tmp_path, "fine", "crash", "step_that_fails", "lose_the_context")
    assert {name: part["state"] for name, part in parts.items()} == {
        "fine": "done", "crash": "crashed", "step_that_fails": "done",
        "lose_the_context": "context lost",
    }  # fmt: skip
    assert "status 1" in parts["crash"]["why"]
    values = {
        name: [row["value"] for row in part["rows"] if row["row"] == "value"]
        for name, part in parts.items()
    }
    assert values == {
        "fine": [1.5], "crash": [2.5], "step_that_fails": [4.5], "lose_the_context": [5.5],
    }  # fmt: skip
    failed = {"row": "failed", "step": "wrong", "why": "ValueError: no algorithm"}
    assert failed in parts["step_that_fails"]["rows"]
    assert "illegal memory access" in parts["lose_the_context"]["why"]


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_at_its_limit_and_the_next_one_runs(tmp_path):
    start = time.perf_counter()
    parts = run(tmp_path, "hang", "fine", seconds=8.0)
    assert parts["hang"]["state"] == "out of time"
    assert parts["hang"]["rows"] == [{"row": "value", "value": 3.5}]
    assert parts["fine"]["state"] == "done"
    assert time.perf_counter() - start < 60


def test_a_run_without_a_gpu_says_so_once_and_starts_nothing_else(tmp_path):
    parts = run(tmp_path, "no_gpu", "fine")
    assert (parts["fine"]["state"], parts["fine"]["why"]) == ("not run", "no NVIDIA driver")


def test_no_part_is_started_when_the_budget_is_spent(tmp_path):
    parts = run(tmp_path, "fine", budget=LEAST / 2)
    assert parts["fine"]["why"] == "no time left in the budget"


def test_a_step_is_left_out_when_too_little_time_is_left(tmp_path):
    record = Recorder("x", tmp_path / "log", torch.device("cpu"), False, seconds=5.0)
    with record.step("long", need=60) as ready:
        assert not ready
    (row,) = read_log(tmp_path / "log")
    assert row["row"] == "skipped" and "it needs 60" in row["why"]


def test_rows_survive_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "log").write_text('{"part": "a", "row": "b"}\n{"part": "a", "ro')
    assert read_log(tmp_path / "log") == [{"part": "a", "row": "b"}]


def test_the_parts_fit_into_nine_minutes_and_exist():
    assert BUDGET <= 540
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert {promise.part for promise in PROMISES} <= {part.name for part in PARTS}


def test_exit_statuses(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as usage:
        command.main([str(tmp_path / "x.json"), "--only", "speed"])
    assert usage.value.code == 2 and "no part speed; machine, correct" in capsys.readouterr().err
    whole = {"stopped": False}
    runs = (
        (lost(), 3),
        (measured(**whole), 0),
        (measured(), 1),
        (measured(decode=1.2, **whole), 1),
    )
    for document, status in runs:
        monkeypatch.setattr(Run, "parts", lambda self, parts, document=document: document)
        assert command.main([str(tmp_path / "x.json")]) == status


# ---------------------------------------------------------------- the parts


SLOW = ("correct", "pruning", "maskllm")  # 3 to 13 s each
EVERY = [
    pytest.param(part, id=part.name, marks=[pytest.mark.slow] if part.name in SLOW else [])
    for part in PARTS
]


@pytest.mark.parametrize("part", EVERY)
def test_every_part_runs_dry_on_a_cpu(part, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "cache"))
    module, _, name = part.target.partition(":")
    record = recorder(part.name, tmp_path / "log", 600, dry=True)
    getattr(__import__(module, fromlist=[name]), name)(record)
    rows = read_log(tmp_path / "log")
    assert rows and not [row for row in rows if row["row"] in ("failed", "skipped", "problem")]
    assert all(row["holds"] for row in rows if row["row"] == "check")
    timed = [key for row in rows for key, value in row.items() if "second" in key and value]
    assert timed == [], "a dry run measures no speed"


@pytest.mark.slow
def test_the_parts_import_on_a_machine_with_torch_and_little_else():
    modules = sorted({part.target.partition(":")[0] for part in PARTS})
    code = BLOCK + f"import {', '.join(modules)}, benchmarks.gpu_acceptance.document\n"
    code += f"import importlib.util\nassert not any(map(importlib.util.find_spec, {MISSING!r}))\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_a_whole_dry_run_where_modules_are_missing(tmp_path):
    """Imports inside functions count, too: every process of the run is without these modules."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    out = tmp_path / "out" / "gpu.json"
    words = [sys.executable, "-m", "benchmarks.gpu_acceptance", str(out), "--dry"]
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    document = json.loads(out.read_text())
    assert done.returncode == 0, done.stderr
    assert {part["state"] for part in document["parts"]} == {"done"}
    assert done.stdout.count("not measured") >= len(PROMISES) and "held" not in done.stdout
    assert document["seconds"] < 60 or os.getloadavg()[0] > 1.5


# ---------------------------------------------------------------- what a machine lacks


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    return monkeypatch


def only(why, costs):
    (problem,) = machine.problems("", dry=False)
    assert why in problem["why"] and costs in problem["costs"] and not problem["fatal"]


def test_a_good_machine_has_no_problem(h200):
    assert machine.problems("", dry=False) == []


def test_an_old_chip(h200):
    h200.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    h200.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    only("sm_75, below sm_80", "unpacked for each product")


def test_two_gpus_of_different_kinds(h200):
    names = ["NVIDIA H200", "NVIDIA L4"]
    h200.setattr(torch.cuda, "device_count", lambda: 2)
    h200.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    only("different kinds: NVIDIA H200, NVIDIA L4", "only cuda:0 is used")


def test_a_torch_without_the_operators_or_the_library(h200):
    h200.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    only("cuSPARSELt cannot be loaded", "cuSPARSELt is not measured")
    h200.delattr(torch, "_cslt_compress")
    only("has no cuSPARSELt operators", "cuSPARSELt is not measured")


def test_missing_packages_are_named_with_what_to_carry(h200):
    real = machine.importlib.util.find_spec
    for missing, costs in (("triton", "plain torch"), ("greenlet", "carry the wheel of greenlet")):
        h200.setattr(
            machine.importlib.util, "find_spec",
            lambda name, missing=missing: None if name == missing else real(name),
        )  # fmt: skip
        only(f"{missing} is not installed", costs)


@pytest.mark.parametrize("text", [
    "The NVIDIA driver on your system is too old (found version 11040)",
    "CUDA error: an illegal memory access was encountered",
])  # fmt: skip
def test_a_driver_that_is_too_old_or_a_dead_context_is_fatal(monkeypatch, text):
    def init():
        raise RuntimeError(text + "\nlong advice")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    why = machine.why_no_cuda()
    assert why == f"RuntimeError: {text}"
    (problem,) = machine.problems(why, dry=False)
    assert problem["fatal"]


def test_a_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in machine.why_no_cuda()


# ---------------------------------------------------------------- the report


GPU = {
    "row": "environment", "device": "cuda", "gpu": "NVIDIA H200", "torch": "2.11.0",
    "cuda": "13.0", "cusparselt": 801, "triton": "3.6.0", "transformers": "5.17.0",
}  # fmt: skip
LAYER = {
    "row": "layer", "rows": 11008, "width": 4096, "tokens": 1, "tile_rows": None, "as_used": 1.47,
    "backend": "triton", "dense": "dense", "bytes_per_second": 3.4e12, "cache_suspected": False,
    "numerics_hold": True, "ratio": {"median": 1.5, "low": 1.4, "high": 1.6, "blocks": 5},
}  # fmt: skip
SPEEDUPS = {
    "row": "speedups", "device": "NVIDIA H200 torch 2.11.0", "key": "11008x4096 bfloat16 1-1",
    "ratios": {"triton": 1.47, "decompress": 0.31},
}  # fmt: skip


def measured(*, stopped=True, **changes):
    """A run in which some parts have measured something, and one was stopped."""
    rows = {
        "machine": [GPU],
        "correct": [{"row": "check", "what": "masks", "value": 1.0, "goal": "at least",
                     "allowed": 1.0, "holds": True}],
        "decode": [LAYER | {"as_used": changes.pop("decode", 1.47)}, SPEEDUPS],
        "pruning": [{"row": "pruning", "method": "wanda", "sparsity": "2:4", "seconds": 4.0,
                     "of_all_blocks": 64.0}],
    }  # fmt: skip
    parts = [
        {"name": part.name, "title": part.title, "limit": part.seconds, "seconds": 1.0}
        | {"state": "done", "why": ""}
        | {"rows": rows.get(part.name, [])}
        for part in PARTS
    ]
    if stopped:
        parts[7] |= {"state": "out of time", "why": "stopped after 90 s"}
    start = {"format": 1, "created_at": "2026-12-01T10:00:00+00:00", "dry": False}
    return start | {"budget": 540.0, "seconds": 300.0, "parts": parts} | changes


def lost():
    problem = {"row": "problem", "why": "no driver", "costs": "everything", "fatal": True}
    document = measured()
    for part in document["parts"]:
        part["rows"] = [problem] if part["name"] == "machine" else []
    return document


def states(document):
    return {verdict.promise.name: verdict.state for verdict in verdicts(document)}


def test_each_promise_is_held_not_held_or_not_measured():
    by_name = states(measured())
    assert by_name["layer-11008x4096-1"] == by_name["prune-wanda-2of4"] == "held"
    assert by_name["layer-4096x11008-1"] == by_name["maskllm"] == "not measured"
    assert set(by_name.values()) == {"held", "not measured"}
    assert failures(measured()) == []
    (failure,) = failures(measured(decode=1.2))
    assert failure.promise.name == "layer-11008x4096-1"
    assert failure.ratio == pytest.approx(1.2 / 1.45)


def test_a_shape_that_is_slower_against_max_autotune_counts_as_that():
    document = measured()
    document["parts"][4]["rows"] = [LAYER | {"as_used": 1.1, "dense": "dense, max-autotune"}]
    assert states(document)["layer-11008x4096-1"] == "NOT HELD"


def test_another_chip_or_an_old_library_is_promised_no_speed():
    document = measured()
    document["parts"][0]["rows"] = [GPU | {"gpu": "NVIDIA L4"}]
    assert states(document)["layer-11008x4096-1"] == "not promised"
    assert states(document)["correct"] == "held"
    document = measured()
    document["parts"][0]["rows"] = [GPU | {"cusparselt": 800}]
    document["parts"][4]["rows"] = [LAYER | {"tokens": 2048, "as_used": 0.9}]
    assert states(document)["layer-11008x4096-2048"] == "not promised"


def test_a_dry_run_holds_nothing():
    assert set(states(measured(dry=True)).values()) == {"not measured"}


def test_the_report_as_text_and_as_markdown(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(measured(decode=1.2)))
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H200, torch 2.11.0, cuda 13.0, cusparselt 801" in text
    assert "NOT HELD" in text and "1.2 " in text and "not measured" in text
    assert "out of time: stopped after 90 s" in text
    assert max(map(len, text.splitlines())) <= 100
    assert report.main([str(path), "--markdown"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "| what | promised | measured | ratio |  |" in table
    assert any("NOT HELD" in line for line in table)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": 1}'])
def test_a_file_that_is_no_run(tmp_path, capsys, text):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    assert report.main([str(path)]) == 2
    err = capsys.readouterr().err
    assert "is no run of make gpu-acceptance" in err and len(err.splitlines()) == 2


# ---------------------------------------------------------------- runs that are committed


def test_the_committed_runs_keep_the_schema():
    wrong = {path.name: documents.why_not(path) for path in documents.FOLDER.glob("*.json")}
    assert not any(wrong.values()), wrong


def test_a_run_that_may_be_committed(tmp_path):
    path = tmp_path / "nvidia-h200-2026-12-01.json"
    path.write_text(json.dumps(measured()))
    assert documents.why_not(path) == ""


@pytest.mark.parametrize(("change", "why"), [
    ({"dry": True}, "dry run"),
    ({"format": 2}, "format"),
    ({"extra": 1}, "extra"),
    ({"seconds": float("inf")}, "seconds"),
    ({"parts": []}, "parts"),
    ({"created_at": "2026-12-02T10:00:00+00:00"}, "should be nvidia-h200-2026-12-02.json"),
])  # fmt: skip
def test_runs_that_may_not_be_committed(tmp_path, change, why):
    path = tmp_path / "nvidia-h200-2026-12-01.json"
    path.write_text(json.dumps(measured(**change)))
    assert why in documents.why_not(path) or "NaN or infinite" in documents.why_not(path)
    assert documents.main(["check", str(path)]) == 1


def test_what_a_run_has_measured_is_what_the_policy_chooses_by(tmp_path, monkeypatch):
    document = measured()
    document["parts"][4]["rows"] = [SPEEDUPS | {"ratios": {"triton": 1.31}}]
    path, table = tmp_path / "nvidia-h200-2026-12-01.json", tmp_path / "measured.json"
    path.write_text(json.dumps(document))
    table.write_text(json.dumps({"format": 1, "devices": {"other": {}}}))
    monkeypatch.setattr(documents, "MEASURED", table)
    assert documents.main(["policy", str(path)]) == 0
    monkeypatch.setattr(policies, "KNOWN", table)
    monkeypatch.setattr(policies, "device_key", lambda device: SPEEDUPS["device"])
    policy = Policy.load(torch.device("cpu"))
    measured_ratios = policy.measured((11008, 4096), torch.bfloat16, 1)
    assert measured_ratios == {"triton": 1.31, "decompress": 0.31}  # the smaller of two


def test_the_page_names_every_part_with_its_limit_and_every_promise():
    page = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    for part in PARTS:
        assert f"| `{part.name}` | {part.title} | {part.seconds:g} |" in page
    for promise in PROMISES:
        assert f"| {promise.title} | {promise.goal} {promise.limit:g} |" in page
    measured_runs = list(documents.FOLDER.glob("*.json"))
    assert measured_runs or page.count("not measured |") == len(PROMISES)


def test_rows_are_found_by_their_values():
    rows = list(rows_of(measured(), "decode", "layer", rows=11008, tokens=1))
    assert [row["as_used"] for row in rows] == [1.47]
    assert list(rows_of(measured(), "decode", "layer", tokens=8)) == []
    assert dataclasses.is_dataclass(PROMISES[0])
