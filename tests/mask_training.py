"""Short trainings of MaskLLM on tiny models."""

import torch

from prunebench.calibration.training import Training
from prunebench.models.linears import find_linears
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.pruners.maskllm.candidates import candidates
from prunebench.pruners.maskllm.learn import Learner
from prunebench.pruners.maskllm.optimize import Optimizer
from prunebench.pruners.maskllm.relaxation import (
    LayerLogits,
    Relaxation,
    WeightGradient,
)
from prunebench.pruners.maskllm.schedule import Schedule
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model, tiny_tokens

QUICK = {"steps": 4, "batch": 2, "eval_every": 2, "prior": "magnitude", "train_seqlen": 24}
HALF = Sparsity.parse("2:4")


def pruner_of(**options):
    return METHODS.make("maskllm", METHODS.resolve_options("maskllm", {**QUICK, **options}, seed=0))


def one_block():
    """Return a tiny Llama of one block: for what does not depend on how many there are."""
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def train(folder=None, *, model=None, notes=None, on_point=lambda point: None, code="", **options):
    """Learn masks of a tiny model; returns it and the report."""
    model = model or one_block()
    note = notes.append if notes is not None else lambda text: None
    data = Training(
        tiny_tokens(samples=8), tiny_tokens(samples=3, seed=1), folder, on_point, note, code=code
    )
    walker = BlockWalker(model, token_ids=tiny_tokens(), inputs=PrunerInputs(training=data))
    report = pruner_of(**options).prune(walker, {linear.name: HALF for linear in walker.linears})
    return model, report


def learner_of(model, *, optimizer=None, noise=1.0, reward=0.0, curvature=0.0, batch=4, steps=4,
               logits_seed=3, dtype=torch.float32, **options):  # fmt: skip
    table = candidates(2, 4)
    optimizer = optimizer or Optimizer("adamw")
    layers, prior = {}, {}
    for index, linear in enumerate(find_linears(model)):
        generator = torch.Generator().manual_seed(logits_seed + index)
        groups = linear.out_features * linear.in_features // 4
        logits = torch.randn(6, groups, generator=generator).to(dtype)
        layers[linear] = LayerLogits(index, logits, table, linear.in_features // 4)
        prior[linear.name] = logits.argmax(0).to(torch.uint8)
        optimizer.prepare(layers[linear])
    schedule = Schedule(
        steps=steps, batch=batch, temperature=(2.0, 0.5), scale=(1.0, 2.0), noise=noise,
        reward=reward, curvature=curvature, peak_rate=30.0, last_rate=1.0,
    )  # fmt: skip
    return Learner(model, layers, prior, optimizer=optimizer, schedule=schedule, seed=5, **options)


# ------------------------------------------------------------ what is kept


def masks_of(model):
    return {linear.name: linear.read() != 0 for linear in find_linears(model)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------ the relaxed mask


def layer_of(*, rows=8, columns=32, kept=2, group=4, dtype=torch.float32, first=0, seed=0):
    table = candidates(kept, group)
    groups = rows * columns // group
    logits = torch.randn(len(table), groups, generator=generator(seed))
    return LayerLogits(3, logits.to(dtype), table, columns // group, first=first)


HOW = Relaxation(seed=5, step=9, temperature=0.7, scale=1.3, noise=0.8)


def slope_for(gradient, seed=2):
    rows, columns = gradient.shape
    return WeightGradient(
        gradient,
        torch.rand(rows, generator=generator(seed)),
        torch.rand(columns, generator=generator(seed + 1)),
    )
