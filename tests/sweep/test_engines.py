"""Engines: what a cell asks for, how a job ends, what is tried again, eight writers at once."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from prunebench.errors import MissingResource, UsageError
from prunebench.results.store import ResultStore
from prunebench.sweep.engines.job import Job, Resources, read_resources
from prunebench.sweep.engines.local import LocalEngine, slots_of_machine
from prunebench.sweep.engines.process import run_job
from prunebench.sweep.recipe import read_recipe
from tests.factories import job


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("4:00:00", 240), ("1-12:00:00", 2160), ("0:01:59", 1)]
)
def test_times_are_slurm_s(text, minutes):
    assert Resources.of({"time": text}).minutes == minutes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpus"], "is not KEY=VALUE"),
        (["gpu=1"], "did you mean 'gpus'"),
        (["gpus=one"], "is not a number"),
        (["cpus=0"], "asks for too little"),
        (["time=4:00"], "four minutes"),
        (["time=0"], "less than a minute"),
    ],
)
def test_a_wrong_resource_is_named(words, says):
    with pytest.raises(UsageError) as error:
        Resources.of(read_resources(words))
    assert says in str(error.value)


def test_resources_are_typed_and_described():
    asked = read_resources(["gpus=2", "memory-gb=64", "partition=a,b"])
    assert asked == {"gpus": 2, "memory_gb": 64.0, "partition": "a,b"}
    assert Resources.of(asked).described() == "gpus 2, memory_gb 64, partition a,b"


def test_each_cell_at_a_time_has_a_gpu_or_threads_of_its_own(monkeypatch):
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert slots_of_machine(1, {"auto"}) == [{}]
    assert slots_of_machine(4, {"cpu"}) == [{"OMP_NUM_THREADS": "2"}] * 4
    with pytest.raises(UsageError, match="--jobs 2 needs 2 GPUs, and there are 0"):
        slots_of_machine(2, {"cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert slots_of_machine(2, {"auto"}) == [{"CUDA_VISIBLE_DEVICES": n} for n in "01"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert slots_of_machine(2, {"auto"})[1] == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    for jobs, device in ((3, "auto"), (2, "cuda:1")):
        with pytest.raises(UsageError, match="GPUs"):
            slots_of_machine(jobs, {device})


def test_a_job_says_how_it_ended(tmp_path, monkeypatch):
    lines = []
    end = run_job(job("list", "nonsense"), on_line=lines.append)
    assert (end.code, end.result_id, end.stage) == (2, "", "")
    assert end.reason.startswith("there is no list of 'nonsense' / ") and len(lines) > 1
    assert run_job(job("--version"), on_line=lines.append).code == 0
    lost = run_job(Job(1, ("--version",), folder=str(tmp_path / "none")))
    assert lost.code is None and "could not be started" in lost.reason


def fake_program(folder, text):
    """Put a package named prunebench before ours in a job's path."""
    (folder / "prunebench").mkdir(parents=True)
    (folder / "prunebench" / "__init__.py").touch()
    (folder / "prunebench" / "__main__.py").write_text(textwrap.dedent(text))
    return {"PYTHONPATH": str(folder)}


def test_a_killed_job_names_the_signal_and_the_stage(tmp_path, monkeypatch):
    settings = fake_program(
        tmp_path / "fake",
        """
        import os, sys
        sys.stderr.write("load         tiny ... 0.1 s\\nprune        wanda 2:4, 2 blocks ... ")
        sys.stderr.flush()
        os.kill(os.getpid(), 9)
        """,
    )
    monkeypatch.chdir(tmp_path)
    end = run_job(job("run", **settings), on_line=lambda line: None)
    assert (end.code, end.stage) == (-9, "prune")
    assert end.reason == (
        "its process was ended by SIGKILL, as the system does when memory runs out, in the stage "
        "prune"
    )


def test_the_environment_of_a_job_is_the_recipe_s(tmp_path, monkeypatch):
    from prunebench.sweep.sweep import _settings

    sent = _settings(
        {
            "PRUNEBENCH_SEED": "3",
            "PRUNEBENCH_CACHE": "/c",
            "HF_TOKEN": "x",
            "HF_HOME": "/h",
            "A": "",
        }
    )
    assert {k: v for k, v in sent.items() if v} == {
        "PRUNEBENCH_CACHE": "/c", "HF_HOME": "/h", "PRUNEBENCH_ONCE": "1",
    }  # fmt: skip
    assert sent["PRUNEBENCH_SEED"] is None and sent["PRUNEBENCH_BATCH_SIZE"] is None


