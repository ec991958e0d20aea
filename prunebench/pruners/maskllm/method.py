"""MaskLLM: 2:4 masks that are learned end to end, with frozen weights; and published masks.

Paper: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models",
https://arxiv.org/abs/2409.17481: Gumbel softmax over the candidates of every group (section 3.2), a
prior mask (3.3), sparse weight regularisation (3.4). Its code is licensed for research only and was
not used; what its text leaves open was read there: soft masks in training, a reward for large
weights that falls to zero, momenta (0.9, 0.95).

What differs: noise comes from counters and is made again in the backward pass, the masked weight
lives in one workspace, and gradients of the logits are formed and applied in one pass, so that
beside the logits and the optimizer's moments nothing of their size exists; the hard mask is scored
on held-out text while it is learned, and the best one is kept, at worst the prior; the noise of a
step is one draw unless `noise_samples` says otherwise (theirs draws for every micro-batch). The
preset `laptop` has no noise and another optimizer, see `optimise`.

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
from prunebench.errors import IncompatibleData, SaveError, UsageError
from prunebench.models.linears import Linear
from prunebench.models.masks import Masks
from prunebench.models.source import CatalogEntry
from prunebench.models.walker import BlockWalker
from prunebench.pruners.maskllm.candidates import candidates, choose, mask_of, require_learnable
from prunebench.pruners.maskllm.checkpoint import CheckpointStore
from prunebench.pruners.maskllm.initial_logits import LogitInit
from prunebench.pruners.maskllm.learn import Learner
from prunebench.pruners.maskllm.memory_plan import MemoryPlan
from prunebench.pruners.maskllm.optimise import Optimizer
from prunebench.pruners.maskllm.options import PRIORS, Options, require_prior
from prunebench.pruners.maskllm.presets import PRESETS
from prunebench.pruners.maskllm.relaxation import LayerLogits
from prunebench.pruners.maskllm.schedule import Schedule
from prunebench.pruners.maskllm.shards import Shards
from prunebench.pruners.protocol import LayerEvent, Needs, Pruner, PruneReport
from prunebench.pruners.training import CurvePoint, Forecast, TrainingNeeds, TrainingReport
from prunebench.sparsity import Sparsity
from prunebench.spec import OptionValue


@dataclass(frozen=True)
class MaskLLM(Options):
    """Learns which N of every M weights stay, by the loss of the whole model; see `Options`."""

    @property
    def needs(self) -> Needs:
        """What this run reads: masks alone, or windows to learn from and what the prior reads."""
        if self.masks:
            return Needs(masks=self.masks)
        one = self.filled()
        assert one.batch and one.steps and one.train_seqlen and one.held_out
        training = TrainingNeeds(
            text=one.train_data or "",
            samples=one.batch * one.steps,
            seqlen=one.train_seqlen,
            held_out=one.held_out,
            least=one.batch,
            steps=one.steps,
        )
        if one.prior in PRIORS:
            other = _prior_method(one.prior).needs if one.prior != "scratch" else Needs()
            return dataclasses.replace(other, training=training)
        return Needs(training=training, masks=one.prior)

    def filled(self) -> MaskLLM:
        """Return the same with every option that was left out taken from the preset."""
        preset = {k: v for k, v in PRESETS[self.preset].items() if getattr(self, k) is None}
        return dataclasses.replace(self, **preset)  # type: ignore[arg-type]

    def for_model(self, entry: CatalogEntry | None, calibration: str | None) -> MaskLLM:
        """Fill in what depends on the model: its published masks, unless something is learned.

        Args:
            entry: The catalogue's row of the model, if it has one.
            calibration: The calibration text of the run, which is learned from by default.
        """
        masks = self.masks or (entry.masks if entry is not None and not self.train else None)
        if masks:
            self.require_no_training(masks)
            return dataclasses.replace(self, masks=masks)
        require_prior(self.filled().prior or "scratch")
        return dataclasses.replace(self.filled(), train_data=self.train_data or calibration)

    def options(self) -> dict[str, OptionValue]:
        """Return the options that matter: with masks, those alone."""
        return {"masks": self.masks} if self.masks else dataclasses.asdict(self)

    def check(self, sparsity: Sparsity) -> None:
        """Refuse a sparsity without candidates or with too many, and steps of unequal shares."""
        require_learnable(sparsity)
        if not self.masks:
            self.filled()._require_shares(world_size())

    def forecast(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        dtype: torch.dtype,
        device: torch.device,
        processes: int,
    ) -> Forecast | None:
        """Return what a training will need; masks that are applied need nothing."""
        if self.masks:
            return None
        return MemoryPlan(model, self.filled(), sparsity, dtype, device, processes).forecast()

    def prune(self, walker: BlockWalker, sparsity: Mapping[str, Sparsity]) -> PruneReport:
        """Learn or apply a mask for every linear of `walker`.

        Raises:
            IncompatibleData: Masks do not keep N of every M, or the loss is not finite.
            UsageError: The sparsity cannot be learned, or there is nothing to learn from.
        """
        target = next(iter(sparsity.values()))
        if not target.ratio:
            return PruneReport()
        if self.masks:
            if walker.inputs.masks is None:
                raise UsageError("masks are named, and none were opened")
            with closing(walker.groups(stats=False)) as groups:
                for linear in (one for group in groups for one in group.linears):
                    keep = _checked(walker.inputs.masks, linear, target)
                    linear.write(torch.where(keep.to(linear.stored.device), linear.read(), 0))
            return PruneReport()
        require_learnable(target)
        return self.filled()._learn(walker, target)

    # ------------------------------------------------------------ learning

    def _learn(self, walker: BlockWalker, target: Sparsity) -> PruneReport:
        data = walker.inputs.training
        if data is None:
            raise UsageError("maskllm needs text to learn from", fix="give --set train_data=NAME")
        shards = Shards.of_group()
        self._require_shares(shards.world)
        assert target.kept is not None and target.group is not None
        table = candidates(target.kept, target.group)
        prior = self._prior(walker, target, table)
        learner = self._learner(walker, prior, table, shards)
        assert self.eval_every is not None

        def after_step(point: CurvePoint) -> None:
            data.hear(point)
            last = point.step == learner.schedule.steps
            if keeper is None or not (self.save_every and point.step):
                return
            if last or point.step % self.save_every == 0:
                _keep(keeper, learner, data)

        scores = _prior_scores(walker, learner, table, data) if prior else ()
        keeper = CheckpointStore(data.folder, shards) if data.folder is not None else None
        events = _resume(keeper, learner, data) if keeper is not None else ()
        try:
            learner.learn(
                data.train, data.held_out, eval_every=self.eval_every, after_step=after_step
            )
        except IncompatibleData as error:
            if keeper is not None and self.save_every:
                _keep(keeper, learner, data)
                error.where += f", kept in {keeper.folder}"
            raise
        progress = learner.progress
        _write(walker, progress.best, table, shards)
        learned = TrainingReport(progress.best_step, shards.world, tuple(progress.curve), scores)
        return PruneReport(events, learned=learned)

    def _require_shares(self, world: int) -> None:
        assert self.batch is not None
        if self.batch % (world * self.noise_samples):
            raise UsageError(
                f"{self.batch} windows a step cannot be shared out equally",
                where=f"{world} processes, {self.noise_samples} draws of the noise",
                fix=f"use --set batch={world * self.noise_samples} or a multiple",
            )

    def _prior(
        self, walker: BlockWalker, target: Sparsity, table: Tensor
    ) -> dict[str, Tensor] | None:
        """Return the choices of the prior's mask, whole layers; the weights are as before."""
        assert self.prior is not None
        if self.prior == "scratch":
            return None
        if walker.inputs.masks is not None:
            masks = walker.inputs.masks
            return {one.name: choose(_checked(masks, one, target), table) for one in walker.linears}
        chosen = {}
        with _weights_put_back(walker):
            _prior_method(self.prior).prune(walker, {one.name: target for one in walker.linears})
            for one in walker.linears:
                keep = one.stored.T != 0 if one.transposed else one.stored != 0
                chosen[one.name] = choose(keep.cpu(), table)
        return chosen

    def _learner(
        self,
        walker: BlockWalker,
        prior: dict[str, Tensor] | None,
        table: Tensor,
        shards: Shards,
    ) -> Learner:
        optimizer = self._optimizer()
        assert self.logit_std is not None and self.prior_noise is not None
        assert self.prior_strength is not None
        start = LogitInit(self.logit_std, self.prior_noise, self.prior_strength)
        layers: dict[Linear, LayerLogits] = {}
        first: dict[str, Tensor] = {}
        for index, linear in enumerate(walker.linears):
            device = linear.stored.device
            rows = shards.rows(linear.out_features)
            width = linear.in_features // table.shape[1]
            groups = slice(rows.start * width, rows.stop * width)
            own = prior[linear.name][groups].to(device) if prior else None
            logits = start.logits(
                own, table.to(device), groups=groups, seed=self.seed, layer=index,
                dtype=getattr(torch, self.logit_dtype), device=device,
            )  # fmt: skip
            layer = LayerLogits(index, logits, table.to(device), width, first=groups.start)
            optimizer.prepare(layer)
            layers[linear] = layer
            first[linear.name] = layer.choices() if own is None else own
        return Learner(
            walker.model,
            layers,
            first,
            optimizer=optimizer,
            schedule=self._schedule(),
            seed=self.seed,
            noise_samples=self.noise_samples,
            micro_tokens=self.micro_tokens,
            shards=shards,
            gradient_dtype=torch.float32 if self.state_dtype == "float32" else torch.bfloat16,
        )

    def _optimizer(self) -> Optimizer:
        assert self.optimizer is not None and self.beta1 is not None
        assert self.weight_decay is not None and self.clip is not None
        assert self.outlier is not None
        return Optimizer(
            self.optimizer,
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,
            clip=self.clip,
            outlier=self.outlier,
            state_dtype=self.state_dtype,
        )

    def _schedule(self) -> Schedule:
        values = {
            f: getattr(self, f)
            for f in ("steps", "batch", "noise", "reward", "curvature", "last_rate")
        }
        assert self.temperature and self.last_temperature and self.scale and self.last_scale
        return Schedule(
            **values,
            temperature=(self.temperature, self.last_temperature),
            scale=(self.scale, self.last_scale),
            peak_rate=self.rate or 0.0,
        )


