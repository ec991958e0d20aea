"""Sweeps: finished cells are skipped, failures kept apart, stops survived. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from prunebench.results.store import ResultStore

GRID = """
about = "two good cells and one that fails"
model = "{model}"
calibration = "file:{text}"
calibration_samples = 4
seqlen = 32
ppl = "file:{eval}"
ppl_seqlen = 64

[[grid]]
method = "random"
sparsity = 0.25

[[grid]]
method = "magnitude"
sparsity = [0.5, "1:7"]

[[expect]]
method = "magnitude"
sparsity = 0.5
protocol = "{protocol}"
value = {value}
tolerance = 0.01
"""


@pytest.fixture
def grid(tiny_folder, text_file, eval_file, tmp_path):
    def write(value=255.0, **more):
        import hashlib

        digest = hashlib.sha256(eval_file.read_bytes()).hexdigest()[:12]
        path = tmp_path / "work" / "grid.toml"
        text = GRID.format(
            model=tiny_folder, text=text_file, eval=eval_file, value=value,
            protocol=f"file-{digest}/all/64/v1",
        )  # fmt: skip
        path.write_text(text)
        return path

    return write


@pytest.mark.slow
def test_a_sweep_goes_through_and_goes_on(cli, grid, tmp_path):
    path = grid()
    results = ["--results-dir", tmp_path / "results"]
    outcome = cli("sweep", path, *results, code=8)
    assert "3 cells: 2 done, 1 failed" in outcome.stdout
    assert "1 of 3 cells failed" in outcome.stderr and "that divides every width" in outcome.stderr
    assert "[2/3] magnitude 0.5" in outcome.stderr and "prune " in outcome.stderr
    found, _ = ResultStore(tmp_path / "results").read()
    assert sorted(r.spec.method for r in found if r.status == "ok") == ["magnitude", "random"]
    assert all(r.command.startswith("prunebench run --model") for r in found)

    again = json.loads(cli("sweep", path, *results, "-q", "--json", code=8).stdout)
    assert [cell["state"] for cell in again["cells"]] == ["finished", "finished", "failed"]
    assert {c["result_id"] for c in again["cells"]} == {r.id for r in found} | {None}
    assert len(ResultStore(tmp_path / "results").read()[0]) == len(found)

    (value,) = {
        r.scores[0].value for r in found if r.spec.method == "magnitude" and r.status == "ok"
    }
    chosen = ["method=magnitude", "sparsity=0.5"]
    missed = cli("sweep", grid(value * 0.9), *results, *chosen, code=6)
    assert "worse" in missed.stdout and "1 of 1 expected value" in missed.stderr
    met = cli("sweep", grid(value * 1.005), *results, *chosen)
    assert "agrees" in met.stdout and "1 cell: 1 finished" in met.stdout
    dry = cli("sweep", grid(value), "--dry-run", "--results-dir", tmp_path / "none", *chosen)
    assert dry.stdout.startswith("to run    prunebench run --model")
    assert not list((tmp_path / "none").rglob("*.json"))


@pytest.mark.slow
def test_the_environment_does_not_change_a_cell(cli, grid, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEBENCH_SEED", "5")
    cli("sweep", grid(), "-q", "--results-dir", tmp_path / "results", "method=random")
    ((result,), _) = ResultStore(tmp_path / "results").read()
    assert result.spec.seed == 0


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_and_says_how_to_go_on(grid, tmp_path):
    (tmp_path / "work").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "prunebench", "sweep", str(grid()), "--results-dir", "out"],
        cwd=tmp_path / "work", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PRUNEBENCH_CACHE": str(tmp_path / "cache")}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith("start  "):
            break
    else:
        pytest.fail(seen)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resume with: prunebench sweep" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["none.toml"], 2, "cannot read the recipe"),
        (["{grid}", "--shard", "3/2"], 2, "no part of a whole"),
        (["{grid}", "method=wanda"], 2, "no cell of"),
        (["{gpu}"], 3, "needs a CUDA device"),
        (["{gpu}", "--device", "cpu"], 3, "the hub cannot be reached"),
    ],
)
def test_what_is_missing_is_said_at_once(cli, grid, tmp_path, arguments, code, says):
    path = grid()
    gpu = path.with_name("gpu.toml")
    gpu.write_text(
        'method = "wanda"\nmodel = "llama2-7b"\n[needs]\ngpu_memory_gb = { llama2-7b = 19 }\n'
    )
    words = [word.format(grid=path, gpu=gpu) for word in arguments]
    assert says in cli("sweep", *words, code=code).output


def test_a_shard_without_cells_says_so(cli, grid):
    outcome = cli("sweep", grid(), "--shard", "7/8", "method=magnitude", "--device", "cpu")
    assert outcome.stdout == "--shard 7/8 is empty: 2 cells in 8 parts\n"


def test_a_gated_model_needs_a_login(cli, tmp_path, monkeypatch):
    import prunebench.sweep.requirements as module

    monkeypatch.setattr(module, "hub_reachable", lambda: True)
    monkeypatch.setattr(module, "_logged_in", lambda: False)
    path = tmp_path / "r.toml"
    path.write_text('method = "wanda"\nmodel = "llama2-7b"\n')
    output = cli("sweep", path, code=3).output
    assert "llama2-7b is gated" in output and "hf auth login" in output
