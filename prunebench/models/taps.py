"""Seeing the input of a matrix: at the call of its module, or at the product with its parameter.

Most linears are called as modules, and a hook sees what they get. Experts that are fused into one
parameter have no module of their own, and some modules are never called: Mamba multiplies with
`dt_proj.weight`. There the product itself is watched. `Account` says which it is, for every linear.
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
    """Calls a tap with the input of every product with one of some matrices, before it is made.

    Args:
        linears: Whose parameters are watched, as they lie in memory now.
        tap: Is called with the linear and its input, (..., in).
    """

    def __init__(self, linears: Collection[Linear], tap: InputHook) -> None:
        super().__init__()
        self._tap = tap
        self._by_address: dict[int, Linear] = {}
        self._casts: dict[Linear, Tensor] = {}  # alive, so that no other tensor lies there
        for linear in linears:
            self._by_address[linear.stored.data_ptr()] = linear

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for matrix, inputs, is_out_in in _product(func, (*args, *kwargs.values())):
            linear = self._matching(matrix, is_out_in)
            if linear is not None:
                self._tap(linear, inputs)
        result = func(*args, **kwargs)
        if func in _CASTS and isinstance(result, Tensor):
            linear = self._by_address.get(args[0].data_ptr())
            if linear is not None and result.shape == linear.stored.shape:
                self._remember(linear, result)
        return result

    def _remember(self, linear: Linear, cast: Tensor) -> None:
        """Take a matrix in another dtype for the linear's; of each linear the last one counts."""
        if cast.data_ptr() not in self._by_address:
            if linear in self._casts:
                del self._by_address[self._casts[linear].data_ptr()]
            self._casts[linear] = cast
            self._by_address[cast.data_ptr()] = linear

    def _matching(self, matrix: Tensor, is_out_in: bool) -> Linear | None:
        """Return the linear whose whole matrix this is, in the order that the product needs."""
        linear = self._by_address.get(matrix.data_ptr())
        if linear is None:
            return None
        shape = (linear.out_features, linear.in_features)
        as_stored = is_out_in != linear.transposed  # else it was transposed on the way
        whole = tuple(matrix.shape) == (shape if is_out_in else shape[::-1])
        in_rows = matrix.stride(-1 if as_stored else -2) == 1
        return linear if whole and (in_rows or 1 in shape) else None


def _product(func: Any, values: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield what may be the matrix of a product, its input, and whether it is used as [out, in]."""
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
        yield right, left, False
    if left.ndim == 2 and right.ndim >= 2:
        yield left, right.transpose(-1, -2), True


class Account(ProductTap):
    """Notes how each linear of a block is used in one pass; to be used in a `with` statement.

    Attributes:
        called: The inputs of the modules, by linear, in order.
        products: The inputs of the products with their matrices. (The tensors are kept: a freed
            one's address would be used again.)
        others: Names of functions that use a matrix for something else.
    """

    def __init__(self, linears: Collection[Linear]) -> None:
        self.called: list[tuple[Linear, Tensor]] = []
        self.products: list[tuple[Linear, Tensor]] = []
        self.others: dict[Linear, str] = {}
        super().__init__(linears, lambda linear, inputs: self.products.append((linear, inputs)))
        # by the memory of a parameter: several may lie in one storage
        self._ends: dict[int, int] = {}
        self._members: dict[int, list[Linear]] = {}
        for linear in linears:
            parameter: Tensor = getattr(linear.module, linear.attribute)
            begin = parameter.data_ptr()
            self._ends[begin] = begin + parameter.nbytes
            self._members.setdefault(begin, []).append(linear)
        self._begins = sorted(self._ends)
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
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        if not made or len(self.products) > before or func in _CASTS:
            return result
        views = {self._parameter_at(one) for one in made}
        for value in tree_leaves((args, kwargs)):
            begin = self._parameter_at(value) if isinstance(value, Tensor) else None
            if begin is not None and begin not in views:
                for linear in self._members[begin]:
                    self.others.setdefault(linear, getattr(func, "__name__", str(func)))
        return result

    def _parameter_at(self, tensor: Tensor) -> int | None:
        """Return where the parameter begins in whose memory a tensor lies."""
        address = tensor.data_ptr()
        place = bisect_right(self._begins, address) - 1
        begin = self._begins[place] if place >= 0 else 0
        return begin if place >= 0 and address < self._ends[begin] else None


@contextlib.contextmanager
def capture_inputs(
    linears: Collection[Linear], tap: InputHook, *, by_product: Collection[Linear] = ()
) -> Iterator[None]:
    """Call `tap(linear, input)` just before each of `linears` is applied.

    Args:
        linears: Which ones.
        tap: What is called.
        by_product: Those of them that are not called as modules; experts of a fused parameter
            never are.
    """
    products = [one for one in linears if one.expert is not None or one in by_product]
    handles = [
        linear.module.register_forward_pre_hook(
            lambda _, args, kwargs, linear=linear: tap(linear, _first(args, kwargs)),
            with_kwargs=True,
        )
        for linear in linears
        if linear.expert is None and linear not in by_product
    ]
    try:
        with ProductTap(products, tap) if products else contextlib.nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))
