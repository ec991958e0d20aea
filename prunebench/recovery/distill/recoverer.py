"""Distillation with the mask fixed: the pruned model learns the dense one's outputs, end to end.

Papers: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training"
(AST), https://arxiv.org/abs/2407.20584: KL divergence to the dense model's logits plus
cross-entropy (section 3.2; table 5: logits are better targets than hidden states).

For the mask M, read from the zeros that pruning left, Adam minimizes over the kept weights

    L(W) = eta * tau^2 * KL(p_dense || p_{M * W}) + (1 - eta) * CE(p_{M * W})

a mean over tokens. What differs: the mask does not change while training; the rate of a matrix is
relative to the root mean square of its kept weights; masters and moments are float32 in every
dtype; windows are held out, and the weights with the lowest loss on them, measured in the model's
own dtype, are what stays, at worst the start, bit for bit. The teacher's logits are computed again
at every step, a slice of tokens at a time, from one forward pass of the blocks with the dense
weights, which the model holds meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunebench.calibration.training import Training
from prunebench.distributed import world_size
from prunebench.errors import IncompatibleData
from prunebench.models.backward import Backward
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import Linear, find_linears
from prunebench.models.replay import plain_inference
from prunebench.pruners.protocol import Needs
from prunebench.pruners.training import Forecast, TrainingNeeds
from prunebench.recovery.distill.loop import Distiller
from prunebench.recovery.distill.memory_plan import DistillPlan
from prunebench.recovery.distill.options import DistillConfig, Options
from prunebench.recovery.distill.weights import FullWeight, LowRankWeight, TrainedWeight
from prunebench.recovery.protocol import ModelRecoverer, ModelRecovery
from prunebench.spec import OptionValue
from prunebench.training.checkpoint import train_saved
from prunebench.training.gradients import GradientSums
from prunebench.training.shards import Shards


@dataclass(frozen=True)
class Distill(Options, ModelRecoverer):
    """Trains the kept weights end to end on the dense model's outputs; see `Options`."""

    @property
    def needs(self) -> Needs:
        """The windows that it trains on."""
        config = self.filled()
        training = TrainingNeeds(
            text=config.data or "",
            samples=config.batch * config.steps,
            seqlen=config.seqlen,
            held_out=config.held_out,
            least=config.batch,
            steps=config.steps,
            text_option="recover.data",
            seqlen_option="recover.seqlen",
        )
        return Needs(training=training)

    def for_run(self, calibration: str | None) -> Distill:
        """Return the recoverer with all options filled in."""
        config = dataclasses.asdict(self.filled())
        return dataclasses.replace(self, **config | {"data": self.data or calibration})

    def options(self) -> dict[str, OptionValue]:
        """Return the options, filled in."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Refuse batches of unequal shares."""
        self.filled().require_shares(world_size())

    def check_model(self, model: nn.Module, data: Training) -> None:
        """Refuse models whose blocks cannot be replayed with gradients.

        Raises:
            IncompatibleData: Blocks share weights, or pass each other more than the hidden state.
        """
        linears = find_linears(model)
        sums = GradientSums(Shards(), torch.float32)
        device = next(model.parameters()).device
        try:
            with plain_inference(model):
                Backward(model, linears, sums).prepare(data.train[:1, :128].to(device))
        except IncompatibleData as error:
            error.fix = "leave --recover distill out, or use --recover block"
            raise

    def forecast(
        self, model: nn.Module, *, dtype: torch.dtype, device: torch.device, processes: int
    ) -> Forecast:
        """Return what the training will need."""
        return DistillPlan(model, self.filled(), dtype, device, processes).forecast()

    def recover_model(
        self, model: nn.Module, dense: dict[str, Tensor], data: Training
    ) -> ModelRecovery:
        """Train the kept weights; those with the lowest held-out loss stay.

        Raises:
            IncompatibleData: The loss is not finite, or the blocks cannot be replayed.
        """
        config, shards = self.filled(), Shards.of_group()
        config.require_shares(shards.world)
        # the method has pruned again: other threads or chips may have given another mask, and a
        # training that began at that one does not go on with this
        data = dataclasses.replace(data, code=f"{data.code} {hash_weights(model)}")
        linears = find_linears(model)
        weights = {linear: _trained(linear, config, shards) for linear in linears}
        kept = {linear.name: int((linear.stored != 0).count_nonzero()) for linear in linears}
        for linear in linears:  # from here on the model is the teacher
            linear.stored.copy_(dense.pop(linear.name))
        loop = Distiller(model, weights, config, shards)
        resumed = train_saved(
            loop, data, eval_every=config.eval_every, save_every=config.save_every
        )
        for linear, shard in loop.best_weights():
            whole = shard.new_empty(linear.out_features, linear.in_features)
            shards.gather(shard, whole)
            linear.stored.copy_(whole.T if linear.transposed else whole)
        zeros = {
            linear.name: lost
            for linear in linears
            if (lost := kept[linear.name] - int((linear.stored != 0).count_nonzero()))
        }
        progress = loop.progress
        return ModelRecovery(
            progress.best_step, shards.world, tuple(progress.curve), resumed, zeros
        )


def _trained(linear: Linear, config: DistillConfig, shards: Shards) -> TrainedWeight:
    """Return what is trained of a pruned matrix, of the rows that this process owns."""
    weight = linear.weight  # [out, in]
    count = int((weight != 0).count_nonzero())
    squares = float(weight.to(torch.float32).square().sum(dtype=torch.float64))
    rms = math.sqrt(squares / max(count, 1))
    start = weight[shards.rows(linear.out_features)].clone(memory_format=torch.contiguous_format)
    if not config.rank:
        return FullWeight(start, rms)
    # by name: every matrix has a B of its own, the same in every process
    seed = zlib.crc32(f"{config.seed}/{linear.name}".encode())
    return LowRankWeight(start, rms, rank=config.rank, seed=seed, shards=shards)
