"""`Sparse24Linear`, and the conversion of a model to it, layer by layer and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.models.linears import Linear
from prunebench.sparse24.backends.protocol import Product
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.backends.unpack import Decompress
from prunebench.sparse24.buckets import BUCKETS
from prunebench.sparse24.layouts import FileLayout, WeightLayout
from prunebench.sparse24.packed import (
    Packed24,
    check_24,
    pack24,
    require_24,
    unpack24,
)
from prunebench.sparse24.policy import Choice, Policy
from prunebench.sparse24.weight import PackedWeight


class Sparse24Linear(nn.Module):
    """A linear layer whose 2:4 weight stays packed; it computes what the dense one would.

    The weight is no parameter and gets no gradient; `model.to(device)` moves it. The state dict has
    `weight.values24` and `weight.codes24` in the file layout, whatever layout is in memory.

    Args:
        packed: The weight.
        bias: [out] in the weight's dtype, or None.
        policy: Chooses the backend for a number of tokens.

    Raises:
        IncompatibleData: The bias is of another dtype.
    """

    weight: PackedWeight
    policy: Policy

    def __init__(self, packed: Packed24, bias: Tensor | None, *, policy: Policy) -> None:
        super().__init__()
        if bias is not None and bias.dtype != packed.dtype:
            raise IncompatibleData(f"the bias is {bias.dtype}, the weight {packed.dtype}")
        self.weight = PackedWeight(FileLayout(packed))
        self._build(policy, bias)
        self._choose_layout()

    @classmethod
    def empty(
        cls, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool, policy: Policy
    ) -> Sparse24Linear:
        """Return a layer (out, in) on the meta device, for a loader to fill; then call `settle`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.weight = PackedWeight.empty(shape, dtype)
        meta = torch.empty(shape[0], dtype=dtype, device="meta") if bias else None
        layer._build(policy, meta)
        return layer

    def settle(self, *, name: str) -> None:
        """Put the loaded weight into the layout that its backends read.

        Raises:
            IncompatibleData: What was loaded as `name` is no 2:4 matrix.
        """
        packed = self.weight.loaded(name=name)
        if packed.device != self.policy.device:
            self.policy = _policy_on(packed.device, self.policy)
        self.weight = PackedWeight(FileLayout(packed))
        self._choose_layout()

    def _build(self, policy: Policy, bias: Tensor | None) -> None:
        self.out_features, self.in_features = self.weight.shape
        self.policy = policy
        self.register_buffer("bias", bias)
        self.bias: Tensor | None
        self.register_load_state_dict_post_hook(_choose_layout_again)  # type: ignore[no-untyped-call]
        self._forget_products()

    def _choose_layout(self) -> None:
        """Store the weight, which is in the file layout, as its backends read it."""
        packed = self.form.packed()
        # dict.fromkeys: distinct, in order of rising token counts; the first that has a layout
        # decides.
        chosen = dict.fromkeys(self._choose(bucket.last).backend for bucket in BUCKETS)
        layouts = (backends()[name].layout(packed) for name in chosen)
        form = next((layout for layout in layouts if layout is not None), None)
        if form is not None:
            self.weight.form = form
        self._forget_products()

    def _forget_products(self) -> None:
        self.products: dict[str, Product] = {}
        self._routes: dict[int, Product] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the products out of copies and pickles: they are built on first use."""
        return {**self.__dict__, "products": {}, "_routes": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sparse24Linear:
        before = self.weight.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.device != before:
            self.policy = _policy_on(self.weight.device, self.policy)
            self._choose_layout()
        return self

    @property
    def form(self) -> WeightLayout:
        """The weight in its layout."""
        return self.weight.form

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias, [..., out]; x is [..., in] in the weight's dtype.

        Under `torch.autocast` x is cast and the result is in autocast's dtype, as by `nn.Linear`.

        Raises:
            RuntimeError: x is of another dtype, as by `nn.Linear`.
        """
        dtype = self.weight.dtype
        autocast = _autocast_dtype(x)
        if autocast == dtype:
            x = x.to(dtype)
        elif autocast is None and x.dtype != dtype:
            raise RuntimeError(
                f"the input is {x.dtype}, the packed weight {dtype}: cast the input, or run the "
                "model under torch.autocast"
            )
        flat = x.reshape(-1, self.in_features)  # [tokens, in], any strides
        trains = flat.requires_grad and torch.is_grad_enabled()
        # The kernels have no backward pass, and no weights of another dtype.
        if trains or autocast not in (None, dtype):
            dense = torch.nn.functional.linear(flat, unpack24(self.form.packed()), self.bias)
            return dense.view(*x.shape[:-1], self.out_features)  # [..., out]
        tokens = flat.shape[0]
        # Cached by token count: decoding asks the same for every layer and token.
        product = self._routes.get(tokens)
        if product is None:
            product = self._routes.setdefault(tokens, self.product_for(tokens))
        # [tokens, out] -> [..., out]
        return product.run(flat, self.bias).view(*x.shape[:-1], self.out_features)

    def product_for(self, tokens: int) -> Product:
        """Return the built product of the backend for a number of tokens."""
        return self.product_of(self._choose(max(1, tokens)).backend)

    def product_of(self, name: str) -> Product:
        """Return the product of a backend, built on first use."""
        if name not in self.products:
            self.products[name] = backends()[name].build(self.form)
        return self.products[name]

    def _choose(self, tokens: int) -> Choice:
        return self.policy.choose(self.shape, self.form.dtype, tokens)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense matrix."""
        return self.out_features, self.in_features

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight, with the copies that products store."""
        return self.form.stored_bytes + sum(p.stored_bytes for p in self.products.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight."""
        return self.out_features * self.in_features * self.form.dtype.itemsize

    def packed(self) -> Packed24:
        """Return the weight in the file layout."""
        return self.form.packed()

    def extra_repr(self) -> str:
        """Return the shape, the layout, and the backend for one token."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"form={self.form.name}, backend={self._choose(1).backend}"
        )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which `torch.autocast` casts an input; None if it does not."""
    kind = x.device.type
    # it leaves float64 as it is, and does not know the meta device
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _policy_on(device: torch.device, policy: Policy) -> Policy:
    """Return the policy of another device, with the same options."""
    return Policy.load(device, forced=policy.forced, speed=policy.speed)


def _choose_layout_again(layer: Sparse24Linear, incompatible_keys: object) -> None:
    """Store a weight that `load_state_dict` has read in the file layout as its backends read it."""
    layer._choose_layout()


@dataclass
class Conversion:
    """A model whose 2:4 linears have been replaced.

    Attributes:
        layers: The new layers by name.
        dense: Linears that were not replaced, with the reason.
    """

    layers: dict[str, Sparse24Linear] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    _undo: list[tuple[nn.Module, str, Linear, Sparse24Linear]] = field(default_factory=list)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights of the new layers."""
        return sum(layer.stored_bytes for layer in self.layers.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same weights when dense."""
        return sum(layer.dense_bytes for layer in self.layers.values())

    def restore(self) -> None:
        """Restore the dense layers one by one; the weights are bit for bit the original ones."""
        while self._undo:
            parent, child, linear, layer = self._undo.pop()
            weight = unpack24(layer.packed())  # [out, in]
            weight = weight.T.contiguous() if linear.transposed else weight  # Conv1D: [in, out]
            # The original module is reused: hooks and attributes that others have set on it
            # survive.
            setattr(linear.module, linear.attribute, nn.Parameter(weight, requires_grad=False))
            setattr(parent, child, linear.module)
            del self.layers[linear.name]

    def count(self, tokens: int) -> dict[str, int]:
        """Return the number of layers per backend for a number of tokens."""
        counts: dict[str, int] = {}
        for layer in self.layers.values():
            name = layer.policy.choose(layer.shape, layer.form.dtype, tokens).backend
            counts[name] = counts.get(name, 0) + 1
        return counts


def convert(
    model: nn.Module, linears: Iterable[Linear], *, policy: Policy, strict: bool = False,
    for_memory: bool = False,
) -> Conversion:  # fmt: skip
    """Replace the 2:4 linears of a model one by one, so that no more than one is in memory twice.

    Args:
        model: On its device, in bfloat16 or float16.
        linears: From `find_linears`.
        policy: Chooses backends.
        strict: Whether a linear that is not 2:4 is an error.
        for_memory: Whether to replace those, too, that were measured as slower for any number of
            tokens. Otherwise they stay dense, even if that leaves none.

    Raises:
        IncompatibleData: No linear is 2:4 in 16 bits; or `strict` and a linear is not 2:4 (the
            message names layer and group).
    """
    conversion = Conversion()
    packable = 0
    for linear in linears:
        reason = _why_not_24(linear, strict=strict)
        if not reason:
            shape = (linear.out_features, linear.in_features)
            reason = "" if for_memory else policy.gains_nothing(shape, linear.stored.dtype)
            packable += 1
        if reason:
            conversion.dense[linear.name] = reason
            continue
        path, _, child = linear.name.rpartition(".")
        parent = model.get_submodule(path)
        layer = Sparse24Linear(
            pack24(linear.weight.contiguous(), name=linear.name),
            getattr(linear.module, "bias", None),
            policy=policy,
        )
        setattr(linear.module, linear.attribute, None)  # frees the dense weight
        setattr(parent, child, layer)
        conversion.layers[linear.name] = layer
        conversion._undo.append((parent, child, linear, layer))
    if not packable:
        name, reason = next(iter(conversion.dense.items()), ("the model", "it has no linears"))
        raise IncompatibleData(
            f"no layer can be run as 2:4: {name}: {reason}",
            where=f"{len(conversion.dense)} linears were checked",
            fix="prune with --sparsity 2:4 in bfloat16",
        )
    _reserve(conversion.layers.values())
    return conversion


def _reserve(layers: Iterable[Sparse24Linear]) -> None:
    """Allocate the workspace of unpacking for the largest layer, before any graph is captured."""
    unpacking = backends()[Decompress.name]
    forms = [
        layer.form
        for layer in layers
        if any(layer._choose(bucket.last).backend == Decompress.name for bucket in BUCKETS)
    ]
    if forms and isinstance(unpacking, Decompress):
        unpacking.workspace.matrix(max(forms, key=lambda form: math.prod(form.shape)))


def _why_not_24(linear: Linear, *, strict: bool) -> str:
    """Return why a linear cannot be packed; empty if it can."""
    if linear.expert is not None:
        return "the experts of a mixture are one parameter, not layers"
    dtype = linear.stored.dtype
    if linear.in_features % 4:
        return f"4 does not divide its {linear.in_features} inputs"
    report = check_24(linear.weight.contiguous(), name=linear.name)
    if not report.holds:
        if strict:
            require_24(report, linear.weight, name=linear.name)
        return f"not 2:4: {report.over:,} of {report.groups:,} groups keep more than 2"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its weight is {str(dtype).removeprefix('torch.')}: 2:4 is packed in 16 bits"
    return ""


@dataclass(frozen=True)
class Explained:
    """The backend of a layer for a number of tokens, with reasons.

    Attributes:
        shape: (out, in); (0, 0) for a layer that stayed dense.
        why: Why this backend.
        why_not: Why not, for every other backend.
    """

    layer: str
    shape: tuple[int, int]
    tokens: int
    backend: str
    why: str
    why_not: dict[str, str]


def explain(conversion: Conversion, tokens: Sequence[int]) -> list[Explained]:
    """Return for every layer and number of tokens the backend, why, and why not the others.

    Layers that stayed dense have the backend `dense` and no reasons for the others.
    """
    rows = []
    for name, layer in conversion.layers.items():
        for count in tokens:
            choice = layer.policy.choose(layer.shape, layer.form.dtype, count)
            others = layer.policy.verdicts(layer.shape, layer.form.dtype, count)
            measured = layer.policy.measured(layer.shape, layer.form.dtype, count)
            why_not = {
                other: _speedup(measured.get(other)) if verdict.ok else verdict.reason
                for other, verdict in others.items()
                if other != choice.backend
            }
            rows.append(Explained(name, layer.shape, count, choice.backend, choice.why, why_not))
    for name, reason in conversion.dense.items():
        rows.append(Explained(name, (0, 0), 0, "dense", reason, {}))
    return rows


def _speedup(ratio: float | None) -> str:
    return "usable; not measured here" if ratio is None else f"measured: {ratio:.2f}x"
