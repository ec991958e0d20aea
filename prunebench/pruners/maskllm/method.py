"""MaskLLM: 2:4 masks that are learned end to end, with frozen weights; and published masks.

Paper: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models",
https://arxiv.org/abs/2409.17481: Gumbel softmax over the candidates of every group (section 3.2), a
prior mask (3.3), sparse weight regularization (3.4). Its code is licensed for research only and was
not used; what its text leaves open was read there: soft masks in training, a reward for large
weights that falls to zero, betas (0.9, 0.95).

What differs: noise comes from counters and is made again in the backward pass, the masked weight
lives in one workspace, and gradients of the logits are formed and applied in one pass, so that
beside the logits and the optimizer's moments nothing of their size exists; the hard mask is scored
on held-out text while it is learned, and the best one is kept, at worst the prior; the noise of a
step is one draw unless `noise_samples` says otherwise (theirs draws for every micro-batch). The
preset `laptop` has no noise and another optimizer, see `optimize`.

With `masks` nothing is learned: a mask file, such as the paper's published ones, is applied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.calibration.training import Training
from prunebench.distributed import world_size
from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.linears import Linear
from prunebench.models.masks import Masks
from prunebench.models.source import CatalogEntry
from prunebench.models.walker import BlockWalker
from prunebench.pruners.maskllm.candidates import candidates, choose, mask_of, require_learnable
from prunebench.pruners.maskllm.config import TrainingConfig
from prunebench.pruners.maskllm.learn import Learner
from prunebench.pruners.maskllm.memory_plan import MemoryPlan
from prunebench.pruners.maskllm.options import PRIORS, Options, require_prior
from prunebench.pruners.maskllm.presets import PRESETS
from prunebench.pruners.protocol import LayerEvent, Needs, Pruner, PruneReport
from prunebench.pruners.training import Forecast, TrainingNeeds, TrainingReport
from prunebench.sparsity import Sparsity
from prunebench.spec import OptionValue
from prunebench.training.checkpoint import train_saved
from prunebench.training.shards import Shards


@dataclass(frozen=True)
class MaskLLM(Options):
    """Learns which N of every M weights stay, by the loss of the whole model; see `Options`."""

    @property
    def needs(self) -> Needs:
        """Masks only, or training windows and whatever the prior's method needs."""
        if self.masks:
            return Needs(masks=self.masks)
        config = self.filled()
        training = TrainingNeeds(
            text=config.train_data or "",
            samples=config.batch * config.steps,
            seqlen=config.train_seqlen,
            held_out=config.held_out,
            least=config.batch,
            steps=config.steps,
        )
        if config.prior == "scratch":
            return Needs(training=training)
        if config.prior in PRIORS:
            return dataclasses.replace(_prior_method(config.prior).needs, training=training)
        return Needs(training=training, masks=config.prior)

    def filled(self) -> TrainingConfig:
        """Return the training's configuration: options that are None come from the preset."""
        return TrainingConfig.of(self, PRESETS[self.preset])

    def for_model(self, entry: CatalogEntry | None, calibration: str | None) -> MaskLLM:
        """Fill in model-dependent options: the model's published masks, unless `train` is set.

        Args:
            entry: The catalog's row of the model, if it has one.
            calibration: The calibration text of the run, the default text to train on.
        """
        masks = self.masks or (entry.masks if entry is not None and not self.train else None)
        if masks:
            self.require_no_training(masks)
            return dataclasses.replace(self, masks=masks)
        config = dataclasses.asdict(self.filled())
        require_prior(config["prior"])
        return dataclasses.replace(self, **config | {"train_data": self.train_data or calibration})

    def options(self) -> dict[str, OptionValue]:
        """Return the options that matter: `masks` alone if it is set, else all."""
        return {"masks": self.masks} if self.masks else dataclasses.asdict(self)

    def check(self, sparsity: Sparsity) -> None:
        """Refuse sparsities without candidates or with too many, and batches of unequal shares."""
        require_learnable(sparsity)
        if not self.masks:
            self.filled().require_shares(world_size())

    def forecast(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        dtype: torch.dtype,
        device: torch.device,
        processes: int,
    ) -> Forecast | None:
        """Return what a training will need; None if masks are applied."""
        if self.masks:
            return None
        return MemoryPlan(model, self.filled(), sparsity, dtype, device, processes).forecast()

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Learn or apply a mask for every linear of `walker`.

        Raises:
            IncompatibleData: Masks do not keep N of every M, or the loss is not finite.
            UsageError: The sparsity cannot be learned, or there is no training text.
        """
        target = next(iter(sparsity.values()))
        if not target.ratio:
            return PruneReport()
        if self.masks:
            if walker.inputs.masks is None:
                raise UsageError("masks are named, and none were opened")
            with closing(walker.groups(stats=False)) as groups:
                for linear in (member for group in groups for member in group.linears):
                    keep = _checked(walker.inputs.masks, linear, target)
                    linear.write(torch.where(keep.to(linear.stored.device), linear.read(), 0))
            return PruneReport()
        require_learnable(target)
        return _learn(self.filled(), walker, target)


def _learn(config: TrainingConfig, walker: BlockWalker, target: Sparsity) -> PruneReport:
    """Train masks, write the best one into the weights, and report the curve."""
    data = walker.inputs.training
    if data is None:
        raise UsageError("maskllm needs text to learn from", fix="give --set train_data=NAME")
    shards = Shards.of_group()
    config.require_shares(shards.world)
    assert target.kept is not None and target.group is not None
    table = candidates(target.kept, target.group)
    prior = _prior(config.prior, walker, target, table)
    learner = config.learner(walker, prior, table, shards)

    scores = _prior_scores(walker, learner, table, data) if prior else ()
    resumed = train_saved(learner, data, eval_every=config.eval_every, save_every=config.save_every)
    # the result records the step that a training resumed from
    events = (LayerEvent("all", "training resumed after step", float(resumed)),) if resumed else ()
    progress = learner.progress
    _write(walker, progress.best, table, shards)
    learned = TrainingReport(progress.best_step, shards.world, tuple(progress.curve), scores)
    return PruneReport(events, learned=learned)


def _prior(
    name: str, walker: BlockWalker, target: Sparsity, table: Tensor
) -> dict[str, Tensor] | None:
    """Return the choices of the prior's mask by linear, whole layers; the weights stay dense.

    Args:
        name: A method, `scratch` for no prior, or the name of masks that the walker has opened.
        walker: The model.
        target: N:M.
        table: The candidates, [choices, M].
    """
    if name == "scratch":
        return None
    masks = walker.inputs.masks
    if masks is not None:
        return {
            linear.name: choose(_checked(masks, linear, target), table) for linear in walker.linears
        }
    choices = {}
    with _weights_put_back(walker):
        # The method changes weights too (SparseGPT): only its mask is used, then the weights are
        # restored.
        _prior_method(name).prune(walker, {linear.name: target for linear in walker.linears})
        for linear in walker.linears:
            choices[linear.name] = choose((linear.weight != 0).cpu(), table)
    return choices


def _write(
    walker: BlockWalker, choices: Mapping[str, Tensor], table: Tensor, shards: Shards
) -> None:
    """Write masked weights; each process has the choices of the rows that it owns."""
    for linear in walker.linears:
        width = linear.in_features // table.shape[1]  # groups in a row
        shard = choices[linear.name].view(-1, width)  # [owned rows, width]
        whole = shard.new_empty(linear.out_features, width)
        shards.gather(shard, whole)  # [out, width]
        shape = torch.Size((linear.out_features, linear.in_features))
        keep = mask_of(whole.flatten(), table.to(whole.device), shape)  # [out, in]
        linear.write(torch.where(keep, linear.read(), 0))


def _prior_scores(
    walker: BlockWalker, learner: Learner, table: Tensor, data: Training
) -> tuple[Any, ...]:
    """Return the scores of the model with the prior's mask; the weights stay dense."""
    with _weights_put_back(walker):
        _write(walker, learner.prior, table, learner.shards)
        return data.score_prior()


