"""Statistics and gradients of the walker against the oracle and autograd."""

from collections import defaultdict

import torch
from torch.nn import functional

from prunebench.models.gradients import gradient_norms
from prunebench.models.linears import find_linears
from prunebench.models.walker import BlockWalker
from prunebench.testing import tiny_tokens
from tests.oracle import Oracle


def watch(model, tokens):
    """What an ordinary forward pass multiplies; experts one by one, as a user may choose."""
    experts = model.get_experts_implementation()
    if any(experts.values()):
        model.set_experts_implementation("eager")
    with torch.no_grad(), Oracle(model) as oracle:
        model(input_ids=tokens, use_cache=False)
    if any(experts.values()):
        model.set_experts_implementation(experts)
    return oracle


def require_equal_statistics(model, *, samples=5, **how):
    """Compare the walker's sums with the oracle's for every linear; return how many are idle."""
    tokens = tiny_tokens(samples=samples)
    oracle = watch(model, tokens)
    groups = list(BlockWalker(model, token_ids=tokens, **how).groups(stats=True, write=False))
    linears = [linear for group in groups for linear in group.linears]
    assert len(set(linears)) == len(linears), "a linear is pruned twice"
    assert {linear.name for linear in linears} == {linear.name for linear in find_linears(model)}
    idle = 0
    for group in groups:
        for linear in group.linears:
            stored = linear.stored
            place = stored.untyped_storage().data_ptr()
            step = stored.stride(0 if linear.transposed else 1)
            assert place not in oracle.others, f"{linear.name}: {oracle.others[place]}"
            expected = oracle.sums.get((place, stored.storage_offset(), step))
            if expected is None:
                assert group.stats.tokens == 0, f"{linear.name} is not used"
                idle += 1
                continue
            torch.testing.assert_close(
                group.stats.sum_squares, expected, rtol=1e-6, atol=0, msg=linear.name
            )
    return idle


def require_equal_gradients(model):
    """Compare sums of |gradient| over windows with autograd's, for every linear."""
    tokens, linears = tiny_tokens(samples=2, seqlen=16), find_linears(model)
    norms = gradient_norms(model, tokens, norm="l1")
    parameters = {
        linear.parameter_name: getattr(linear.module, linear.attribute) for linear in linears
    }
    expected = defaultdict(float)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for window in tokens.split(1):
        logits = model(input_ids=window, use_cache=False).logits
        loss = functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])
        made = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, made, strict=True):
            expected[name] = expected[name] + (0 if gradient is None else gradient.abs())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for linear in linears:
        gradient = torch.as_tensor(expected[linear.parameter_name])
        gradient = gradient if linear.expert is None else gradient[linear.expert]
        gradient = gradient.T if linear.transposed else gradient
        torch.testing.assert_close(
            norms.read(linear.name), gradient, rtol=1e-3, atol=1e-4 * float(gradient.max()),
            msg=linear.name,
        )  # fmt: skip
