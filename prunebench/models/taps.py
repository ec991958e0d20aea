"""Capture the input of a matrix: at the call of its module, or at the product with its parameter.

Most linears are called as modules, and a forward pre-hook gets their input. Experts that are fused
into one parameter have no module each, and some modules are never called: Mamba multiplies with
`dt_proj.weight`. There the product itself is intercepted. `Account` finds out which case applies to
each linear.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prunebench.models.linears import Linear

InputHook = Callable[[Linear, Tensor], None]

_LEFT_RIGHT = {
    torch.matmul, torch.mm, torch.bmm,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
}  # fmt: skip
_SUM_LEFT_RIGHT = {torch.addmm, Tensor.addmm}
_CASTS = {
    Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half,
    Tensor.bfloat16, Tensor.contiguous, Tensor.clone, torch.clone,
}  # fmt: skip


class ProductTap(TorchFunctionMode):
    """Call a hook with the input of every product with one of the given linears, before it runs.

    Args:
        linears: Their parameters are recognized by their present address in memory.
        hook: Called with the linear and its input, (..., in).
    """

    def __init__(self, linears: Collection[Linear], hook: InputHook) -> None:
        super().__init__()
        self._hook = hook
        self._by_address: dict[int, Linear] = {}
        self._casts: dict[Linear, Tensor] = {}  # held, so that their addresses are not reused
        for linear in linears:
            self._by_address[linear.stored.data_ptr()] = linear

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for matrix, inputs, is_out_in in _product(func, (*args, *kwargs.values())):
            linear = self._matching(matrix, is_out_in)
            if linear is not None:
                self._hook(linear, inputs)
        result = func(*args, **kwargs)
        # `weight.to(dtype)` and the like: a product with the cast is a product with the linear
        if func in _CASTS and isinstance(result, Tensor):
            linear = self._by_address.get(args[0].data_ptr())
            if linear is not None and result.shape == linear.stored.shape:
                self._remember(linear, result)
        return result

    def _remember(self, linear: Linear, cast: Tensor) -> None:
        """Recognize a linear by a copy of its matrix as well; only its latest copy counts."""
        if cast.data_ptr() not in self._by_address:
            if linear in self._casts:
                del self._by_address[self._casts[linear].data_ptr()]
            self._casts[linear] = cast
            self._by_address[cast.data_ptr()] = linear

    def _matching(self, matrix: Tensor, is_out_in: bool) -> Linear | None:
        """Return the linear whose whole matrix this is, if its axes are in the product's order.

        Args:
            matrix: A 2-d operand of a product.
            is_out_in: Whether the product reads it as [out, in], else as [in, out].
        """
        linear = self._by_address.get(matrix.data_ptr())
        if linear is None:
            return None
        shape = (linear.out_features, linear.in_features)
        as_stored = is_out_in != linear.transposed  # else a transposed view of the parameter
        whole = tuple(matrix.shape) == (shape if is_out_in else shape[::-1])
        contiguous = matrix.stride(-1 if as_stored else -2) == 1  # square: tells W from W.T
        return linear if whole and (contiguous or 1 in shape) else None


def _product(func: Any, values: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield a product's possible matrices, with the input and whether it is read as [out, in]."""
    if func is nn.functional.linear:
        yield values[1], values[0], True
        return
    if func in _LEFT_RIGHT:
        left, right = values[:2]
    elif func in _SUM_LEFT_RIGHT:
        left, right = values[1:3]
    elif func is Tensor.__rmatmul__:
        right, left = values[:2]
    else:
        return
    if right.ndim == 2:
        yield right, left, False  # x W: [..., in] [in, out]
    if left.ndim == 2 and right.ndim >= 2:
        yield left, right.transpose(-1, -2), True  # W x: [out, in] [..., in, tokens]


class Account(ProductTap):
    """Record how each linear of a block is used in one pass; use it in a `with` statement.

    Attributes:
        called: (linear, input) of every module call, in order.
        products: (linear, input) of every product with a linear's matrix. (The tensors are held:
            a freed address would be reused.)
        others: By linear, the name of a function that uses its matrix in another way.
    """

    def __init__(self, linears: Collection[Linear]) -> None:
        self.called: list[tuple[Linear, Tensor]] = []
        self.products: list[tuple[Linear, Tensor]] = []
        self.others: dict[Linear, str] = {}
        super().__init__(linears, lambda linear, inputs: self.products.append((linear, inputs)))
        # by address range of the parameter: several parameters may share one storage
        self._ends: dict[int, int] = {}
        self._members: dict[int, list[Linear]] = {}
        for linear in linears:
            parameter: Tensor = getattr(linear.module, linear.attribute)
            start = parameter.data_ptr()
            self._ends[start] = start + parameter.nbytes
            self._members.setdefault(start, []).append(linear)
        self._starts = sorted(self._ends)
        self._hooks = capture_inputs(linears, lambda linear, x: self.called.append((linear, x)))

    def __enter__(self) -> Account:
        self._hooks.__enter__()
        mode: Any = super()
        mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        mode: Any = super()
        mode.__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = len(self.products)
        result = super().__torch_function__(func, types, args, kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs or len(self.products) > before or func in _CASTS:
            return result
        views = {self._parameter_at(output) for output in outputs}  # a view is not yet a use
        for value in tree_leaves((args, kwargs)):
            start = self._parameter_at(value) if isinstance(value, Tensor) else None
            if start is not None and start not in views:
                for linear in self._members[start]:
                    self.others.setdefault(linear, getattr(func, "__name__", str(func)))
        return result

    def _parameter_at(self, tensor: Tensor) -> int | None:
        """Return the start address of the parameter whose memory a tensor is in, if any."""
        address = tensor.data_ptr()
        position = bisect_right(self._starts, address) - 1
        start = self._starts[position] if position >= 0 else 0
        return start if position >= 0 and address < self._ends[start] else None


@contextlib.contextmanager
def capture_inputs(
    linears: Collection[Linear], hook: InputHook, *, by_product: Collection[Linear] = ()
) -> Iterator[None]:
    """Call `hook(linear, input)` just before each of `linears` is applied.

    Args:
        linears: The linears to capture.
        hook: Called with the linear and its input, (..., in).
        by_product: Linears that are not called as modules; experts of a fused parameter never are.
    """
    products = [linear for linear in linears if linear.expert is not None or linear in by_product]
    handles = [
        linear.module.register_forward_pre_hook(
            lambda _, args, kwargs, linear=linear: hook(linear, _first(args, kwargs)),
            with_kwargs=True,
        )
        for linear in linears
        if linear.expert is None and linear not in by_product
    ]
    try:
        with ProductTap(products, hook) if products else contextlib.nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))
