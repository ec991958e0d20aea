"""MaskLLM as a command: bad input, what is kept, and runs that are killed or shared out."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from prunebench.errors import SaveError
from prunebench.pruners import METHODS
from prunebench.results import versions
from prunebench.testing import check_pruner
from tests.training_runs import finished, kill_once_saved

SMALL = {"steps": 2, "batch": 2, "train_seqlen": 24, "held_out": 2, "prior": "magnitude"}


def small(**options):
    """Return the words of a short training."""
    given = {**SMALL, **options}
    return ["-m", "maskllm", *(w for k, v in given.items() for w in ("--set", f"{k}={v}"))]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"sparsity": "0.5"}, 2, "is a ratio"),
        ({"sparsity": "8:16"}, 2, "12,870 candidates"),
        ({"sparsity": "2:5"}, 4, "not divisible by 5"),
        ({"train_seqlen": 20_000}, 2, "beyond the model's context"),
        ({"batch": 5000}, 4, "a step takes 5000"),
        ({"held_out": 5000}, 4, "5000 are held out"),
        ({"prior": "wandaa"}, 2, "did you mean 'wanda'"),
        ({"prior": "nope.npz"}, 3, "no masks at nope.npz"),
        ({"prior": "hub:a/b"}, 3, "cannot be downloaded"),
        ({"train_data": "file:nope.txt"}, 3, "nope.txt"),
        ({"preset": "lap"}, 2, "did you mean 'laptop'"),
        ({"rate": 0}, 2, "rate must be"),
        ({"beta1": 1}, 2, "beta1 must be in [0, 1)"),
        ({"noise": -1}, 2, "noise must be"),
        ({"optimizer": "sgd"}, 2, "optimizer"),
        ({"state_dtype": "int4"}, 2, "state_dtype"),
        ({"stepz": 3}, 2, "did you mean 'steps'"),
        ({"allocation": "owl"}, 2, "does not go with maskllm"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_said_before_anything_is_loaded(options, code, words, cli, tiny_run):
    apart = ("sparsity", "allocation")
    flags = [word for k in apart if k in options for word in (f"--{k}", options[k])]
    inner = {k: v for k, v in options.items() if k not in apart}
    output = cli(*tiny_run, *small(**inner), *flags, code=code).output
    assert words in output
    assert "\nload" not in output


def test_the_text_that_is_evaluated_is_not_learned_from(cli, tiny_run, eval_file):
    output = cli(*tiny_run, *small(train_data=f"file:{eval_file}"), code=2).output
    assert "learned from and evaluated on" in output


def test_a_token_file_that_is_evaluated_is_not_learned_from(cli, tiny_run, tmp_path):
    tokens = tmp_path / "tokens.safetensors"
    cli(*tiny_run, "-m", "wanda", "--save-calibration", str(tokens))
    scored = ["--ppl", f"tokens:{tokens}"]
    output = cli(*tiny_run, *small(train_data=f"tokens:{tokens}"), *scored, code=2).output
    assert "learned from and evaluated on" in output
    distill = ["-m", "magnitude", "--recover", "distill", "--set", f"recover.data=tokens:{tokens}"]
    assert "learned from and evaluated on" in cli(*tiny_run, *distill, *scored, code=2).output


@pytest.fixture
def as_one_of_two(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)


def test_a_method_that_does_not_learn_is_refused_in_several_processes(cli, tiny_run, as_one_of_two):
    output = cli(*tiny_run, "-m", "wanda", code=2).output
    assert "2 processes were started, and this method works in one" in output


def test_a_batch_that_cannot_be_shared_out_is_refused_first(cli, tiny_run, as_one_of_two):
    output = cli(*tiny_run, *small(batch=3), code=2).output
    assert "3 windows a step cannot be shared out equally" in output
    assert "batch=4" in output or "batch=2" in output
    assert "\nload" not in output


@pytest.fixture
def not_filed(cli, tiny_run, monkeypatch):
    """A run that has trained, and whose result could not be filed."""
    from prunebench.run import execute as run

    def full(plan, result):
        raise SaveError("no room for the result")

    with monkeypatch.context() as patched:
        patched.setattr(run, "_publish", full)
        cli(*tiny_run, *small(), code=5)


def test_a_full_disk_for_the_weights_does_not_cost_the_training(
    cli, tiny_run, tmp_path, monkeypatch
):
    from prunebench.run import execute as run

    def full(*args, **how):
        raise SaveError("no room for the weights")

    with monkeypatch.context() as patched:
        patched.setattr(run, "save_model", full)
        cli(*tiny_run, *small(), "--save-model", "out", code=5)
    output = cli(*tiny_run, *small(), "--save-model", "out").output
    assert "resumed after step 2" in output
    assert list((tmp_path / "cache" / "training").iterdir()) == []


def test_a_training_of_another_version_is_not_resumed(cli, tiny_run, not_filed, monkeypatch):
    change = versions.Change(("method maskllm",), "2027-01-01", "something else")
    monkeypatch.setattr(versions, "CHANGES", (*versions.CHANGES, change))
    output = cli(*tiny_run, *small()).output
    assert "of other code, versions, hardware or weights: training restarts from step 0" in output


def test_a_run_keeps_its_state_until_the_result_is_filed(cli, tiny_run, tmp_path, not_filed):
    states = tmp_path / "cache" / "training"
    assert len(list(states.glob("*/state"))) == 1
    output = cli(*tiny_run, *small()).output
    assert "resumed after step 2" in output
    assert "step 2: loss" in output
    assert list(states.iterdir()) == []


@pytest.mark.slow
def test_a_mask_is_specialised_on_a_text_and_its_scores_before_are_in_the_row(
    cli, tiny_run, tmp_path
):
    """The general mask of a checkpoint is begun with; its scores are those that its own row has."""
    domain = tmp_path / "domain.txt"
    domain.write_text("the judge of the quiz packs five liquor jugs on sunday. " * 200)
    both = ["--ppl", f"file:{domain}", "--json", "--quiet"]
    plain = tiny_run[: tiny_run.index("--results-dir")]
    general = json.loads(
        cli(*plain, *small(), *both, "--save-model", "general", "--results-dir", "a").stdout
    )
    expected = {score["protocol"]: score["value"] for score in general["scores"]}
    assert len(expected) == 2
    options = small(prior="general", train_data=f"file:{tmp_path / 'to-learn.txt'}")
    (tmp_path / "to-learn.txt").write_text("five dozen liquor jugs, the judge and a quiz. " * 200)
    words = [*plain, *options, *both[:2], "--results-dir", "b"]
    output = cli(*words).output
    for protocol, value in expected.items():
        assert f"the prior: ppl {value:,.4g} on {protocol}" in output
    assert output.count("; the prior ") == 2
    prior_scores = json.loads(cli(*words, "--json", "--quiet").stdout)["training"]["prior_scores"]
    assert {one["protocol"]: one["value"] for one in prior_scores} == pytest.approx(expected)
    scratch = cli(*plain, *small(prior="scratch"), *both, "--results-dir", "c").stdout
    assert json.loads(scratch)["training"]["prior_scores"] == []


def test_a_dry_run_says_what_a_training_needs(cli, tiny_run):
    output = cli(*tiny_run, *small(), "--dry-run").output
    assert "training    96 tokens of file-" in output
    for item in ("model", "logits", "moments", "gradients", "workspace", "activations"):
        assert f"B  {item}" in output
    assert "at the peak" in output
    assert re.search(r"steps [\d.]+ (s|min|h); loading, the prior", output)
    assert "nothing was loaded" in output


def test_check_asks_only_for_what_can_be_learned(cli):
    quick = {"steps": 1, "batch": 1, "prior": "magnitude"}
    pruner = METHODS.make("maskllm", METHODS.resolve_options("maskllm", quick, seed=0))
    outcomes = check_pruner(pruner, architectures=("gpt2",))
    assert [outcome.failure for outcome in outcomes if not outcome.passed] == []
    checks = {outcome.check for outcome in outcomes}
    assert {"reaches 2:4, joint", "reaches 1:4, joint", "reaches 3:4, joint"} <= checks
    assert not any("0.5" in check for check in checks)
    output = cli("check", "maskllm", "--sparsity", "0.5", code=6).output
    assert "0.5 is a ratio" in output


# ------------------------------------------------------------ real processes


STARTERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "-m"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
    ],
}  # fmt: skip


def command(tiny_run, *words, starter="", **options):
    """Return the command of a run, in two processes if a starter is named."""
    start = [sys.executable, "-m", *STARTERS.get(starter, ())]
    return [*start, "prunebench", *tiny_run, *small(**options), *words]


def same_masks(first, second):
    first, second = np.load(first), np.load(second)
    return first.files == second.files and all((first[k] == second[k]).all() for k in first.files)


@pytest.mark.slow
@pytest.mark.parametrize("starter", STARTERS)
def test_two_processes_learn_the_same_masks_and_file_one_result(starter, tiny_run, tmp_path, alone):
    line = command(tiny_run, "--save-masks", "two.npz", "--json", starter=starter)
    result = json.loads(finished(line, **alone).stdout)
    assert result["training"]["processes"] == 2
    finished(command(tiny_run, "--save-masks", "one.npz"), **alone)
    assert same_masks(tmp_path / "one.npz", tmp_path / "two.npz")
    filed = [json.loads(p.read_text()) for p in (tmp_path / "results").rglob("*.json")]
    assert sorted(one["training"]["processes"] for one in filed) == [1, 2]
    assert len({one["spec_id"] for one in filed}) == 1


@pytest.mark.slow
def test_torchrun_refuses_a_method_that_does_not_learn(tiny_run, tmp_path, alone):
    line = command(tiny_run, starter="torchrun")
    line[line.index("maskllm")] = "wanda"
    line = line[: line.index("wanda") + 1]
    done = subprocess.run(line, capture_output=True, text=True, check=False, **alone)
    assert done.returncode != 0
    assert "2 processes were started, and this method works in one" in done.stderr
    assert not list((tmp_path / "results").rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
def test_a_run_that_was_killed_goes_on_with_the_same_command(then, tiny_run, tmp_path, alone):
    """kill -9 in the middle; the same command, maybe in more processes, ends with the same mask."""
    longer = {"steps": 60, "eval_every": 30, "save_every": 5}
    states = tmp_path / "cache" / "training"
    kill_once_saved(command(tiny_run, **longer), states, **alone)
    for line in (
        command(tiny_run, "--resume-info", **longer),
        [sys.executable, "-m", "prunebench", "clean", "--list"],
    ):
        said = finished(line, **alone).stdout
        assert re.search(r"training of maskllm 2:4 on \S+\n  \d+ of 60 steps, \d\.\d MB", said), (
            said
        )
    done = finished(
        command(
            tiny_run, "--save-masks", "b.npz", starter="torchrun" if then == 2 else "", **longer
        ),
        **alone,
    )
    assert "resumed after step" in done.stderr
    assert list(states.iterdir()) == []  # the result is filed: nothing is left behind
    done = finished(command(tiny_run, "--save-masks", "a.npz", **longer), **alone)
    assert "resumed after step" not in done.stderr
    assert same_masks(tmp_path / "a.npz", tmp_path / "b.npz")
