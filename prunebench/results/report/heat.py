"""Layer by layer: the realised sparsity and the reconstruction loss of chosen runs of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from prunebench.results.schema import LayerSparsity, Result

# model.layers.12.mlp.up_proj -> block 12, module mlp.up_proj
_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
# mlp.experts.7.w1 -> mlp.experts.*.w1
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_MIN_RANGE = 0.01  # realised ratios that differ by less than this are all of one color


@dataclass(frozen=True)
class HeatRun:
    """One run: a value for every module (row) and block (column), None where it has no such layer.

    Attributes:
        anchor: The place of its row in the page.
        losses: Empty where no loss is known.
    """

    name: str
    anchor: str
    ratios: tuple[float | None, ...]
    losses: tuple[float | None, ...]


@dataclass(frozen=True)
class HeatMap:
    """A grid of modules and blocks, and the runs that fill it, module after module.

    Attributes:
        left_out: How many more runs there are.
    """

    modules: tuple[str, ...]
    blocks: tuple[int, ...]
    runs: tuple[HeatRun, ...]
    left_out: int


def heat_map(
    runs: Sequence[tuple[str, str, Result]], *, at_most: int | None = None
) -> HeatMap | None:
    """Make a heat map of the runs whose layers differ: by allocation, or by a known loss.

    Args:
        runs: Name, place in the page, and result of each.
        at_most: How many of them, the first ones; None for all.
    """
    telling = [(name, anchor, result) for name, anchor, result in runs if _differs(result)]
    folded = {
        anchor: (name, _fold(result.sparsity.layers))
        for name, anchor, result in telling[:at_most]
        if result.sparsity
    }
    # a set that keeps the order of the layers in the model
    places = dict.fromkeys(place for _, layers in folded.values() for place in layers)
    if not places:
        return None
    modules = tuple(dict.fromkeys(module for module, _ in places))
    blocks = tuple(sorted({block for _, block in places}))
    # module after module: cell (i, j) has the key i * len(blocks) + j, in the page's script too
    grid = [(module, block) for module in modules for block in blocks]
    return HeatMap(
        modules=modules,
        blocks=blocks,
        left_out=len(telling) - len(folded),
        runs=tuple(_run(name, anchor, layers, grid) for anchor, (name, layers) in folded.items()),
    )


def _differs(result: Result) -> bool:
    layers = result.sparsity.layers if result.sparsity else []
    if not layers:
        return False
    return result.spec.allocation != "uniform" or any(layer.loss is not None for layer in layers)


@dataclass
class _Place:
    zeros: int = 0
    size: int = 0
    loss: float | None = None


def _fold(layers: Sequence[LayerSparsity]) -> dict[tuple[str, int], _Place]:
    """Gather layers by module and block; the experts of a block share a place."""
    places: dict[tuple[str, int], _Place] = {}
    for layer in layers:
        match = _BLOCK.match(layer.name)
        block, rest = (int(match[1]), match[2]) if match else (0, layer.name)
        # the dot in front lets a number at the very beginning match, and is cut off again
        place = places.setdefault((_NUMBER.sub("*", f".{rest}")[1:], block), _Place())
        place.zeros += layer.zeros
        place.size += layer.out_features * layer.in_features
        if layer.loss is not None:
            # errors 1/2 tr(D H D^T) of the experts add up
            place.loss = (place.loss or 0.0) + layer.loss
    return places


def _run(
    name: str,
    anchor: str,
    layers: dict[tuple[str, int], _Place],
    grid: Sequence[tuple[str, int]],
) -> HeatRun:
    layer_places = [layers.get(place) for place in grid]
    losses = tuple(place.loss if place else None for place in layer_places)
    return HeatRun(
        name=name,
        anchor=anchor,
        # weighted by the size of the matrices, unlike a mean of their ratios
        ratios=tuple(
            place.zeros / place.size if place and place.size else None for place in layer_places
        ),
        losses=losses if any(loss is not None for loss in losses) else (),
    )


def ratio_range(run: HeatRun) -> tuple[float, float]:
    """Return the ends of the color scale of realised sparsity: as narrow as the run's own range."""
    finite = [value for value in run.ratios if value is not None]
    low, high = min(finite), max(finite)
    room = max(0.0, _MIN_RANGE - (high - low)) / 2
    return low - room, high + room


def loss_range(run: HeatRun) -> tuple[float, float] | None:
    """Return the ends of the logarithmic color scale of layer loss; None where none is above 0."""
    finite = [value for value in run.losses if value is not None and 0 < value < math.inf]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    # a log scale needs two different ends
    return low, high if high > low else low * 10
