"""`Linear`: one prunable matrix of a block, however the architecture stores it.

`nn.Linear` and its subclasses store [out, in]; GPT-2's `Conv1D` stores [in, out]; mixtures of
experts fuse the matrices of all experts into one parameter [experts, out, in]. Anything else is not
prunable, and a block with too many other matrices is refused; the message names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunebench.errors import IncompatibleData

MIN_COVERAGE = 0.9
"""Least share of a block's matrix parameters that must be prunable."""


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite; not of an empty tensor.

    One pass without a copy: `isfinite` and a float64 sum of a whole matrix are 30 times slower.
    """
    return bool(torch.stack(values.aminmax()).isfinite().all())  # NaN propagates


@dataclass(frozen=True, eq=False)
class Linear:
    """A prunable matrix; `name` is unique in the model.

    Attributes:
        name: Path of the module, and for an expert the parameter and the expert's index.
        parameter_name: Name of the parameter that holds the matrix (`named_parameters`).
        block_index: Index of its block.
        module: The module that owns the parameter, whose input is the matrix's input.
        attribute: Name of the parameter in its module.
        out_features: Rows of the matrix as [out, in].
        in_features: Columns of the matrix as [out, in].
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

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The matrix in its stored dtype, a view (out, in)."""
        return self.stored.T if self.transposed else self.stored

    def read(self) -> Float[Tensor, "out in"]:
        """Return the weight in float32: a view if it is stored in float32, else a copy.

        Raises:
            IncompatibleData: It contains NaN or infinity.
        """
        weight = self.weight.to(torch.float32)
        if not is_finite(weight):
            raise IncompatibleData(
                f"{self.name} holds NaN or infinity",
                where="the weights of the model are damaged",
                fix="download or convert the model again, or use another dtype",
            )
        return weight

    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Store a new weight, cast to the stored dtype; a zero is stored as +0.0.

        Raises:
            IncompatibleData: The weight has another shape, or contains NaN or infinity.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise IncompatibleData(
                f"{self.name}: the new weight is {tuple(weight.shape)}",
                where=f"it should be {(self.out_features, self.in_features)}",
                fix="this is an error of the pruning method: see prunebench check",
            )
        if not is_finite(weight):
            raise IncompatibleData(
                f"{self.name}: the new weight holds NaN or infinity",
                where="the pruning method divided by zero or overflowed",
                fix="use more calibration tokens, or float32",
            )
        # -0.0 + 0.0 = +0.0: packers of 2:4 weights treat -0.0 as a non-zero
        torch.add(weight.T if self.transposed else weight, 0.0, out=self.stored)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the decoder blocks, without a forward pass.

    It is the outermost `ModuleList` of the text decoder with `num_hidden_layers` members; if none
    or several have that many, the largest. `models.plan` checks that the forward pass runs it.

    Raises:
        IncompatibleData: The model has no such list.
    """
    lists = _block_lists(model)
    if not lists:
        raise IncompatibleData(
            f"{type(model).__name__} has no list of blocks",
            where="no nn.ModuleList with parameters was found in its text decoder",
            fix="choose a decoder-only transformer",
        )
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    # the depth decides; the size only between lists that both have it, or that both lack it
    path = max(lists, key=lambda name: (len(lists[name]) == depth, _size(lists[name])))
    return path, lists[path]


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists with parameters by path: the text decoder's, else the model's."""
    getter: Any = getattr(model, "get_decoder", None)
    decoder = (getter() if getter else None) or model
    # `get_decoder` returns the module, and names are wanted: find its path.
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    return _lists_below(model, decoder, path) or _lists_below(model, model, "")


def _lists_below(model: nn.Module, root: nn.Module, prefix: str) -> dict[str, nn.ModuleList]:
    """Return the outermost lists with parameters by path, without those of towers.

    A tower for images or audio is a `PreTrainedModel` inside the model whose main input is not
    token ids, or which has another configuration class.
    """
    configs = {type(getattr(model, "config", None)), type(_text_config(model))}
    lists: dict[str, nn.ModuleList] = {}
    skipped: list[str] = []  # towers, and lists that are already returned
    for path, module in root.named_modules(prefix=prefix):
        if any(path.startswith(f"{above}.") for above in skipped):
            continue
        main_input = getattr(module, "main_input_name", None)  # only `PreTrainedModel` has it
        foreign = main_input is not None and type(getattr(module, "config", None)) not in configs
        if module is not root and (foreign or main_input not in (None, "input_ids")):
            skipped.append(path)
        elif isinstance(module, nn.ModuleList):
            skipped.append(path)
            if _size(module):  # packed layers have no parameters; their blocks still have norms
                lists[path] = module
    return lists


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matrix_size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def find_linears(model: nn.Module) -> list[Linear]:
    """Return every prunable matrix once, block by block, in the order of the modules.

    Raises:
        IncompatibleData: Less than `MIN_COVERAGE` of a block's matrices is prunable, or the model
            has a second list of blocks; the message names the uncovered matrices and their share.
    """
    prefix, blocks = find_blocks(model)
    _require_sole(model, prefix, blocks)
    for index, block in enumerate(blocks):
        _require_coverage(type(block).__name__, block, _linears_in(prefix, index, block))
    return [linears[0] for linears in _by_matrix(prefix, blocks)]


def find_repeats(model: nn.Module, linears: Sequence[Linear]) -> dict[Linear, Linear]:
    """Map every repeat, a later block's use of an earlier block's matrix, to its linear.

    Blocks may share weights (Zamba2). The matrix belongs to the first block that has it, and is
    pruned there.

    Args:
        model: The model.
        linears: From `find_linears`.

    Returns:
        Repeat -> the one of `linears` with the same matrix; at most one repeat a block and matrix.
    """
    by_name = {linear.name: linear for linear in linears}
    repeats: dict[Linear, Linear] = {}
    for first, *others in _by_matrix(*find_blocks(model)):
        # The caller's own object: a Linear is compared by identity (eq=False).
        first, blocks = by_name.get(first.name, first), {first.block_index}
        for other in others:
            if other.block_index not in blocks:
                blocks.add(other.block_index)
                repeats[other] = first
    return repeats


def _by_matrix(prefix: str, blocks: nn.ModuleList) -> list[list[Linear]]:
    """Return the linears of every matrix, in the order of the blocks."""
    uses: dict[tuple[int, int | None], list[Linear]] = {}
    for index, block in enumerate(blocks):
        for linear in _linears_in(prefix, index, block):
            parameter = getattr(linear.module, linear.attribute)
            # shared weights are one Parameter object in several modules
            uses.setdefault((id(parameter), linear.expert), []).append(linear)
    return list(uses.values())


def _linears_in(prefix: str, index: int, block: nn.Module) -> list[Linear]:
    return [
        linear
        for path, module in block.named_modules()
        for linear in _linears_of(module, f"{prefix}.{index}.{path}".rstrip("."), index)
    ]


def _require_sole(model: nn.Module, prefix: str, blocks: nn.ModuleList) -> None:
    """Refuse a decoder with a second list of blocks; a list of single matrices does not count."""
    size = _matrix_size(blocks)
    for path, other in _block_lists(model).items():
        share = _matrix_size(other) / max(1, size + _matrix_size(other))
        whole = any(next(member.children(), None) is not None for member in other)
        if path != prefix and whole and share > 1 - MIN_COVERAGE:
            raise IncompatibleData(
                f"{type(model).__name__} has two lists of blocks, and one would stay dense",
                where=f"{prefix}, and {path} with {share:.0%} of the matrices of both",
                fix="choose another architecture, or report this one",
            )


def _linears_of(module: nn.Module, path: str, index: int) -> list[Linear]:
    """Return the prunable matrices that a module itself owns, without those of its children."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        out, width = module.weight.shape  # [out, in]
        return [Linear(path, f"{path}.weight", index, module, "weight", out, width)]
    if isinstance(module, Conv1D):
        width, out = module.weight.shape  # [in, out]
        return [
            Linear(path, f"{path}.weight", index, module, "weight", out, width, transposed=True)
        ]
    # True, as in GPT-OSS, means [experts, in, out].
    if getattr(module, "is_transposed", None) is not False:  # an attribute of fused experts only
        return []
    return [
        Linear(
            f"{path}.{name}.{expert}",
            f"{path}.{name}",
            index,
            module,
            name,
            out_features=parameter.shape[1],  # [experts, out, in]
            in_features=parameter.shape[2],
            expert=expert,
        )
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
        for expert in range(parameter.shape[0])
    ]


def _require_coverage(kind: str, block: nn.Module, linears: list[Linear]) -> None:
    matrices = {name: p for name, p in block.named_parameters() if p.ndim >= 2}
    # By identity: all experts of a stack are one parameter, counted once.
    covered = {id(getattr(linear.module, linear.attribute)) for linear in linears}
    total = sum(p.numel() for p in matrices.values())
    missed = {name: p.numel() / total for name, p in matrices.items() if id(p) not in covered}
    share = 1 - sum(missed.values())  # vectors (norms, biases) do not count
    if total == 0 or share < MIN_COVERAGE:
        worst = sorted(missed, key=lambda name: -missed[name])[:3]
        raise IncompatibleData(
            f"{kind} cannot be pruned: only {share:.1%} of its matrix parameters are linears",
            where="not covered: " + ", ".join(f"{name} ({missed[name]:.1%})" for name in worst),
            fix="choose another architecture, or report this one",
        )
