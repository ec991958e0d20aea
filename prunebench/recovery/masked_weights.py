"""float32 masters of a block's weights, in which only kept places can change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunebench.models.linears import Linear, is_finite
from prunebench.models.pruned_block import PrunedBlock
from prunebench.recovery.fixed_grid import FixedGrid, StraightThrough

_HALF = (torch.float16, torch.bfloat16)


class MaskedWeights:
    """The weights of a block in float32; those that are trained have a gradient.

    The pruned places of a trained matrix get no gradient, so Adam's moments stay 0 there and so do
    the weights. The block itself is not touched until `write`.

    Args:
        pruned: The block.
        linears: The matrices to train.
        norms: Whether the parameters of normalizations are trained too.

    Attributes:
        trained: The masters with a gradient, by name in the block.
        untrained: Experts that too few tokens reached; they stay as they are.
    """

    def __init__(self, pruned: PrunedBlock, linears: Collection[Linear], *, norms: bool) -> None:
        self._module = pruned.module
        self._dtype = next(pruned.module.parameters()).dtype
        self._names = {id(x): name for name, x in pruned.module.named_parameters()}
        self._starved = [linear for linear in linears if _is_starved(linear, pruned.tokens)]
        self.untrained = tuple(linear.name for linear in self._starved)
        keeps = self._keeps([x for x in linears if x.name not in self.untrained])
        if norms:
            keeps |= dict.fromkeys(_norm_parameters(pruned.module))
        self._keeps_of: dict[str, Tensor | None] = keeps
        self._grids = self._find_grids(pruned, [x for x in linears if x.name not in self.untrained])
        self._originals = dict(pruned.module.named_parameters())
        self.trained: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        for name, parameter in self._originals.items():
            value = parameter.detach().to(torch.float32, copy=name in keeps)
            if name in keeps:
                self.trained[name] = value.requires_grad_()
            self._values[name] = value
        for name, buffer in pruned.module.named_buffers():
            if buffer.dtype in _HALF:
                self._values[name] = buffer.to(torch.float32)

    def _keeps(self, linears: Collection[Linear]) -> dict[str, Tensor | None]:
        """Return where each parameter may change, from the zeros of the pruned weights."""
        names = self._names
        keeps: dict[str, Tensor | None] = {}
        for linear in linears:
            parameter = getattr(linear.module, linear.attribute)
            keep = keeps.get(names[id(parameter)])
            if keep is None:
                keep = torch.zeros_like(parameter, dtype=torch.bool)
                keeps[names[id(parameter)]] = keep
            # of fused experts, [experts, out, in], each has its own part
            part = keep if linear.expert is None else keep[linear.expert]
            torch.ne(linear.stored, 0, out=part)
        return {name: keep for name, keep in keeps.items() if keep is not None and keep.any()}

    def _find_grids(
        self, pruned: PrunedBlock, linears: Collection[Linear]
    ) -> dict[str, list[tuple[Linear, FixedGrid]]]:
        """Return the grids of quantized matrices, by the parameter that holds them."""
        grids: dict[str, list[tuple[Linear, FixedGrid]]] = {}
        if pruned.grid is None:
            return grids
        for linear in linears:
            fixed = FixedGrid(linear.read(), pruned.grid, linear.name)
            grids.setdefault(self._name(linear), []).append((linear, fixed))
        return grids

    def name_of(self, linear: Linear) -> str | None:
        """Return the name of the master that holds a matrix; None if it is not trained."""
        name = self._name(linear)
        return name if name in self.trained and linear.name not in self.untrained else None

    def _name(self, linear: Linear) -> str:
        return self._names[id(getattr(linear.module, linear.attribute))]

    @staticmethod
    def part(tensor: Tensor, linear: Linear) -> Tensor:
        """Return a matrix's part of a tensor that is shaped as its master, a view [out, in]."""
        part = tensor if linear.expert is None else tensor[linear.expert]
        return part.T if linear.transposed else part

    def matrix(self, linear: Linear) -> Tensor:
        """Return the master of a trained matrix, a view (out, in) without a gradient."""
        return self.part(self.trained[self._name(linear)].detach(), linear)

    def keep_of(self, linear: Linear) -> Tensor:
        """Return where a trained matrix may change, a view (out, in) of what is used."""
        keep = self._keeps_of[self._name(linear)]
        assert keep is not None
        return self.part(keep, linear)

    @torch.no_grad()
    def prune(self, linear: Linear, optimizer: torch.optim.Optimizer) -> None:
        """Set the pruned places of a trained matrix to 0, and what the optimizer knows of them."""
        keep = self.keep_of(linear)
        state = optimizer.state[self.trained[self._name(linear)]]
        self.matrix(linear).masked_fill_(~keep, 0.0)
        for key in ("exp_avg", "exp_avg_sq"):  # moments would move the pruned weights on
            self.part(state[key], linear).masked_fill_(~keep, 0.0)

    def rms(self, name: str) -> float:
        """Return the root mean square of the kept weights of a trained matrix."""
        value, keep = self.trained[name].detach(), self._keeps_of[name]
        count = value.numel() if keep is None else int(keep.sum())
        return math.sqrt(float(value.square().sum(dtype=torch.float64)) / count)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the block with the masters in place of its parameters."""
        with self._autocast():
            rounded = {name: self._rounded(name) for name in self.trained if name in self._grids}
            values = {**self._values, **rounded}
            result: object = functional_call(self._module, values, args, kwargs)
            return result

    def _rounded(self, name: str) -> Tensor:
        """Return a master as the block will hold it: on its grid, if the matrix is quantized."""
        value = self.trained[name]
        if name not in self._grids:
            return value
        rounded = value.detach().clone()
        for linear, grid in self._grids[name]:
            part = self.part(rounded, linear)
            part.copy_(grid.round(part))
        result: Tensor = StraightThrough.apply(value, rounded)  # type: ignore[no-untyped-call]
        return result

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """On a GPU a 16-bit model is multiplied in bfloat16; on a CPU float32 is as fast."""
        device = next(iter(self._originals.values())).device
        if device.type == "cuda" and self._dtype in _HALF and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def mask_gradients(self) -> None:
        """Set the gradients of the pruned places to 0."""
        for name, value in self.trained.items():
            keep = self._keeps_of[name]
            if keep is not None and value.grad is not None:
                value.grad.mul_(keep)

    def leave_untrained(self) -> None:
        """Set the gradients of experts that stay as they are to 0: others share their parameter."""
        for linear in self._starved:
            value = self.trained.get(self._name(linear))
            if value is not None and value.grad is not None:
                self.part(value.grad, linear).zero_()

    @property
    def are_finite(self) -> bool:
        """Whether all trained weights are finite in the dtype of the model."""
        return all(is_finite(value.detach().to(self._dtype)) for value in self.trained.values())

    @contextlib.contextmanager
    def written(self) -> Iterator[WrittenWeights]:
        """Write the trained weights into the block; put the old ones back unless they stay."""
        old = {name: self._originals[name].detach().clone() for name in self.trained}
        written = WrittenWeights()
        try:
            for name in self.trained:
                # a weight that rounds to -0.0 becomes +0.0
                self._originals[name].data.copy_(self._rounded(name).detach()).add_(0.0)
            yield written
        finally:
            for name, value in old.items() if not written.stays else ():
                self._originals[name].data.copy_(value)


class WrittenWeights:
    """Whether weights that were written to be measured stay."""

    def __init__(self) -> None:
        self.stays = False


def _is_starved(linear: Linear, tokens: Mapping[str, int] | None) -> bool:
    """Return whether fewer tokens reached an expert than it has inputs to each output."""
    return tokens is not None and tokens[linear.name] < linear.in_features


def _norm_parameters(module: nn.Module) -> list[str]:
    return [
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if "norm" in type(part).__name__.lower()
        for name, _ in part.named_parameters(recurse=False)
    ]