@contextmanager
def _weights_put_back(walker: BlockWalker) -> Iterator[None]:
    """Copy the weights of all linears to the CPU and restore them at the end."""
    # clone(): on a CPU, cpu() returns the tensor itself.
    dense = {linear.name: linear.stored.cpu().clone() for linear in walker.linears}
    try:
        yield
    finally:
        for linear in walker.linears:
            # pop: each copy is freed as soon as it is back
            linear.stored.copy_(dense.pop(linear.name))


def _prior_method(name: str) -> Pruner:
    """Return the pruner whose mask is the prior."""
    from prunebench.pruners import METHODS

    pruner: Pruner = METHODS.make(name, METHODS.resolve_options(name, {}, seed=0))
    return pruner


def _checked(masks: Masks, linear: Linear, target: Sparsity) -> Tensor:
    """Return the mask of a linear, [out, in], after checking that it keeps at most N of every M.

    Raises:
        IncompatibleData: It keeps more somewhere; the first place is named.
    """
    assert target.kept is not None and target.group is not None
    keep = masks.read(linear)
    counts = keep.view(-1, target.group).sum(1)  # [groups]
    # Fewer is allowed; in a prior, `choose` completes such a group.
    over = (counts > target.kept).nonzero()
    if len(over):
        at = int(over[0])
        row, column = divmod(at * target.group, linear.in_features)
        raise IncompatibleData(
            f"the masks are not {target}",
            where=f"{linear.name}, row {row}, columns {column} to {column + target.group - 1} "
            f"keep {int(counts[at])}; {len(over):,} groups of this matrix keep too many",
            fix="use masks of this pattern, or name the pattern they have with --sparsity",
        )
    return keep
