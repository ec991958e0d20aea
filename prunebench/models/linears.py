"""`Linear`: one prunable matrix of a block, however the architecture stores it.

`nn.Linear` and its subclasses store [out, in]; GPT-2's `Conv1D` stores [in, out]; mixtures of
experts fuse the matrices of all experts into one parameter [experts, out, in]. Whatever is not one
of these is not prunable, and a block with too much of it is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunebench.errors import IncompatibleData

MIN_COVERAGE = 0.9
"""Least share of a block's matrix parameters that must be prunable."""


@dataclass(frozen=True, eq=False)
class Linear:
    """A prunable matrix; `name` is unique in the model.

    Attributes:
        name: Path of the module, and for an expert the parameter and the expert's number.
        parameter_name: Name of the parameter that holds the matrix (`named_parameters`).
        block_index: Index of its block.
        module: The module that owns the parameter, whose input is the matrix's input.
        attribute: Name of the parameter in its module.
        expert: Index in a fused parameter, else None.
        transposed: True if it is stored as [in, out].
    """

    name: str
    parameter_name: str
    block_index: int
    module: nn.Module
    attribute: str
    out_features: int
    in_features: int
    expert: int | None = None
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    @property
    def stored(self) -> Tensor:
        """The stored matrix, a view: [out, in], or [in, out] if `transposed`."""
        parameter: Tensor = getattr(self.module, self.attribute).data
        return parameter if self.expert is None else parameter[self.expert]

    def read(self) -> Float[Tensor, "out in"]:
        """Return the weight in float32: a view if it is stored so, else a copy.

        Raises:
            IncompatibleData: It holds NaN or infinity.
        """
        weight = (self.stored.T if self.transposed else self.stored).to(torch.float32)
        if not torch.isfinite(weight.sum(dtype=torch.float64)):  # one pass; NaN and inf survive it
            raise IncompatibleData(
                f"{self.name} holds NaN or infinity",
                where="the weights of the model are damaged",
                fix="download or convert the model again, or use another dtype",
            )
        return weight

    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Store a new weight, cast to the stored dtype; a zero is stored as +0.0.

        Raises:
            IncompatibleData: The weight does not fit, or holds NaN or infinity.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise IncompatibleData(
                f"{self.name}: the new weight is {tuple(weight.shape)}",
                where=f"it should be {(self.out_features, self.in_features)}",
                fix="this is an error of the pruning method: see prunebench check",
            )
        if not torch.isfinite(weight.sum(dtype=torch.float64)):
            raise IncompatibleData(
                f"{self.name}: the new weight holds NaN or infinity",
                where="the pruning method divided by zero or overflowed",
                fix="use more calibration tokens, or float32",
            )
        # -0.0 + 0.0 = +0.0: packers of 2:4 weights take -0.0 for a value
        torch.add(weight.T if self.transposed else weight, 0.0, out=self.stored)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the decoder blocks: the largest outermost `ModuleList`.

    Raises:
        IncompatibleData: The model has none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    outer: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(o + ".") for o in outer):
            continue
        outer.append(path)
        size = sum(parameter.numel() for parameter in module.parameters())
        if best is None or size > best[0]:
            best = (size, path, module)
    if best is None or best[0] == 0:
        raise IncompatibleData(
            f"{type(model).__name__} has no list of blocks",
            where="no nn.ModuleList with parameters was found in it",
            fix="choose a decoder-only transformer",
        )
    return best[1], best[2]


def find_linears(model: nn.Module) -> list[Linear]:
    """Return every prunable matrix, block by block, in the order of the modules.

    Raises:
        IncompatibleData: Less than `MIN_COVERAGE` of a block's matrices is prunable; what is not
            is named with its share.
    """
    prefix, blocks = find_blocks(model)
    linears: list[Linear] = []
    for index, block in enumerate(blocks):
        mine = [
            linear
            for path, module in block.named_modules()
            for linear in _linears_of(module, f"{prefix}.{index}.{path}".rstrip("."), index)
        ]
        _require_coverage(type(block).__name__, block, mine)
        linears += mine
    return linears


def _linears_of(module: nn.Module, path: str, index: int) -> list[Linear]:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        out, width = module.weight.shape
        return [Linear(path, f"{path}.weight", index, module, "weight", out, width)]
    if isinstance(module, Conv1D):
        width, out = module.weight.shape
        return [
            Linear(path, f"{path}.weight", index, module, "weight", out, width, transposed=True)
        ]
    if getattr(module, "is_transposed", None) is not False:  # set on fused experts alone
        return []
    return [
        Linear(
            f"{path}.{name}.{expert}",
            f"{path}.{name}",
            index,
            module,
            name,
            out_features=parameter.shape[1],
            in_features=parameter.shape[2],
            expert=expert,
        )
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
        for expert in range(parameter.shape[0])
    ]


def _require_coverage(kind: str, block: nn.Module, linears: list[Linear]) -> None:
    matrices = {name: p for name, p in block.named_parameters() if p.ndim >= 2}
    covered = {id(getattr(linear.module, linear.attribute)) for linear in linears}
    total = sum(p.numel() for p in matrices.values())
    missed = {name: p.numel() / total for name, p in matrices.items() if id(p) not in covered}
    share = 1 - sum(missed.values())
    if total == 0 or share < MIN_COVERAGE:
        worst = sorted(missed, key=lambda name: -missed[name])[:3]
        raise IncompatibleData(
            f"{kind} cannot be pruned: only {share:.1%} of its matrix parameters are linears",
            where="not covered: " + ", ".join(f"{name} ({missed[name]:.1%})" for name in worst),
            fix="choose another architecture, or report this one",
        )
