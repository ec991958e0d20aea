"""What a run will take: counted from shapes, and refused early with the option that would help."""

import dataclasses
import re

import pytest
import torch

from prunebench.errors import OutOfMemory, SaveError
from prunebench.models.footprint import BlockFootprint, Footprint, count_footprint
from prunebench.pruners.sparsegpt import SparseGPT
from prunebench.pruners.wanda import Wanda
from prunebench.run import forecast as module
from prunebench.run.memory import MemoryNeed, Sizes, Workload, choose_weights, plan_memory
from prunebench.run.probe import probe_method
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model

CPU = torch.device("cpu")
SIZES = Sizes(outside=100, blocks=(1000, 1000, 1000))
COUNTED = BlockFootprint(running=50, collecting=70, statistics=20, head=30)
WORK = Workload(
    samples=8, seqlen=4, batch=2, windows=0, window=2, scored=1, sequential=False, hessian=False
)

DISTILL = [
    "--recover", "distill", "--set", "recover.steps=2", "--set", "recover.distill.batch=2",
    "--set", "recover.seqlen=24", "--set", "recover.distill.held_out=2",
]  # fmt: skip
LEARN = ["-m", "maskllm", *(
    word for option in ("steps=2", "batch=2", "train_seqlen=24", "held_out=2")
    for word in ("--set", option)
)]  # fmt: skip


def planned(**changes):
    options = {
        "method_peak": 60, "dtype": torch.float32, "weights": "disk", "placement": "device",
        "on_gpu": False, "process": 7,
    }  # fmt: skip
    work = changes.pop("work", WORK)
    return plan_memory(SIZES, 2, COUNTED, work, **options | changes)


def test_a_footprint_counts_what_exists_at_a_time():
    with Footprint() as footprint:
        tensor = torch.empty(100)
        two = tensor + 1
        del tensor
        three = two.view(10, 10)  # shares the bytes
        del two
    assert (footprint.peak, footprint.now) == (800, 400)
    del three


def test_a_block_is_counted_from_the_config_alone():
    config = tiny_model("llama").config
    small, large = (
        count_footprint(
            config, torch.float32, calibration=(samples, 32), scoring=(1, 32), hessian=True
        )
        for samples in (2, 4)
    )
    grams = 4 * (3 * 32 * 32 + 64 * 64)  # inputs of q, k, v; of o; of gate, up; of down
    assert small.statistics == large.statistics == grams
    assert large.running == 2 * small.running
    assert small.head == (32 + 3 * 32) * 256 * 4


@pytest.mark.slow
def test_methods_are_counted_on_small_matrices():
    wanda = probe_method(Wanda(), Sparsity.parse("2:4"), CPU)
    sparsegpt = probe_method(SparseGPT(), Sparsity.parse("2:4"), CPU)
    assert wanda.per_weight >= 4  # at least the score
    assert sparsegpt.per_square >= 4  # at least the factor: the Hessian is one of the statistics
    assert sparsegpt.per_square > wanda.per_square


def test_parts_add_up_where_they_are():
    states = 8 * 4 * 2 * 4
    here = planned()
    assert here.device["the block at work"] == here.device["the block that is read"] == 1000
    assert here.device["hidden states"] == states
    assert here.device["one batch, statistics, method"] == 80  # statistics and the method
    assert here.host == {}
    on_gpu = planned(on_gpu=True, placement="cpu")
    assert on_gpu.host == {
        "the block that is read": 1000, "hidden states": states, "Python and libraries": 7,
    }  # fmt: skip
    assert "hidden states" not in planned(placement="disk").device
    assert planned(placement="disk").disk == here.disk + states
    assert planned(weights="resident").device["blocks"] == 3000
    assert planned(weights="resident").disk == 0
    sequential = planned(work=dataclasses.replace(WORK, sequential=True))
    assert sequential.device["one batch, statistics, method"] == 4 * 70  # all batches at once


def test_auto_takes_memory_where_it_suffices(monkeypatch):
    for free, expected in ((3720, "resident"), (3719, "disk")):
        monkeypatch.setattr("prunebench.run.memory.free_memory", lambda device, free=free: free)
        assert choose_weights(SIZES, CPU)[0] == expected


def test_a_dry_run_says_what_it_takes_and_refuses_what_does_not_fit(cli, tiny_run, monkeypatch):
    command = [*tiny_run, "-m", "wanda", "--dry-run"]
    said = cli(*command).output
    for word in ("weights     in memory", "memory", "Python and libraries", "time"):
        assert word in said
    plain = module.forecast

    def poor(plan):
        return dataclasses.replace(plain(plan), device_free=1000)

    monkeypatch.setattr(module, "forecast", poor)
    said = cli(*command, "--within-block", "sequential", code=OutOfMemory.exit_code).output
    assert "does not fit" in said and "use --within-block joint" in said

    def full(plan):
        return dataclasses.replace(plain(plan), disk_free=10)

    monkeypatch.setattr(module, "forecast", full)
    said = cli(*command, "--weights", "disk", code=SaveError.exit_code).output
    assert "PRUNEBENCH_CACHE" in said


@pytest.mark.parametrize(
    ("words", "copies"),
    [
        (["-m", "wanda", "--recover", "block"], 0),
        (["-m", "wanda", *DISTILL], 1),
        (LEARN, 0),
        ([*LEARN, "--recover", "block"], 1),
        ([*LEARN, *DISTILL, "--recover", "block+distill"], 2),
    ],
)
def test_dense_weights_that_wait_for_a_recovery_are_counted(cli, tiny_run, words, copies):
    counted = []

    def planned(*args, **how):
        counted.append(args[3].kept)
        return plan_memory(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan_memory", planned)
        said = cli(
            *tiny_run, "--calibration-samples", "8", "--sparsity", "2:4", *words, "--dry-run"
        ).output
    weights = int(re.search(r"with ([\d,]+) weights", said)[1].replace(",", ""))
    # a method that learns has no walk to forecast unless a recovery follows it
    assert counted == ([] if words == LEARN else [copies * weights * 4])
    assert ("dense weights for the recovery" in said) == bool(copies)
    second_walk = words != LEARN and "maskllm" in words
    assert ("block by block, in a walk of its own" in said) == second_walk


@pytest.mark.parametrize(
    ("weights", "part", "fix"),
    [("resident", "blocks", "--weights disk"), ("disk", "hidden states", "--activations disk")],
)
def test_the_option_that_would_help_is_named(weights, part, fix):
    class Plan:
        pass

    plan = Plan()
    plan.weights = weights
    assert fix in module._what_would_fit(plan, MemoryNeed({part: 10, "other": 1}, {}, 0))
