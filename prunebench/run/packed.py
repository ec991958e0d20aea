"""Scoring the pruned model with packed 2:4 weights: `run --execute sparse24`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from prunebench.errors import CheckFailed
from prunebench.evaluate.perplexity import token_ppl
from prunebench.models.device import make_current
from prunebench.models.linears import Linear
from prunebench.results.schema import ExecutionBlock
from prunebench.run.plan import Plan
from prunebench.sparse24.layer import Conversion, convert
from prunebench.sparse24.policy import Policy

ALLOWED_DIFFERENCE = 0.001  # of the perplexity, relative
_WINDOWS = 4


@contextmanager
def packed_weights(
    plan: Plan, model: nn.Module, linears: list[Linear]
) -> Iterator[ExecutionBlock | None]:
    """Pack the weights of the model inside the context, and restore them at its end.

    The packed model is first compared with the masked dense one, on a few windows.

    Raises:
        IncompatibleData: A linear is not 2:4; layer and group are named.
        CheckFailed: Its perplexity differs by more than 0.1%.
    """
    if plan.spec.execute == "dense":
        yield None
        return
    windows = plan.texts[0].windows[:_WINDOWS] if plan.texts else None  # [_WINDOWS, seqlen]
    # before packing: afterwards the dense weights are gone from the layers
    masked = None if windows is None else token_ppl(model, windows)
    make_current(plan.device)
    policy = Policy.load(plan.device, forced=plan.setup.backend)
    with plan.progress.stage("pack", detail=f"{len(linears)} linears, one after the other"):
        conversion = convert(model, linears, policy=policy, strict=True, for_memory=True)
    try:
        difference = None
        if windows is not None and masked is not None:
            difference = _difference(model, windows, masked)
        yield _block(plan, conversion, windows, difference)
    finally:
        # also after an error: what follows reads the dense weights
        conversion.restore()


def _difference(model: nn.Module, windows: Tensor, masked: float) -> float:
    packed = token_ppl(model, windows)
    difference = packed / masked - 1
    # NaN compares false with everything: it must be asked for
    if not math.isfinite(difference) or abs(difference) > ALLOWED_DIFFERENCE:
        raise CheckFailed(
            f"the packed model is not the masked one: perplexity {packed:.4f}, not {masked:.4f}",
            where=f"on the first {len(windows)} windows, {difference:+.3%}",
            fix="use --backend reference, and report this backend and device",
        )
    return difference


def _block(
    plan: Plan, conversion: Conversion, windows: Tensor | None, difference: float | None
) -> ExecutionBlock:
    # the backend of a layer depends on the number of tokens
    tokens = plan.texts[0].windows.shape[1] if plan.texts else plan.spec.ppl_seqlen
    return ExecutionBlock(
        mode="sparse24",
        backends=conversion.count(tokens),
        dense_layers=conversion.dense,
        stored_bytes=conversion.stored_bytes,
        dense_bytes=conversion.dense_bytes,
        checked_windows=0 if windows is None else len(windows),
        ppl_difference=difference,
    )
