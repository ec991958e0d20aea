"""Initial logits: random, biased towards a prior mask from another method or an earlier run.

With M0 the prior mask, S_i the candidates and N of M kept, a logit is

    z_i = unit * (noise * n + strength * (<M0, S_i> - N^2 / M)),   n ~ N(0, 1)

The paper has noise = 1, unit = 0.01 and strength = 3: three standard deviations (arXiv 2409.17481,
section 3.3). N^2 / M is the mean overlap of two masks: 1 for 2:4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from prunebench.pruners.maskllm.noise import uniforms

_STEP = (1 << 32) - 1  # of the noise key; no training step has this number
_CHUNK = 1 << 16  # groups at a time


@dataclass(frozen=True)
class LogitInit:
    """The distribution of the initial logits.

    Attributes:
        unit: Scale of noise and prior (`logit_std`).
        noise: Standard deviation, in units; 1 in the paper.
        strength: Bias towards the prior, in units; 3 in the paper.
    """

    unit: float
    noise: float
    strength: float

    def logits(
        self,
        prior: Integer[Tensor, " groups"] | None,
        table: Float[Tensor, "choices group"],
        *,
        groups: slice,
        seed: int,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Float[Tensor, "choices groups"]:
        """Return the initial logits of some groups of a layer.

        Args:
            prior: The choices of those groups; None for no prior.
            table: The candidates.
            groups: Range of groups of the layer.
            seed: Of the run; the noise is the same for any number of processes.
            layer: Index of the layer in the model.
            dtype: Of the logits.
            device: Of the logits.
        """
        logits = torch.empty(len(table), groups.stop - groups.start, dtype=dtype, device=device)
        # <S_i, S_j> minus its mean N^2 / M, [choices, choices]; row sums of the table are all N
        overlap = (table @ table.T - table.sum(1).mean() ** 2 / table.shape[1]).to(device)
        # In chunks: the int64 counters take several times the memory of the logits.
        for begin in range(0, logits.shape[1], _CHUNK):
            part = slice(begin, min(begin + _CHUNK, logits.shape[1]))
            index = torch.arange(part.start, part.stop, device=device) + groups.start
            uniform = uniforms(index, len(table), seed=seed, step=_STEP, layer=layer)
            # inverse of the normal distribution: sqrt(2) erfinv(2 u - 1), [choices, part]
            values = torch.erfinv(uniform.mul_(2).sub_(1)).mul_(2**0.5 * self.noise)
            if prior is not None:
                values += self.strength * overlap[:, prior[part].long()]  # [choices, part]
            logits[:, part] = values.mul_(self.unit)
        return logits
