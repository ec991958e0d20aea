"""Sweeps on engines for real: a local Ray cluster with a worker killed, submitit's own executor."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prunebench.results.store import ResultStore

PATIENCE = 300.0  # seconds, for a busy machine: nothing here waits so long on a free one
pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

SLOW = """
import os, time
from dataclasses import dataclass
from pathlib import Path
import torch
from prunebench.pruners.keep import keep_rows
from prunebench.pruners.layer import LayerPruner, Needs

@dataclass(frozen=True)
class Slow(LayerPruner):
    "Magnitude that says where it is and waits for leave to go on."
    needs = Needs()
    number: int = 0

    def prune_weight(self, weight, stats, sparsity):
        here = Path({folder!r})
        (here / f"at-{{self.number}}-{{os.getpid()}}").touch()
        while not (here / "go").exists():
            time.sleep(0.05)
        return torch.where(keep_rows(weight.abs(), sparsity), weight, 0)
"""
GRID = """
model = "{model}"
method = "slow:Slow"
sparsity = 0.5
ppl = "file:{eval}"
ppl_seqlen = 64

[[grid]]
set = {{ number = [1, 2, 3] }}

[resources]
gpus = 0
cpus = 1
time = "0:10:00"
"""


@pytest.fixture
def work(tmp_path, tiny_folder, eval_file):
    """A folder with a recipe of three cells that wait in the middle of pruning."""
    folder = tmp_path / "work"
    (folder / "signs").mkdir(parents=True)
    (folder / "slow.py").write_text(SLOW.format(folder=str(folder / "signs")))
    (folder / "grid.toml").write_text(GRID.format(model=tiny_folder, eval=eval_file))
    return folder


@pytest.fixture
def sweep(work, monkeypatch):
    """Start `prunebench sweep` in a process; it is gone when the test is."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "prunebench", "sweep", "grid.toml", *arguments, "--json"],
            cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(found, *, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return value


def at_work(folder, count):
    """Return the processes of so many cells, which wait in the middle of pruning."""

    def found():
        pids = {int(p.name.rpartition("-")[2]) for p in (folder / "signs").glob("at-*")}
        alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        return alive if len(alive) >= count else None

    return wait_for(found)


def ended(process, folder, *, code=0):
    (folder / "signs" / "go").touch()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    return json.loads(out)["cells"], err


def filed_once(folder, count=3):
    """Check that every cell has one result, and no process of a cell is left."""
    results, damaged = ResultStore(folder / "results").read()
    assert not damaged
    numbers = [r.spec.method_options["number"] for r in results if r.status == "ok"]
    assert sorted(numbers) == list(range(1, count + 1))
    pids = {int(p.name.rpartition("-")[2]) for p in (folder / "signs").glob("at-*")}
    wait_for(lambda: not any(map(psutil.pid_exists, pids)))
    return results


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    """A Ray cluster on this machine with two workers, nodes with a CPU each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={**small, "include_dashboard": False}
    )
    nodes = [cluster.add_node(**small)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    cluster.shutdown()


def test_ray_loses_a_worker_in_the_middle_and_no_cell(ray_cluster, work, sweep, monkeypatch):
    cluster, _ = ray_cluster
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    process = sweep("--executor", "ray")
    victim, other = at_work(work, 2)
    worker = victim.parent()
    assert "ray" in " ".join(worker.cmdline()).lower()
    worker.send_signal(signal.SIGKILL)
    wait_for(lambda: not victim.is_running())  # a cell ends with the worker that started it
    cells, err = ended(process, work)
    assert [cell["state"] for cell in cells] == ["done"] * 3
    assert sorted(cell["tries"] for cell in cells) == [1, 1, 2]
    assert "Ray lost it" in err and "retrying once" in err
    filed_once(work)


def test_ray_loses_a_node_in_the_middle_and_no_cell(ray_cluster, work, sweep, monkeypatch):
    cluster, nodes = ray_cluster
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    process = sweep("--executor", "ray")
    at_work(work, 2)
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    cells, _ = ended(process, work)
    assert [cell["state"] for cell in cells] == ["done"] * 3
    assert sorted(cell["tries"] for cell in cells) == [1, 1, 2]
    filed_once(work)


def test_a_ray_sweep_is_interrupted(ray_cluster, work, sweep, monkeypatch):
    cluster, _ = ray_cluster
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    process = sweep("--executor", "ray", "--jobs", "1")
    (cell,) = at_work(work, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert (
        "resume with: prunebench sweep grid.toml --executor ray" in err and "Traceback" not in err
    )
    wait_for(lambda: not cell.is_running())
    assert not list((work / "results").rglob("*.json"))


def test_no_ray_cluster_is_said(work, sweep, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    _, err = sweep("--executor", "ray").communicate(timeout=PATIENCE)
    assert "no Ray cluster answers" in err and "Traceback" not in err
    assert "127.0.0.1:1: Connection refused" in err


def test_the_address_that_a_killed_cluster_left_is_tried_first(work, sweep, monkeypatch, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    _, err = sweep("--executor", "ray").communicate(timeout=PATIENCE)
    assert "127.0.0.1:1: Connection refused" in err


def test_submitit_loses_a_job_in_the_middle_and_no_cell(work, monkeypatch):
    pytest.importorskip("submitit")
    import threading

    from prunebench.spec import Setup
    from prunebench.sweep.engines.job import Resources
    from prunebench.sweep.engines.slurm import SlurmEngine
    from prunebench.sweep.recipe import read_recipe
    from prunebench.sweep.sweep import Sweep

    monkeypatch.chdir(work)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    messages, states = [], []
    engine = SlurmEngine(
        Resources(minutes=10), folder=work / "logs", at_once=2, cluster="local", poll_seconds=0.1
    )
    sweep = Sweep(Setup(), engine=engine, tell=lambda cell, line: messages.append(line))
    cells = read_recipe(Path("grid.toml"), complete=True).cells
    thread = threading.Thread(target=lambda: states.extend(sweep.run(cells)))
    thread.start()
    victim = at_work(work, 2)[0]
    for parent in victim.parents():  # all of the job: what runs the cell, and what runs that
        if "-m submitit." in " ".join(parent.cmdline()):
            parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not victim.is_running())
    (work / "signs" / "go").touch()
    thread.join(timeout=PATIENCE)
    assert sorted((state.state, state.tries) for state in states) == [
        ("done", n) for n in (1, 1, 2)
    ]
    assert any("was lost" in line and "log" in line for line in messages)
    filed_once(work)


SBATCH = """#!{python}
import pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[1]).read_text()
number = str(1000 + len(list(pathlib.Path({spool!r}).glob("*.sh"))))
pathlib.Path({spool!r}, number + ".sh").write_text(script)
if "bad" in re.findall("--partition=(.*)", script):
    sys.exit("sbatch: error: invalid partition specified: bad")
