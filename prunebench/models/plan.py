"""The self-check before a walk: does the replay equal the model, and how is each linear used?

One sample goes through the model and through the replay; both must agree bit for bit. Meanwhile
every prunable matrix is accounted for: its module is called, or its parameter is multiplied, once
or several times; or it is an expert that this sample was not routed to. A matrix that is used in
another way, or not at all, is refused by name: pruned with wrong statistics it would look like
every other layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.models.linears import Linear
from prunebench.models.out_of_memory import is_out_of_memory
from prunebench.models.replay import TrueRun, not_replayable, record_calls, run_model
from prunebench.models.taps import Account
from prunebench.models.weights import weights_of


@dataclass(frozen=True)
class BlockPlan:
    """How a block uses its linears, observed once on a real sample.

    Attributes:
        groups: Linears that read the same tensors, in execution order; the first of a group is its
            leader. Every linear is in exactly one group.
        dynamic: True if the data decide which linears run (experts). Those that the sample did not
            reach are groups of one, at the end.
        repeated: Linears that run more than once in a pass; their statistics are summed.
        by_product: Linears that are not called as modules; their input is captured at the product.
        returns: What follows the hidden state in the block's output, or None.
        leaves_tensors: Whether blocks of the model put tensors into their arguments, where later
            ones find them (keys and values that layers share).
    """

    groups: list[list[Linear]]
    dynamic: bool
    repeated: frozenset[Linear]
    by_product: frozenset[Linear]
    returns: tuple[Any, ...] | None
    leaves_tensors: bool


@torch.no_grad()
def check_replay(
    model: nn.Module, blocks: nn.ModuleList, linears: Sequence[list[Linear]], token_ids: Tensor
) -> list[BlockPlan]:
    """Replay one sample and compare it bit for bit with the model; return each block's plan.

    Args:
        model: The model, under `plain_inference`.
        blocks: Its blocks.
        linears: The prunable matrices of each block.
        token_ids: One sample, (1, seqlen).

    Raises:
        IncompatibleData: The replay differs, the activations are not finite, or a linear is used
            in a way that cannot be observed; the message names the first such block or linear.
    """
    with _refusing(model):
        true = run_model(model, blocks, token_ids)
        hidden, calls = record_calls(model, blocks, token_ids, returns_tuple=true.returns_tuple)
    # Now block by block, so that the first block that differs can be named.
    weights = weights_of(model)
    plans: list[BlockPlan] = []
    for index, block in enumerate(blocks):
        if not torch.equal(hidden, true.inputs[index]):
            if not torch.isfinite(true.inputs[index]).all():
                raise IncompatibleData(
                    f"the activations before block {index} are NaN or infinite",
                    where="the model overflows on the calibration text",
                    fix="use --dtype float32 or bfloat16, or check the weights",
                )
            raise not_replayable(model, f"the replay differs from the model before block {index}")
        with _refusing(model), weights.open_block(index), Account(linears[index]) as account:
            hidden = calls[index].run(block, hidden)
        plans.append(_plan(block, linears[index], account, true, index))
    if not torch.equal(hidden, true.output):
        raise not_replayable(
            model, f"the replay differs from the model after block {len(blocks) - 1}"
        )
    return plans


@contextlib.contextmanager
def _refusing(model: nn.Module) -> Iterator[None]:
    """Turn an error of a model that runs in parts into a refusal of its architecture."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise not_replayable(model, f"{type(error).__name__}: {error}".split("\n")[0]) from error


def _plan(
    block: nn.Module, linears: list[Linear], account: Account, true: TrueRun, index: int
) -> BlockPlan:
    """Return a block's plan, or refuse a linear whose input was not captured."""
    called, products = _inputs_of(account.called), _inputs_of(account.products)
    by_product = set()
    inputs: dict[Linear, list[Tensor]] = {}  # the inputs of each linear, in execution order
    for linear in _in_order(account):
        as_module, multiplied = called.get(linear, []), products.get(linear, [])
        if linear in account.others or not multiplied:
            user = account.others.get(linear, "code that cannot be observed")
            raise _unaccounted(linear, f"its weight is used by {user}, so its input is not known")
        if linear.expert is None and not _same_tensors(as_module, multiplied):
            by_product.add(linear)  # e.g. Mamba's dt_proj: never called, or with another input
        inputs[linear] = (
            multiplied if linear in by_product or linear.expert is not None else as_module
        )
    unreached = [linear for linear in linears if linear not in inputs]
    fused = {linear.parameter_name for linear in inputs if linear.expert is not None}
    for linear in unreached:
        if linear.expert is not None and linear.parameter_name not in fused:
            raise _unaccounted(linear, "its experts are not applied one by one")
        if not _is_expert(block, linear, inputs):
            raise _unaccounted(linear, "the forward pass does not use it")
    return BlockPlan(
        groups=_groups(inputs) + [[linear] for linear in unreached],
        dynamic=bool(unreached) or any(linear.expert is not None for linear in linears),
        repeated=frozenset(linear for linear, tensors in inputs.items() if len(tensors) > 1),
        by_product=frozenset(by_product),
        returns=true.returns_tuple[index],
        leaves_tensors=true.leaves_tensors,
    )


