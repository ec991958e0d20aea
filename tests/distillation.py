"""Short distillations of tiny models."""

import torch

from prunebench.calibration.training import Training
from prunebench.models.linears import find_linears
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.recovery import RECOVERERS
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model, tiny_tokens

QUICK = {"steps": 5, "batch": 4, "seqlen": 24, "held_out": 3, "eval_every": 2, "lr": 0.01,
         "eta": 1.0}  # fmt: skip


def distill_of(**options):
    return RECOVERERS.make(
        "distill", RECOVERERS.resolve_options("distill", QUICK | options, seed=0)
    )


def pruned_model(architecture="llama", *, sparsity="2:4", dtype=torch.float32):
    """Return a tiny model pruned by magnitude, and its dense weights."""
    model = tiny_model(architecture).to(dtype)
    dense = {linear.name: linear.stored.clone() for linear in find_linears(model)}
    walker = BlockWalker(model)
    target = Sparsity.parse(sparsity)
    METHODS.make("magnitude", {}).prune(walker, {linear.name: target for linear in walker.linears})
    return model, dense


def train(folder=None, *, architecture="llama", dtype=torch.float32, notes=None,
          on_point=lambda point: None, **options):  # fmt: skip
    """Distill a pruned tiny model; return it and the report."""
    model, dense = pruned_model(architecture, dtype=dtype)
    note = notes.append if notes is not None else lambda text: None
    data = Training(tiny_tokens(samples=8), tiny_tokens(samples=3, seed=1), folder, on_point, note)
    return model, distill_of(**options).recover_model(model, dense, data)
