"""What --dry-run promises, beside what a training really allocates."""

from dataclasses import asdict, replace

import pytest
import torch

from prunebench.models.replay import plain_inference
from prunebench.models.walker import BlockWalker
from prunebench.pruners.maskllm import relaxation
from prunebench.pruners.maskllm.candidates import candidates
from prunebench.pruners.maskllm.memory_plan import MemoryPlan
from prunebench.testing import tiny_model, tiny_tokens
from prunebench.training.shards import Shards
from tests.factories import peak_bytes
from tests.mask_training import HALF, pruner_of


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "noise_samples": 1},
        {"optimizer": "momentum", "state_dtype": "int8", "logit_dtype": "bfloat16"},
    ],
    ids=lambda o: o["optimizer"],
)
def test_the_plan_names_the_bytes_that_are_allocated(options, monkeypatch):
    monkeypatch.setattr(relaxation, "_CHUNK_LOGITS", 1500)
    model, windows = tiny_model("llama"), tiny_tokens(samples=16, seqlen=64)
    config = pruner_of(train_seqlen=64, batch=16, noise=0.0, **options).filled()
    load = MemoryPlan(model, config, HALF, torch.float32, torch.device("cpu"))
    plan = load.memory()
    assert plan["model"] == sum(p.nbytes for p in model.parameters())
    walker = BlockWalker(model)
    learner = config.learner(walker, None, candidates(2, 4), Shards())
    layers = learner.layers.values()
    assert plan["logits"] == sum(layer.logits.nbytes for layer in layers)
    assert plan["moments"] == sum(
        packed.values.nbytes + packed.scales.nbytes
        for layer in layers
        for packed in layer.state.values()
    )
    assert plan["workspace"] == learner._store._workspace.nbytes
    assert plan["noise draws"] == 0
    with plain_inference(model):
        learner._backward.prepare(windows[:1])
        learner._step(0, windows)
        sums = learner._sums
        peak = peak_bytes(lambda: learner._step(1, windows))
    del sums
    promised = plan["gradients"] + plan["activations"]
    assert 0.75 * promised < peak < 1.1 * promised, (peak, promised)


def test_shares_of_the_plan_add_up_and_several_draws_are_counted():
    model = tiny_model("mixtral")
    load = MemoryPlan(model, pruner_of(noise_samples=2).filled(), HALF, torch.bfloat16,
                torch.device("cpu"))  # fmt: skip
    whole, half = load.memory(), replace(load, processes=2).memory()
    for item in ("logits", "moments", "masks kept", "noise draws"):
        assert whole[item] == 2 * half[item] > 0
    assert whole["model"] == half["model"] == 2 * sum(p.numel() for p in model.parameters())
    assert whole["noise draws"] == whole["logits"]


def test_the_published_budget_of_a_7b_model():
    """Float32 logits 38.9 GB, bf16 moments 38.9, G 13, workspace 0.4."""
    from transformers import AutoConfig

    from prunebench.models.load import skeleton

    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008,
                                  num_hidden_layers=32, num_attention_heads=32,
                                  vocab_size=32000)  # fmt: skip
    lean = pruner_of(preset="paper", state_dtype="bfloat16", train_seqlen=4096)
    load = MemoryPlan(skeleton(config), lean.filled(), HALF, torch.bfloat16, torch.device("cuda"))
    plan = {name: size / 1e9 for name, size in load.memory().items()}
    assert plan["model"] == pytest.approx(13.5, abs=0.1)
    assert plan["logits"] == pytest.approx(38.9, abs=0.1)
    assert plan["moments"] == pytest.approx(38.9, abs=0.1)
    assert plan["gradients"] == pytest.approx(13.0 + 0.8, abs=0.1)
    assert plan["activations"] < 16
    assert sum(plan.values()) < 139


def test_the_time_is_that_of_the_steps():
    load = MemoryPlan(tiny_model("llama"), pruner_of().filled(), HALF, torch.float32,
                torch.device("cpu"))  # fmt: skip
    seconds = load.seconds()
    many = replace(load, options=replace(load.options, steps=4000)).seconds()
    assert 0 < seconds < many


@pytest.mark.parametrize("preset", ["laptop", "lite", "paper"])
def test_a_preset_gives_every_option_of_a_training_a_value(preset):
    config = asdict(pruner_of(preset=preset).filled())
    assert [name for name, value in config.items() if value is None] == ["train_data"]
