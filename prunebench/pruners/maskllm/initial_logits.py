"""Where logits begin: near a mask that another method or an earlier run has found.

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

_STEP = (1 << 32) - 1  # no step of a training has this number
_CHUNK = 1 << 16


@dataclass(frozen=True)
class LogitInit:
    """How logits are spread around the prior.

    Attributes:
        unit: Standard deviation of the logits in the paper.
        noise: Standard deviation here, in units.
        strength: Pull of the prior, in units.
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
        """Return the logits of some groups of a layer.

        Args:
            prior: The choices of those groups, or None to begin without.
            table: The candidates.
            groups: Which groups of the layer.
            seed: Of the run; the spread is the same for any number of processes.
            layer: Index of the layer in the model.
            dtype: Of the logits.
            device: Where they are kept.
        """
        made = torch.empty(len(table), groups.stop - groups.start, dtype=dtype, device=device)
        overlap = (table @ table.T - table.sum(1).mean() ** 2 / table.shape[1]).to(device)
        for begin in range(0, made.shape[1], _CHUNK):
            part = slice(begin, min(begin + _CHUNK, made.shape[1]))
            index = torch.arange(part.start, part.stop, device=device) + groups.start
            drawn = uniforms(index, len(table), seed=seed, step=_STEP, layer=layer)
            values = torch.erfinv(drawn.mul_(2).sub_(1)).mul_(2**0.5 * self.noise)
            if prior is not None:
                values += self.strength * overlap[:, prior[part].long()]
            made[:, part] = values.mul_(self.unit)
        return made
