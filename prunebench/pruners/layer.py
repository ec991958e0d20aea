"""The contract of a pruner, and the base of nearly every one-shot method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunebench.calibration.stats import InputStats
from prunebench.models.gradients import Norm
from prunebench.models.source import CatalogEntry
from prunebench.models.walker import BlockWalker, LinearGroup
from prunebench.sparsity import Sparsity
from prunebench.spec import OptionValue


@dataclass(frozen=True)
class TrainingNeeds:
    """Windows that a method learns from.

    Attributes:
        text: A text name as `--calibration` takes it.
        samples: Windows wanted; fewer if the text is short.
        seqlen: Tokens in one.
        held_out: More windows, which only decide what is kept.
        least: Windows without which it cannot begin.
        steps: Training steps, for the progress bar.
    """

    text: str
    samples: int
    seqlen: int
    held_out: int
    least: int
    steps: int


@dataclass(frozen=True)
class Needs:
    """What a method or an allocator needs; it may depend on its options.

    Attributes:
        calibration: Statistics of the inputs over the calibration windows.
        hessian: The Gram matrix of the inputs too, not only their norms.
        gradients: Which norm of the dense model's gradients over the same windows, if any.
        training: Windows to learn from.
        masks: Name of masks to read, see `models.masks`.
        whole_model: The model is run from any block to its end, again and again, so all weights
            must be in memory.
    """

    calibration: bool = False
    hessian: bool = False
    gradients: Norm | None = None
    training: TrainingNeeds | None = None
    masks: str | None = None
    whole_model: bool = False

    @property
    def tokens(self) -> bool:
        """Whether calibration tokens are read at all."""
        return self.calibration or self.gradients is not None


BEYOND_TARGET = "zeros beyond the target"


@dataclass(frozen=True)
class LayerEvent:
    """Something a method had to work around in one layer, for the result to show."""

    layer: str
    kind: str
    value: float | None = None


@dataclass(frozen=True)
class Pruned:
    """A new weight, and what a method knows of it.

    Attributes:
        weight: float32, zeros where pruned.
        loss: The layer's reconstruction error 1/2 tr(D H D^T), D the change of the weight and H
            the Hessian with its damping, if the method knows it.
        events: What it had to work around.
    """

    weight: Float[Tensor, "out in"]
    loss: float | None = None
    events: tuple[LayerEvent, ...] = ()


@dataclass(frozen=True)
class PruneReport:
    """What a method has to say of its work; no events means nothing unusual happened.

    Attributes:
        losses: Reconstruction error of each layer, by name, see `Pruned.loss`.
        learned: How a training went, for methods that train.
    """

    events: tuple[LayerEvent, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    learned: TrainingReport | None = None

    @property
    def zeros_beyond(self) -> dict[str, int]:
        """Zeros that the method had to make beyond the target, by layer."""
        return {e.layer: int(e.value or 0) for e in self.events if e.kind == BEYOND_TARGET}


@dataclass(frozen=True)
class CurvePoint:
    """What was measured at the end of a training step; step 0 is where it began.

    Attributes:
        step: Steps taken.
        tokens: Tokens trained on so far, over all processes.
        loss: Mean training loss of the step in nats a token, with soft masks; None at step 0.
        temperature, scale: Of the step.
        certainty: Mean over the groups of the largest probability, without noise.
        changed: Share of the groups whose choice is not the prior's.
        held_out_ppl: Perplexity of the hard mask on the held-out windows, where it was measured.
        seconds: Since the beginning.
    """

    step: int
    tokens: int
    loss: float | None
    temperature: float
    scale: float
    certainty: float
    changed: float
    held_out_ppl: float | None
    seconds: float


@dataclass(frozen=True)
class TrainingReport:
    """How a training went.

    Attributes:
        best_step: The step whose mask was kept; 0 is the prior.
        processes: Processes that learned together.
        curve: One point a step.
        prior_scores: What the model got with the mask that was begun with; empty if it was not
            asked.
    """

    best_step: int
    processes: int
    curve: tuple[CurvePoint, ...]
    prior_scores: tuple[Any, ...] = ()


@runtime_checkable
class Pruner(Protocol):
    """Zeroes weights in place, block by block, until `sparsity` is met.

    An implementation is a frozen dataclass whose fields are its options.
    """

    @property
    def needs(self) -> Needs:
        """What it needs; a class attribute, unless it depends on options."""

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Prune every linear of `walker` to its sparsity, by name."""