def test_a_cell_ends_with_whoever_started_it(tmp_path):
    """Kill the parent with SIGKILL: its job is interrupted within a second."""
    script = tmp_path / "parent.py"
    sign = tmp_path / "sign"
    (tmp_path / "job.py").write_text(
        textwrap.dedent(f"""
        import os, pathlib, time
        from prunebench.sweep.engines.process import end_with_parent
        end_with_parent()
        try:
            pathlib.Path({str(sign)!r}).write_text(str(os.getpid()))
            time.sleep(60)
        except KeyboardInterrupt:
            pathlib.Path({str(sign)!r}).write_text("interrupted")
        """)
    )
    script.write_text(
        textwrap.dedent(f"""
        import os, subprocess, sys
        environment = {{**os.environ, "PRUNEBENCH_PARENT": str(os.getpid())}}
        subprocess.run([sys.executable, {str(tmp_path / "job.py")!r}], env=environment)
        """)
    )
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    deadline = time.monotonic() + 30
    while not (sign.exists() and sign.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while sign.read_text() != "interrupted" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sign.read_text() == "interrupted"


def test_local_jobs_run_side_by_side(tmp_path, monkeypatch):
    """Each waits for the other's sign: neither would end alone."""
    settings = fake_program(
        tmp_path / "fake",
        """
        import os, pathlib, sys, time
        name, other = sys.argv[1:]
        pathlib.Path(name).write_text(os.environ["OMP_NUM_THREADS"])
        while not pathlib.Path(other).exists():
            time.sleep(0.01)
        print('{"id": "of-' + name + '"}')
        """,
    )
    monkeypatch.chdir(tmp_path)
    engine = LocalEngine([{"OMP_NUM_THREADS": "3"}] * 2, show=lambda number, line: None)
    for number, names in ((1, ("a", "b")), (2, ("b", "a"))):
        engine.submit(Job(number, names, str(tmp_path), settings))
    ends = {job.number: end.result_id for job, end in (engine.wait(), engine.wait())}
    assert ends == {1: "of-a", 2: "of-b"}
    assert Path("a").read_text() == "3"


def test_a_cancelled_job_is_interrupted_once(tmp_path, monkeypatch):
    settings = fake_program(
        tmp_path / "fake",
        """
        import pathlib, signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        times = 0
        pathlib.Path("started").touch()
        while True:
            try:
                time.sleep(0.3)
                if times:
                    break
            except KeyboardInterrupt:
                times += 1
        pathlib.Path("times").write_text(str(times))
        sys.exit(130)
        """,
    )
    monkeypatch.chdir(tmp_path)
    engine = LocalEngine([{}], show=lambda number, line: None)
    engine.submit(Job(1, (), str(tmp_path), settings))
    deadline = time.monotonic() + 30
    while not Path("started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    engine.cancel()
    assert Path("times").read_text() == "1"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--executor", "slrum"], 2, "did you mean 'slurm'"),
        (["--resource", "gpus=1"], 2, "--resource gpus does not go with --executor local"),
        (["--executor", "ray", "--resource", "time=60"], 2, "use --executor slurm"),
        (["--executor", "ray"], 3, "pip install 'prunebench[ray]'"),
        (["--executor", "slurm"], 3, "pip install 'prunebench[slurm]'"),
        (["--jobs", "3", "--device", "cuda"], 2, "--jobs 3 needs 3 GPUs"),
    ],
)
def test_a_wrong_engine_is_refused(cli, recipe, monkeypatch, arguments, code, says):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert says in cli("sweep", recipe.path, *arguments, code=code).output


def test_slurm_needs_a_cluster_and_a_time(tmp_path, monkeypatch):
    import types

    from prunebench.sweep.engines.slurm import SlurmEngine

    monkeypatch.setitem(sys.modules, "submitit", types.ModuleType("submitit"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingResource, match="needs sbatch and srun"):
        SlurmEngine(Resources(minutes=1), folder=tmp_path)
    with pytest.raises(UsageError, match="needs the time"):
        SlurmEngine(Resources(), folder=tmp_path, cluster="local")


def test_a_recipe_says_what_a_cell_asks_for(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('method = "wanda"\n[resources]\ngpus = 1\ntime = "4:00:00"\n')
    assert read_recipe(path, complete=True).resources == {"gpus": 1, "time": "4:00:00"}
    for text, says in (("gpu = 1", "did you mean 'gpus'"), ('time = "4:00"', "four minutes")):
        path.write_text(f'method = "wanda"\n\n[resources]\n{text}\n')
        with pytest.raises(UsageError) as error:
            read_recipe(path, complete=True)
        assert says in str(error.value) and "r.toml, line" in str(error.value)


def test_once_shows_what_is_filed(cli, tiny_run, tmp_path):
    arguments = [*tiny_run, "--method", "wanda", "--json"]
    first = cli(*arguments, "--once").stdout
    again = cli(*arguments, "--once")
    assert again.stdout == first and "nothing is run" in again.stderr
    assert json.loads(first)["sparsity"]["layers"]
    assert len(list((tmp_path / "results").rglob("*.json"))) == 1
    refused = cli(*arguments, "--once", "--save-model", tmp_path / "m", code=2)
    assert "--once does not go with --save" in refused.stderr


EIGHT = """
import os, sys
from pathlib import Path
import torch
from prunebench.spec import Setup
from prunebench.run.execute import run
from prunebench.spec import RunSpec

def one(method, seed, results):
    spec = RunSpec(
        method=method, model={model!r}, sparsity="2:4", seed=seed, calibration="file:{text}",
        calibration_samples=2, seqlen=32, ppl=("file:{eval}",), ppl_seqlen=64,
    )
    run(spec, Setup(results_dir=Path(results), device="cpu"))

torch.set_num_threads(1)
os.environ["PRUNEBENCH_CACHE"] = "warm-cache"
one("wanda", 0, "warm-results")  # what is imported here is not imported eight times
os.environ["PRUNEBENCH_CACHE"] = "cache"
children = []
for number in range(8):
    pid = os.fork()
    if pid == 0:
        one(("wanda", "gblm")[number % 2], number // 4, "results")
        os._exit(0)
    children.append(pid)
sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""


@pytest.mark.slow
def test_eight_runs_in_one_results_and_one_cache_folder(
    tmp_path, tiny_folder, text_file, eval_file
):
    """Eight processes at once share baselines and gradients; every result is there, and right."""
    code = EIGHT.format(model=str(tiny_folder), text=text_file, eval=eval_file)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    results, damaged = ResultStore(tmp_path / "results").read()
    assert not damaged and len(results) == 8
    values = {}
    for result in results:
        values.setdefault((result.spec.method, result.spec.seed), []).append(result.scores[0].value)
    assert sorted(map(len, values.values())) == [2, 2, 2, 2]
    assert all(len(set(same)) == 1 for same in values.values())
    assert len({result.scores[0].dense_value for result in results}) == 1
    assert not list(tmp_path.rglob("*.part"))
