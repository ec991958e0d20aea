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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunebench.errors import IncompatibleData, UsageError, nearest
from prunebench.models.blocks import BlockWalker
from prunebench.models.linears import Linear
from prunebench.models.masks import Masks
from prunebench.models.source import CatalogEntry
from prunebench.pruners.layer import Learned, Needs, Point, Pruner, PruneReport, TrainingNeeds
from prunebench.pruners.maskllm.candidates import candidates, choose, mask_of, require_learnable
from prunebench.pruners.maskllm.kept import Keeper
from prunebench.pruners.maskllm.learn import Learner
from prunebench.pruners.maskllm.optimise import Kind, Optimizer
from prunebench.pruners.maskllm.presets import PRESETS
from prunebench.pruners.maskllm.prior import Start
from prunebench.pruners.maskllm.relax import LayerLogits
from prunebench.pruners.maskllm.schedule import Schedule
from prunebench.pruners.maskllm.shards import Shards
from prunebench.pruners.maskllm.state import StateDtype
from prunebench.sparsity import Sparsity
from prunebench.spec import OptionValue

PRIORS = ("scratch", "magnitude", "wanda", "sparsegpt", "gblm", "ria", "alps")


@dataclass(frozen=True)
class MaskLLM:
    """Learns which N of every M weights stay, by the loss of the whole model.

    An option left out has the value of the preset.

    Attributes:
        preset: `laptop`, `lite` or `paper`, see `presets`.
        masks: Masks to apply instead of learning: FILE.npz, a checkpoint's folder, or hub:REPO.
        train: Whether to learn although masks of the model have been published.
        train_data: Text to learn from, a name as --calibration takes it; None is that of the run.
        steps: Optimizer steps.
        batch: Windows in a step, over all processes.
        train_seqlen: Tokens in a window.
        held_out: Windows that decide which mask is kept.
        eval_every: Steps between two scores of the hard mask.
        prior: A method whose mask is begun with (its weights are not), masks by name, or
            `scratch`.
        prior_strength: How far the prior's choice is ahead, in units of `logit_std`.
        prior_noise: Spread of the first logits, in the same units (1 in the paper).
        logit_std: Unit of the first logits.
        noise: Factor of the Gumbel noise.
        noise_samples: Draws of the noise a step; more than one needs memory like the logits.
        temperature, last_temperature: tau at the first and last step.
        scale, last_scale: kappa at the first and last step.
        optimizer: `adamw`, `momentum` or `mirror`.
        rate: Learning rate at the first step.
        last_rate: Share of it that is left at the last step.
        beta1, beta2: Decay of the moments.
        weight_decay: Of the logits (`adamw`).
        clip: Largest norm of the gradient (`adamw`), 0 for none.
        outlier: Largest gradient in units of the layer's root mean square (`momentum`, `mirror`).
        reward: Of large kept weights.
        curvature: What the change of a whole weight costs beyond the slope, see `relax`; 0 in the
            paper.
        logit_dtype: float32, or bfloat16 with random rounding.
        state_dtype: Of the optimizer's moments: float32, bfloat16 or int8.
        micro_tokens: Tokens whose activations exist at a time, in each process.
        save_every: Steps between two saved states, for resuming; 0 for never.
        seed: Of noise and order.
    """

    preset: str = "laptop"
    masks: str | None = None
    train: bool = False
    train_data: str | None = None
    steps: int | None = None
    batch: int | None = None
    train_seqlen: int | None = None
    held_out: int | None = None
    eval_every: int | None = None
    prior: str | None = None
    prior_strength: float | None = None
    prior_noise: float | None = None
    logit_std: float | None = None
    noise: float | None = None
    noise_samples: int = 1
    temperature: float | None = None
    last_temperature: float | None = None
    scale: float | None = None
    last_scale: float | None = None
    optimizer: Kind | None = None
    rate: float | None = None
    last_rate: float | None = None
    beta1: float | None = None
    beta2: float = 0.95
    weight_decay: float | None = None
    clip: float | None = None
    outlier: float | None = None
    reward: float | None = None
    curvature: float | None = None
    logit_dtype: Literal["float32", "bfloat16"] = "float32"
    state_dtype: StateDtype = "float32"
    micro_tokens: int = 4096
    save_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}: {nearest(self.preset, PRESETS)}")
        if self.masks and self.train:
            raise ValueError("masks are given, and train=true wants to learn others")
        for name in ("steps", "noise_samples", "micro_tokens", "held_out", "eval_every", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("temperature", "last_temperature", "scale", "last_scale", "logit_std", "rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0")

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
        if entry is not None and entry.masks and not self.train and not self.masks:
            return dataclasses.replace(self, masks=entry.masks)
        if self.masks:
            return self
        return dataclasses.replace(self.filled(), train_data=self.train_data or calibration)

    def options(self) -> dict[str, OptionValue]:
        """Return the options that matter: with masks, those alone."""
        return {"masks": self.masks} if self.masks else dataclasses.asdict(self)

    def check(self, sparsity: Sparsity) -> None:
        """Refuse a sparsity that has no candidates, or too many."""
        require_learnable(sparsity)

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
            if walker.masks is None:
                raise UsageError("masks are named, and none were opened")
            for linear in walker.linears:
                keep = _checked(walker.masks, linear, target)
                linear.write(torch.where(keep.to(linear.stored.device), linear.read(), 0))
            return PruneReport()
        require_learnable(target)
        return self.filled()._learn(walker, target)

    # ------------------------------------------------------------ learning

    def _learn(self, walker: BlockWalker, target: Sparsity) -> PruneReport:
        data = walker.training
        if data is None:
            raise UsageError("maskllm needs text to learn from", fix="give --set train_data=NAME")
        shards = Shards.of_group()
        self._require_shares(shards)
        assert target.kept is not None and target.group is not None
        table = candidates(target.kept, target.group)
        prior = self._prior(walker, target, table)
        learner = self._learner(walker, prior, table, shards)
        assert self.eval_every is not None

        def after_step(point: Point) -> None:
            data.hear(point)
            due = self.save_every and point.step and point.step % self.save_every == 0
            if keeper is not None and due and point.step < learner.schedule.steps:
                keeper.save(learner)

        keeper = Keeper(data.folder, shards) if data.folder is not None else None
        if keeper is not None:
            keeper.restore(learner)
        learner.learn(data.train, data.held_out, eval_every=self.eval_every, after_step=after_step)
        self._write(walker, learner, table, shards)
        if keeper is not None:
            keeper.clear()
        progress = learner.progress
        return PruneReport(learned=Learned(progress.best_step, shards.world, tuple(progress.curve)))

    def _require_shares(self, shards: Shards) -> None:
        assert self.batch is not None
        if self.batch % (shards.world * self.noise_samples):
            raise UsageError(
                f"{self.batch} windows a step cannot be shared out equally",
                where=f"{shards.world} processes, {self.noise_samples} draws of the noise",
                fix=f"use --set batch={shards.world * self.noise_samples} or a multiple",
            )

    def _prior(
        self, walker: BlockWalker, target: Sparsity, table: Tensor
    ) -> dict[str, Tensor] | None:
        """Return the choices of the prior's mask, whole layers; the weights are as before."""
        assert self.prior is not None
        if self.prior == "scratch":
            return None
        if walker.masks is not None:
            masks = walker.masks
            return {one.name: choose(_checked(masks, one, target), table) for one in walker.linears}
        dense = {one.name: one.stored.cpu().clone() for one in walker.linears}
        _prior_method(self.prior).prune(walker, {one.name: target for one in walker.linears})
        chosen = {}
        for one in walker.linears:
            keep = one.stored.T != 0 if one.transposed else one.stored != 0
            chosen[one.name] = choose(keep.cpu(), table)
            one.stored.copy_(dense.pop(one.name))
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
        start = Start(self.logit_std, self.prior_noise, self.prior_strength)
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

    def _write(self, walker: BlockWalker, learner: Learner, table: Tensor, shards: Shards) -> None:
        for linear in walker.linears:
            width = linear.in_features // table.shape[1]
            own = learner.progress.best[linear.name].view(-1, width)
            choice = own.new_empty(linear.out_features, width)
            shards.gather(own, choice)
            shape = torch.Size((linear.out_features, linear.in_features))
            keep = mask_of(choice.flatten(), table.to(choice.device), shape)
            linear.write(torch.where(keep, linear.read(), 0))


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