@runtime_checkable
class DependsOnModel(Protocol):
    """A pruner that fills in options by what is known of the model."""

    def for_model(self, entry: CatalogEntry | None, calibration: str | None) -> Any:
        """Return the pruner with all options filled in.

        Args:
            entry: The catalogue's row of the model, if it has one.
            calibration: The calibration text of the run.
        """

    def options(self) -> dict[str, OptionValue]:
        """Return the options that matter, filled in."""

    def check(self, sparsity: Sparsity) -> None:
        """Refuse a sparsity that the method cannot reach, before anything is loaded."""


@dataclass(frozen=True)
class Forecast:
    """What a training will need.

    Attributes:
        memory: Bytes by item, in each process.
        tokens: To learn from, over all processes.
        seconds: About how long it takes, if that could be estimated.
    """

    memory: Mapping[str, int]
    tokens: int
    seconds: float | None


@runtime_checkable
class Forecasts(Protocol):
    """A pruner that can say what it will need before anything is loaded."""

    def forecast(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        dtype: torch.dtype,
        device: torch.device,
        processes: int,
    ) -> Forecast | None:
        """Return what is needed, or None if nothing is trained.

        Args:
            model: On the meta device: shapes alone.
            sparsity: The target.
            dtype: Of the weights.
            device: Where it will run.
            processes: How many learn together.
        """


class GroupPruner(ABC):
    """A method that decides about the linears of one input at a time."""

    needs: ClassVar[Needs] = Needs()

    @abstractmethod
    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Return the new weights of linears that read one input, in the order of the group.

        Args:
            group: The linears, whose weights must not be changed here, and their statistics.
            sparsity: The target of every linear, by name.
        """

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Walk the model and replace every weight by what `prune_group` makes of it."""
        needs = self.needs
        with closing(walker.groups(stats=needs.calibration, hessian=needs.hessian)) as groups:
            for group in groups:
                notes = walker.notes[-1]
                if group.stats is not None and group.stats.tokens == 0:
                    notes += [
                        asdict(LayerEvent(one.name, "no calibration token"))
                        for one in group.linears
                    ]
                for linear, new in zip(
                    group.linears, self.prune_group(group, sparsity), strict=True
                ):
                    linear.write(new.weight)
                    notes += map(asdict, new.events)
                    if new.loss is not None:
                        notes.append({"layer": linear.name, "loss": new.loss})
                del group, new  # a Hessian is freed before the next is made
        return _report(walker.notes)


def _report(notes: Iterable[Iterable[Mapping[str, Any]]]) -> PruneReport:
    """Return what the notes of all blocks say: events, and losses by layer."""
    rows = [row for block in notes for row in block]
    events = [LayerEvent(**row) for row in rows if "kind" in row]
    return PruneReport(tuple(events), {row["layer"]: row["loss"] for row in rows if "loss" in row})


class LayerPruner(GroupPruner):
    """A method that decides about one matrix at a time, from its weight and input statistics."""

    @abstractmethod
    def prune_weight(
        self, weight: Float[Tensor, "out in"], stats: InputStats | None, sparsity: Sparsity
    ) -> Float[Tensor, "out in"]:
        """Return the new weight.

        Args:
            weight: float32, finite; must not be changed in place.
            stats: Statistics of the inputs, or None for a method that needs none.
            sparsity: The target of this matrix.

        Returns:
            float32; zeros where pruned.
        """

    def prune_group(self, group: LinearGroup, sparsity: Mapping[str, Sparsity]) -> Iterator[Pruned]:
        """Prune one linear after the other by `prune_weight`."""
        for linear in group.linears:
            weight = self.prune_weight(linear.read(), group.stats, sparsity[linear.name])
            yield Pruned(weight)
