"""What a distillation trains of one matrix: all its kept weights, or a low-rank update of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.models.linears import Linear
from prunebench.training.gradients import GradientSums
from prunebench.training.shards import Shards


class TrainedWeight(ABC):
    """The rows of one matrix that this process owns, with the zeros of the start where they are.

    Attributes:
        parameters: float32 tensors that are trained, by name.
        rates: Learning rate of each, relative to that of the step.
    """

    parameters: dict[str, Tensor]
    rates: dict[str, float]

    @abstractmethod
    def write(self, out: Float[Tensor, "rows in"]) -> None:
        """Write the weight as it is now, in the dtype of `out`."""

    @abstractmethod
    def gradients(self, slope: Float[Tensor, "rows in"]) -> dict[str, Tensor]:
        """Return the gradient of each parameter from dL/dW; `slope` may be overwritten."""

    @abstractmethod
    def snapshot(self) -> dict[str, Tensor]:
        """Return copies from which `restored` makes the weight as it is now."""

    @abstractmethod
    def restored(self, best: Mapping[str, Tensor]) -> Float[Tensor, "rows in"]:
        """Return the weight of a snapshot, in the dtype of the model."""


class FullWeight(TrainedWeight):
    """A float32 master of every weight, of which the pruned ones get no gradient.

    Args:
        start: The pruned rows, in the dtype of the model.
        rms: Root mean square of the matrix's kept weights.
    """

    def __init__(self, start: Float[Tensor, "rows in"], rms: float) -> None:
        self._keep = start != 0
        self._dtype = start.dtype
        self._master = start.to(torch.float32, copy=True)
        self.parameters = {"master": self._master}
        self.rates = {"master": rms}

    def write(self, out: Float[Tensor, "rows in"]) -> None:
        """Write the master, rounded."""
        out.copy_(self._master)

    def gradients(self, slope: Float[Tensor, "rows in"]) -> dict[str, Tensor]:
        """Return dL/dW of the kept weights, 0 elsewhere: Adam's moments stay 0 there."""
        return {"master": slope.mul_(self._keep)}

    def snapshot(self) -> dict[str, Tensor]:
        """Return the weight in the dtype of the model; a weight that rounds to -0.0 is +0.0."""
        return {"weight": self._master.to(self._dtype, copy=True).add_(0.0)}

    def restored(self, best: Mapping[str, Tensor]) -> Float[Tensor, "rows in"]:
        """Return the stored weight."""
        return best["weight"]


class LowRankWeight(TrainedWeight):
    """W = W0 + M * (A B): an update of rank r, merged under the mask so that zeros stay.

    Masters and moments are as small as A and B. A begins at 0, so W is W0.

    Args:
        start: The pruned rows W0, in the dtype of the model.
        rms: Root mean square of the matrix's kept weights.
        rank: r.
        seed: Of B.
        shards: This process among others; all of them hold the same B.
    """

    def __init__(
        self, start: Float[Tensor, "rows in"], rms: float, *, rank: int, seed: int, shards: Shards
    ) -> None:
        self._start = start.clone()
        self._shards = shards
        generator = torch.Generator().manual_seed(seed)
        # rows of B have length sqrt(in / r): a step of A by its rate changes W by about that much
        right = torch.randn(rank, start.shape[1], generator=generator) / math.sqrt(rank)
        self._left = torch.zeros(start.shape[0], rank, device=start.device)
        self._right = right.to(start.device)
        self.parameters = {"left": self._left, "right": self._right}
        self.rates = {"left": rms, "right": 1 / math.sqrt(rank)}

    def write(self, out: Float[Tensor, "rows in"]) -> None:
        """Write W0 + M * (A B)."""
        out.copy_(self._merged(self.parameters))

    def gradients(self, slope: Float[Tensor, "rows in"]) -> dict[str, Tensor]:
        """Return dL/dA = (M * G) B^T and dL/dB = A^T (M * G)."""
        slope.mul_(self._start != 0)
        right = self._shards.sum_all(self._left.T @ slope)  # [r, in], over all rows
        return {"left": slope @ self._right.T, "right": right}

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of A and B."""
        return {name: tensor.clone() for name, tensor in self.parameters.items()}

    def restored(self, best: Mapping[str, Tensor]) -> Float[Tensor, "rows in"]:
        """Return the merged weight."""
        return self._merged(best).to(self._start.dtype).add_(0.0)

    def _merged(self, parameters: Mapping[str, Tensor]) -> Tensor:
        update = parameters["left"] @ parameters["right"]  # [rows, in]
        return torch.where(self._start != 0, self._start + update, 0.0)


class TrainedSums(GradientSums):
    """Turns dL/dW of each matrix into the gradients of its parameters, as soon as it is complete.

    They are added up in `.grad` of the parameters, so with a low rank nothing of the size of the
    model's gradient exists.
    """

    def __init__(self, shards: Shards, weights: Mapping[Linear, TrainedWeight]) -> None:
        super().__init__(shards, torch.float32)
        self._weights = weights

    def _keep(self, linear: Linear, gradient: Tensor) -> None:
        weight = self._weights[linear]
        for name, part in weight.gradients(gradient).items():
            parameter = weight.parameters[name]
            if parameter.grad is None:
                parameter.grad = part
            else:
                parameter.grad.add_(part)

    def forget(self) -> None:
        """Drop the gradients."""
        for weight in self._weights.values():
            for parameter in weight.parameters.values():
                parameter.grad = None