def _inputs_of(uses: list[tuple[Linear, Tensor]]) -> dict[Linear, list[Tensor]]:
    inputs: dict[Linear, list[Tensor]] = {}
    for linear, tensor in uses:
        inputs.setdefault(linear, []).append(tensor)
    return inputs


def _in_order(account: Account) -> list[Linear]:
    """Return the linears that were used, in the order of their first use."""
    uses = [*account.products, *account.called]
    return list(dict.fromkeys([*(linear for linear, _ in uses), *account.others]))


def _same_tensors(left: list[Tensor], right: list[Tensor]) -> bool:
    """Return whether two lists hold the same memory; the views may differ."""
    return len(left) == len(right) and all(
        a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
        for a, b in zip(left, right, strict=True)
    )


def _groups(inputs: dict[Linear, list[Tensor]]) -> list[list[Linear]]:
    """Group the linears that read the identical tensors, in the order of `inputs`."""
    groups: dict[tuple[int, ...], list[Linear]] = {}
    for linear, tensors in inputs.items():
        # identity, not equality: `Account` holds the tensors, so no id is reused
        groups.setdefault(tuple(map(id, tensors)), []).append(linear)
    return list(groups.values())


def _is_expert(block: nn.Module, linear: Linear, inputs: dict[Linear, list[Tensor]]) -> bool:
    """Return whether a linear that did not run is an expert: one of several, of which others ran.

    The alternatives are the matrices of a fused parameter, or the members of a `ModuleList` inside
    the block.
    """
    if linear.expert is not None:
        return any(other.parameter_name == linear.parameter_name for other in inputs)
    ran = {id(other.module) for other in inputs}
    for module in block.modules():
        if isinstance(module, nn.ModuleList):
            members = [{id(part) for part in member.modules()} for member in module]
            if any(id(linear.module) in member for member in members):
                return any(not member.isdisjoint(ran) for member in members)
    return False


def why_not_sequential(plan: BlockPlan, *, used_later: bool) -> str:
    """Return why the linears of a block cannot be pruned one after the other; empty if they can.

    All batches must pause at the same linears, in the same order, once each.
    """
    if plan.by_product:
        return "a layer is not called as a module"
    if plan.dynamic:
        return "which experts run depends on the text"
    if used_later:
        return "later blocks use its weights again"
    return "a layer runs twice" if plan.repeated else ""


def _unaccounted(linear: Linear, reason: str) -> IncompatibleData:
    return IncompatibleData(
        f"{linear.name} cannot be pruned with statistics of its input",
        where=reason,
        fix="use a method without calibration data, another architecture, or report this one",
    )


@dataclass(frozen=True)
class LaterUse:
    """A group of a later block that shares its matrices with an earlier block.

    Attributes:
        leader: The group's leader in the later block, where its input is captured.
        slots: Indices of the earlier block's groups, whose statistics include this input.
    """

    leader: Linear
    slots: tuple[int, ...]


def separate_later_uses(
    plans: list[BlockPlan], repeats: Mapping[Linear, Linear]
) -> tuple[list[BlockPlan], list[list[LaterUse]]]:
    """Remove the repeats from the plans: return plans with each matrix once, and its later uses.

    Linears of one group stay together only if they are in one group wherever they are used.

    Args:
        plans: The plans of all blocks.
        repeats: From `find_repeats`.

    Returns:
        The plans without repeats, and for each block its `LaterUse`s.
    """
    leaders = {
        linear: members[0] for plan in plans for members in plan.groups for linear in members
    }
    later_leaders: dict[Linear, list[Linear]] = {}
    for repeat, linear in repeats.items():
        later_leaders.setdefault(linear, []).append(leaders[repeat])
    separated, later = [], []
    for plan in plans:
        groups: dict[tuple[Linear, ...], list[Linear]] = {}
        for members in plan.groups:
            for linear in members:
                if linear not in repeats:
                    key = (members[0], *later_leaders.get(linear, ()))
                    groups.setdefault(key, []).append(linear)
        slots: dict[Linear, list[int]] = {}
        for slot, (_, *uses) in enumerate(groups):
            for use in uses:
                slots.setdefault(use, []).append(slot)
        separated.append(replace(plan, groups=list(groups.values())))
        later.append([LaterUse(leader, tuple(numbers)) for leader, numbers in slots.items()])
    return separated, later
