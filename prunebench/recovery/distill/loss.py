"""The loss of a distillation: KL divergence to the teacher's distribution and cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class DistillLoss:
    """L = eta * tau^2 * KL(p_teacher || p_student) + (1 - eta) * CE, summed over tokens.

    Both distributions of the KL divergence are softened by the temperature tau; tau^2 keeps its
    gradient at the scale of the cross-entropy's.

    Attributes:
        eta: Share of the divergence.
        temperature: tau.
        cross_entropy: Sum over all tokens since the last `reset`, nats.
        divergence: The same of tau^2 * KL.
    """

    eta: float
    temperature: float = 1.0
    cross_entropy: float = 0.0
    divergence: float = 0.0

    def reset(self) -> None:
        """Begin new sums."""
        self.cross_entropy = self.divergence = 0.0

    def __call__(
        self,
        logits: Float[Tensor, "rows vocabulary"],
        targets: Int[Tensor, " rows"],
        teacher: Float[Tensor, "rows vocabulary"] | None,
    ) -> tuple[float, Float[Tensor, "rows vocabulary"]]:
        """Return the summed loss in nats and its gradient by `logits`, in float32.

        Args:
            logits: Of the student.
            targets: The next token of each row.
            teacher: Logits of the dense model; None if eta is 0.
        """
        at_targets = torch.arange(len(targets), device=targets.device), targets
        logs = logits.to(torch.float32).log_softmax(-1)
        entropy = -float(logs[at_targets].sum(dtype=torch.float64))
        self.cross_entropy += entropy
        if teacher is None:
            gradient = logs.exp_()
            gradient[at_targets] -= 1
            return entropy, gradient
        tau = self.temperature
        softened = logs if tau == 1 else (logits.to(torch.float32) / tau).log_softmax(-1)
        reference = (teacher.to(torch.float32) / tau).log_softmax(-1)
        chances = reference.exp()
        # sum p_T (log p_T - log p_S)
        distance = float(reference.sub_(softened).mul_(chances).sum(dtype=torch.float64))
        divergence = tau * tau * distance
        self.divergence += divergence
        # d/dz tau^2 KL = tau (p_S - p_T), of the softened ones; d/dz CE = p_S - 1 at the target
        if tau == 1:
            gradient = logs.exp_().sub_(chances, alpha=self.eta)
        else:
            gradient = softened.exp_().sub_(chances).mul_(self.eta * tau)
            gradient.add_(logs.exp_(), alpha=1 - self.eta)
        gradient[at_targets] -= 1 - self.eta
        return self.eta * divergence + (1 - self.eta) * entropy, gradient
