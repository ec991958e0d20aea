"""The contracts of pruners and recoverers, checked on tiny models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunebench.calibration.training import Training
from prunebench.errors import PrunebenchError, UsageError
from prunebench.models.gradients import gradient_norms
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_linears
from prunebench.models.measure import measure_linear, require_met, require_on_grid
from prunebench.models.pruned_block import Recovery
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.models.weight_grid import WeightGrid
from prunebench.pruners.magnitude import Magnitude
from prunebench.pruners.protocol import DependsOnModel, Pruner, grid_of
from prunebench.pruners.removal import BlockRemover, require_removed_only
from prunebench.recovery.protocol import BlockRecoverer, ModelRecoverer
from prunebench.sparsity import Sparsity
from prunebench.spec import WithinBlock
from prunebench.testing.tiny_models import FUSED_EXPERTS, tiny_model, tiny_tokens

# 1:4 and 3:4 tell kept from pruned: a method that takes N for the pruned ones swaps them
SPARSITIES = ("0.5", "0.3", "2:4", "1:4", "3:4")
"""Targets that a method is checked with, except those it refuses."""

SHARES = ("0.34", "0.67")
"""Shares of the blocks that a method is checked with that removes blocks."""


@dataclass(frozen=True)
class Outcome:
    """One check of the contract: what was checked, on what, and why it failed (empty if not)."""

    check: str
    model: str
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the check held."""
        return not self.failure


@dataclass(frozen=True)
class _Trial:
    pruner: Pruner
    model: nn.Module
    sparsity: Sparsity
    within_block: WithinBlock = "joint"
    recoverer: BlockRecoverer | ModelRecoverer | None = None

    def run(self) -> nn.Module:
        tokens = tiny_tokens(samples=6 if self.recoverer is None else 16)
        gradients = None
        norm = self.pruner.needs.gradients
        if norm is not None:
            gradients = gradient_norms(self.model, tokens, norm=norm)
        training = None
        if self.pruner.needs.training is not None:
            training = Training(tiny_tokens(samples=8), tiny_tokens(samples=2, seed=1))
        asked = {linear.name: self.sparsity for linear in find_linears(self.model)}
        walker = BlockWalker(
            self.model,
            token_ids=tokens,
            within_block=self.within_block,
            inputs=PrunerInputs(gradients=gradients, training=training),
            recovery=Recovery(self.recoverer, sparsity=asked)
            if isinstance(self.recoverer, BlockRecoverer)
            else None,
            # two windows of 24: statistics must add up over several batches
            batch_tokens=48,
        )
        dense = {linear.name: linear.stored.clone() for linear in walker.linears}
        self.pruner.prune(walker, asked)
        if isinstance(self.recoverer, ModelRecoverer):
            data = Training(tiny_tokens(samples=8), tiny_tokens(samples=2, seed=1))
            self.recoverer.recover_model(self.model, dense, data)
        return self.model


def check_pruner(
    pruner: Pruner,
    *,
    architectures: tuple[str, ...] = ("llama", "gpt2", "falcon"),
    sparsities: tuple[str, ...] | None = None,
) -> list[Outcome]:
    """Run the contract that every pruner must keep, on tiny models; nothing is raised.

    Args:
        pruner: The method, with its options.
        architectures: Names of tiny models to run it on.
        sparsities: Targets that it claims to reach; by default those of `SPARSITIES` that it does
            not refuse.
    """
    if sparsities is None and isinstance(pruner, BlockRemover):
        sparsities = SHARES
    elif sparsities is None:
        # a method that only quantizes takes no sparsity at all
        sparsities = tuple(text for text in SPARSITIES if _takes(pruner, text)) or ("0",)
    checks = (
        (architecture, name, check)
        for architecture in architectures
        for name, check in _checks(pruner, architecture, sparsities)
    )
    return _outcomes(checks)


def _outcomes(checks: Iterable[tuple[str, str, Callable[[], None]]]) -> list[Outcome]:
    """Run checks, (architecture, name, check) each; what one raises is its failure."""
    outcomes: list[Outcome] = []
    for architecture, name, check in checks:
        failure = ""
        try:
            check()
        except PrunebenchError as error:
            failure = str(error).replace("\n", "; ")
        except Exception as error:  # a plug-in may raise anything: report it and continue
            failure = f"{type(error).__name__}: {error}"
        outcomes.append(Outcome(name, architecture, failure))
    return outcomes


def check_recoverer(
    recoverer: BlockRecoverer | ModelRecoverer,
    *,
    architectures: tuple[str, ...] = ("llama", "gpt2", "falcon"),
    sparsities: tuple[str, ...] = ("0.5", "2:4"),
) -> list[Outcome]:
    """Run the contract that every recoverer must keep, on tiny models; nothing is raised.

    Args:
        recoverer: The recoverer, with its options.
        architectures: Names of tiny models to run it on.
        sparsities: Targets to which the models are pruned (by magnitude) before.
    """
    checks = (
        (architecture, name, check)
        for architecture in architectures
        for name, check in _recovery_checks(recoverer, architecture, sparsities)
    )
    return _outcomes(checks)


