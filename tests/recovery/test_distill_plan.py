"""What --dry-run promises of a distillation, beside what one really allocates."""

from dataclasses import replace

import pytest
import torch

from prunebench.models.linears import find_linears
from prunebench.models.replay import plain_inference
from prunebench.recovery.distill.loop import Distiller
from prunebench.recovery.distill.memory_plan import DistillPlan
from prunebench.recovery.distill.options import DistillConfig
from prunebench.recovery.distill.recoverer import Distill, _trained
from prunebench.testing import tiny_tokens
from prunebench.training.shards import Shards
from tests.distillation import pruned_model
from tests.factories import peak_bytes

CPU = torch.device("cpu")


def config_of(**options) -> DistillConfig:
    return Distill(**{"batch": 16, "seqlen": 64, **options}).filled()


def tensors_of(loop, name):
    return [
        loop._optimizer.state[parameter][name]
        for weight in loop.weights.values()
        for parameter in weight.parameters.values()
    ]


@pytest.mark.parametrize("rank", [0, 4])
def test_the_plan_names_the_bytes_that_are_allocated(rank):
    model, dense = pruned_model()
    windows, config = tiny_tokens(samples=16, seqlen=64), config_of(rank=rank)
    plan = DistillPlan(model, config, torch.float32, CPU).memory()
    weights = {linear: _trained(linear, config, Shards()) for linear in find_linears(model)}
    for linear in weights:
        linear.stored.copy_(dense[linear.name])
    loop = Distiller(model, weights, config, Shards())
    assert plan["dense model (teacher)"] == sum(p.nbytes for p in model.parameters())
    assert plan["masters"] == sum(
        parameter.nbytes for weight in weights.values() for parameter in weight.parameters.values()
    )
    assert plan["moments"] == sum(
        tensor.nbytes for name in ("exp_avg", "exp_avg_sq") for tensor in tensors_of(loop, name)
    )
    assert plan["best so far"] == sum(tensor.nbytes for tensor in loop.progress.best.values())
    assert plan["workspace"] == loop._store._workspace.nbytes
    kept = "pruned weights" if rank else "mask"
    held = "_start" if rank else "_keep"
    assert plan[kept] == sum(getattr(weight, held).nbytes for weight in weights.values())
    with plain_inference(model):
        loop._backward.prepare(windows[:1])
        loop._step(0, windows)
        peak = peak_bytes(lambda: loop._step(1, windows))
    promised = plan["gradients"] + plan["activations"]
    assert 0.6 * promised < peak < 1.15 * promised, (peak, promised)


def test_several_processes_share_what_is_trained():
    model, _ = pruned_model("mixtral")
    load = DistillPlan(model, config_of(), torch.bfloat16, CPU)
    whole, half = load.memory(), replace(load, processes=2).memory()
    for item in ("masters", "moments", "best so far", "mask"):
        assert whole[item] == 2 * half[item] > 0
    assert whole["dense model (teacher)"] == half["dense model (teacher)"]
    assert whole["moments"] == 2 * whole["masters"]


def test_a_forecast_counts_tokens_and_time():
    model, _ = pruned_model()
    forecast = DistillPlan(model, config_of(steps=3), torch.float32, CPU).forecast()
    assert forecast.tokens == 3 * 16 * 64
    assert forecast.seconds is not None and forecast.seconds > 0