process = subprocess.Popen(["bash", "-c", script], start_new_session=True,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    env={{**__import__("os").environ, "SLURM_JOB_ID": number, "SLURM_NTASKS": "1",
         "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "here"}})
pathlib.Path({spool!r}, number + ".pid").write_text(str(process.pid))
print("Submitted batch job", number)
"""
SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
at = next(i for i, word in enumerate(words) if "python" in word)
os.execv(words[at], words[at:])
"""
SCANCEL = """#!{python}
import os, pathlib, signal, sys
os.killpg(int(pathlib.Path({spool!r}, sys.argv[-1] + ".pid").read_text()), signal.SIGKILL)
"""
SACCT = """#!{python}
print("JobID|State|NodeList")
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands that run a batch script at once; returns their spool."""
    pytest.importorskip("submitit")
    spool, programs = tmp_path / "spool", tmp_path / "bin"
    spool.mkdir()
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scancel", SCANCEL), ("sacct", SACCT)):
        path = programs / name
        path.write_text(text.format(python=sys.executable, spool=str(spool)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("sbatch") == str(programs / "sbatch")
    return spool


def test_slurm_gets_what_a_cell_asks_for(slurm, work, sweep):
    process = sweep(
        "--executor", "slurm", "--resource", "partition=gpu", "--resource", "gpus=1",
        "--resource", "memory_gb=64", "--resource", "time=1-00:30:00",
    )  # fmt: skip
    cells, err = ended(process, work)
    assert [cell["state"] for cell in cells] == ["done"] * 3
    script = (slurm / "1000.sh").read_text()
    for line in ("partition=gpu", "gpus-per-node=1", "mem=64GB", "time=1470", "cpus-per-task=1"):
        assert f"#SBATCH --{line}\n" in script
    assert "Slurm job 1000, log " in err
    filed_once(work)


def test_a_slurm_sweep_is_interrupted_and_its_jobs_cancelled(slurm, work, sweep):
    process = sweep("--executor", "slurm", "--jobs", "2")
    running = at_work(work, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err
    wait_for(lambda: not any(job.is_running() for job in running))
    assert not list((work / "results").rglob("*.json"))


def test_slurm_refuses_a_job(slurm, work, sweep):
    _, err = sweep("--executor", "slurm", "--resource", "partition=bad").communicate(
        timeout=PATIENCE
    )
    assert "Slurm did not take a job" in err and "invalid partition specified: bad" in err
    assert "Traceback" not in err