def _recovery_checks(
    recoverer: BlockRecoverer | ModelRecoverer, architecture: str, sparsities: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], None]]]:
    dense = tiny_model(architecture)

    @functools.cache
    def recovered(text: str, again: bool = False) -> nn.Module:
        sparsity = Sparsity.parse(text)
        return _Trial(Magnitude(), copy.deepcopy(dense), sparsity, recoverer=recoverer).run()

    for text in sparsities:
        reached = functools.partial(_reached_by, recovered, text, dense)
        yield f"keeps the zeros of {text}", reached
    half = sparsities[0]
    if not (isinstance(recoverer, BlockRecoverer) and recoverer.trains_norms):
        yield "leaves everything else alone", lambda: _check_rest(recovered(half), dense)
    yield (
        "same input, same weights",
        lambda: _check_repeatable(recovered(half), recovered(half, again=True)),
    )
    # a training of the whole model is refused where nothing is pruned
    if isinstance(recoverer, BlockRecoverer):
        yield "ratio 0 changes nothing", lambda: _check_identity(recovered("0"), dense)
    yield "puts hooks and settings back", lambda: _check_clean(recovered(half), dense)


def _reached_by(recovered: Callable[[str], nn.Module], text: str, dense: nn.Module) -> None:
    _check_reached(recovered(text), dense, Sparsity.parse(text))


def _takes(pruner: Pruner, sparsity: str) -> bool:
    """Return whether a method accepts a sparsity."""
    if not isinstance(pruner, DependsOnModel):
        return True
    try:
        pruner.check(Sparsity.parse(sparsity))
    except UsageError:
        return False
    return True


def _checks(
    pruner: Pruner, architecture: str, sparsities: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], None]]]:
    # never pruned itself: every trial works on a copy
    dense = tiny_model(architecture)
    # sequential needs inputs, and linears that are modules: fused experts are slices of one tensor
    orders: tuple[WithinBlock, ...] = ("joint",)
    if architecture not in FUSED_EXPERTS and pruner.needs.calibration:
        orders = ("joint", "sequential")
    half = Sparsity.parse(sparsities[0])
    grid = grid_of(pruner)
    removes = isinstance(pruner, BlockRemover)

    def trial(sparsity: Sparsity, order: WithinBlock = "joint") -> nn.Module:
        return _Trial(pruner, copy.deepcopy(dense), sparsity, order).run()

    pruned = functools.cache(trial)  # several checks look at one model

    def reached(sparsity: Sparsity, order: WithinBlock) -> None:
        _check_reached(pruned(sparsity, order), dense, sparsity, grid=grid)

    def removed(sparsity: Sparsity) -> None:
        require_removed_only(pruned(sparsity, "joint"), dense, sparsity)

    for text in sparsities if removes else ():
        yield f"removes {text} of the blocks", functools.partial(removed, Sparsity.parse(text))
    for text in () if removes else sparsities:
        for order in orders:
            yield (
                f"reaches {text}, {order}",
                functools.partial(reached, Sparsity.parse(text), order),
            )
    if not removes:
        yield "leaves everything else alone", lambda: _check_rest(pruned(half, "joint"), dense)
    # this `trial` is not the cached one: it must prune again
    yield "same input, same weights", lambda: _check_repeatable(pruned(half, "joint"), trial(half))
    if grid is None:
        yield "ratio 0 changes nothing", lambda: _check_identity(trial(Sparsity(0.0)), dense)
    else:
        yield f"holds {grid.bits}-bit weights", lambda: _check_grid(pruned(half, "joint"), grid)
    yield "puts hooks and settings back", lambda: _check_clean(pruned(half, "joint"), dense)


def _check_reached(
    pruned: nn.Module, dense: nn.Module, sparsity: Sparsity, *, grid: WeightGrid | None = None
) -> None:
    before = {linear.name: int((linear.stored == 0).sum()) for linear in find_linears(dense)}
    after = [measure_linear(linear, sparsity) for linear in find_linears(pruned)]
    # weights that are rounded may become 0, however many
    beyond = {layer.linear.name: layer.zeros for layer in after} if grid else {}
    require_met(after, before, {layer.linear.name: sparsity for layer in after}, beyond=beyond)
    for layer in after:
        # -0.0 equals 0 but has other bytes: hashes and packed formats would differ
        if layer.negative_zeros:
            raise AssertionError(f"{layer.linear.name} holds {layer.negative_zeros} times -0.0")


def _check_grid(pruned: nn.Module, grid: WeightGrid) -> None:
    require_on_grid([measure_linear(x, Sparsity(0.0), grid) for x in find_linears(pruned)], grid)


def _check_rest(pruned: nn.Module, dense: nn.Module) -> None:
    prunable = {linear.parameter_name for linear in find_linears(dense)}
    parameters = dict(pruned.named_parameters())
    for name, parameter in dense.named_parameters():
        if parameters[name].dtype != parameter.dtype or parameters[name].shape != parameter.shape:
            raise AssertionError(f"{name} changed its dtype or shape")
        if name not in prunable and not torch.equal(parameters[name], parameter):
            raise AssertionError(f"{name} is not a linear of a block, and changed")


def _check_repeatable(pruned: nn.Module, again: nn.Module) -> None:
    if hash_weights(again) != hash_weights(pruned):
        raise AssertionError("two runs with the same seed and tokens gave different weights")


def _check_identity(pruned: nn.Module, dense: nn.Module) -> None:
    parameters = dict(pruned.named_parameters())
    for name, parameter in dense.named_parameters():
        if not torch.equal(parameters[name], parameter):
            raise AssertionError(f"{name} changed although nothing was to be pruned")


def _check_clean(pruned: Any, dense: Any) -> None:
    for name, module in pruned.named_modules():
        # a replaced `forward` stands in the instance, in front of the class's
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise AssertionError(f"{name} still has a hook")
    if pruned.config.use_cache != dense.config.use_cache or pruned.training:
        raise AssertionError("use_cache or the training mode was not put back")