def _write(
    walker: BlockWalker, choices: Mapping[str, Tensor], table: Tensor, shards: Shards
) -> None:
    """Apply masks, of which each process has the choices of its own rows."""
    for linear in walker.linears:
        width = linear.in_features // table.shape[1]
        own = choices[linear.name].view(-1, width)
        choice = own.new_empty(linear.out_features, width)
        shards.gather(own, choice)
        shape = torch.Size((linear.out_features, linear.in_features))
        keep = mask_of(choice.flatten(), table.to(choice.device), shape)
        linear.write(torch.where(keep, linear.read(), 0))


def _prior_scores(
    walker: BlockWalker, learner: Learner, table: Tensor, data: Training
) -> tuple[Any, ...]:
    """Return what the model gets with the prior's mask; the weights are as before."""
    with _weights_put_back(walker):
        _write(walker, learner.prior, table, learner.shards)
        return data.score_prior()


@contextmanager
def _weights_put_back(walker: BlockWalker) -> Iterator[None]:
    """Keep the weights of all linears on the host, and put them back at the end."""
    dense = {one.name: one.stored.cpu().clone() for one in walker.linears}
    try:
        yield
    finally:
        for one in walker.linears:
            one.stored.copy_(dense.pop(one.name))


def _resume(keeper: CheckpointStore, learner: Learner, data: Training) -> tuple[LayerEvent, ...]:
    """Take up the kept state of this very run; the result says from where the training went on."""
    damage = keeper.restore(learner)
    if damage:
        data.note(f"  {damage}: the training begins anew")
    if not learner.done:
        return ()
    data.note(f"  the training goes on after step {learner.done}, kept in {keeper.folder}")
    for point in learner.progress.curve:
        data.hear(point)
    return (LayerEvent("all", "training resumed after step", float(learner.done)),)


def _keep(keeper: CheckpointStore, learner: Learner, data: Training) -> None:
    """Save the state; a full disk does not end a training."""
    try:
        keeper.save(learner)
    except SaveError as error:
        data.note(f"  step {learner.done} could not be kept: {error.what} ({error.where})")


def _prior_method(name: str) -> Pruner:
    """Return the pruner whose mask is begun with."""
    from prunebench.pruners import METHODS

    made: Pruner = METHODS.make(name, METHODS.resolve_options(name, {}, seed=0))
    return made


def _checked(masks: Masks, linear: Linear, target: Sparsity) -> Tensor:
    """Return a mask that keeps at most N of every M.

    Raises:
        IncompatibleData: It keeps more somewhere; the first place is named.
    """
    assert target.kept is not None and target.group is not None
    keep = masks.read(linear)
    counts = keep.view(-1, target.group).sum(1)
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
