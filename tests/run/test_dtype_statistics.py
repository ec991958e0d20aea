"""Statistics and solvers of a model in bfloat16 work in float32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prunebench.calibration.stats import StatsAccumulator
from prunebench.models.gradients import _Accumulators, gradient_norms
from prunebench.models.linears import find_linears
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.pruners import BUILTIN, METHODS
from prunebench.pruners.layer import GroupPruner
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model, tiny_tokens

# ---------------------------------------------------------------- float32 inside


class _Half(TorchDispatchMode):
    """Notes every operator that gives 16-bit numbers, other than views and copies."""

    _MOVES = (
        "detach", "view", "alias", "t", "transpose", "permute", "slice", "select", "clone",
        "_unsafe_view", "_reshape_alias", "unsqueeze", "expand", "split", "as_strided",
    )  # fmt: skip

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        results = out if isinstance(out, (tuple, list)) else [out]
        if name not in self._MOVES and any(
            isinstance(result, torch.Tensor) and result.dtype in (torch.bfloat16, torch.float16)
            for result in results
        ):
            self.seen.append(name)
        return out


def watch(monkeypatch, owner, name, seen, calls):
    original = getattr(owner, name)

    def watched(self, *args, **kwargs):
        calls.append(name)
        with _Half(seen):
            return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, watched)


def watch_solver(monkeypatch, kind, seen, calls):
    original = kind.prune_group

    def watched(self, group, sparsity):
        news = original(self, group, sparsity)
        while True:
            with _Half(seen):
                new = next(news, None)
            if new is None:
                return
            calls.append("solver")
            assert new.weight.dtype == torch.float32
            yield new

    monkeypatch.setattr(kind, "prune_group", watched)


CPU = torch.device("cpu")
SOLVERS = sorted(BUILTIN.keys() - {"dense", "random", "maskllm", "depth"})


@pytest.mark.parametrize("method", SOLVERS)
def test_statistics_and_solver_of_a_bfloat16_model_are_float32(method, monkeypatch):
    pruner = METHODS.make(method, METHODS.resolve_options(method, {}, seed=0))
    model, tokens = tiny_model("llama").to(torch.bfloat16), tiny_tokens()
    seen, calls = [], []
    watch(monkeypatch, StatsAccumulator, "add", seen, calls)
    watch(monkeypatch, _Accumulators, "add_product", seen, calls)
    watch(monkeypatch, _Accumulators, "add_gradient", seen, calls)
    watch_solver(monkeypatch, type(pruner), seen, calls)
    gradients = None
    if pruner.needs.gradients:
        gradients = gradient_norms(model, tokens, norm=pruner.norm)
        assert "add_product" in calls or "add_gradient" in calls
    walker = BlockWalker(
        model, token_ids=tokens, inputs=PrunerInputs(gradients=gradients), batch_tokens=48
    )
    sparsity = {linear.name: Sparsity.parse("0.5") for linear in find_linears(model)}
    pruner.prune(walker, sparsity)
    # the step of a grid is rounded to float16, as it is stored; nothing is computed with that
    assert set(seen) <= ({"_to_copy"} if method in ("gptq", "rtn") else set())
    assert calls.count("solver") == len(sparsity)
    assert ("add" in calls) == pruner.needs.calibration
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_methods_without_a_solver_are_no_group_pruners():
    for name in BUILTIN.keys() - set(SOLVERS):
        pruner = METHODS.make(name, METHODS.resolve_options(name, {}, seed=0))
        assert not isinstance(pruner, GroupPruner), name


def test_sums_of_bfloat16_inputs_are_those_of_float64():
    """A sum in bfloat16 stops growing at 256 times its terms; this one does not."""
    rows = torch.rand(5000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for hessian in (False, True):
        stats = StatsAccumulator(hessian=hessian)
        for part in rows.split(700):
            stats.add(part)
        actual = stats.result(samples=1, width=8, device=CPU)
        exact = rows.double().T @ rows.double()
        exact_enough = 1e-4 if hessian else 1e-12
        assert torch.allclose(actual.sum_squares, exact.diag(), rtol=exact_enough)
        if hessian:
            assert actual.gram.dtype == torch.float32
            assert torch.allclose(actual.gram.double(), exact, rtol=exact_enough)
    in_bfloat16 = torch.zeros(8).bfloat16()
    for row in rows:
        in_bfloat16 += row * row
    assert (in_bfloat16.double() < 0.5 * exact.diag()).all()  # what the test above would catch
