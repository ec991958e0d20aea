"""`PackedWeight`: the 2:4 weight of a layer as a module, which loads, saves and moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.sparse24.layouts import FileLayout, WeightLayout
from prunebench.sparse24.packed import Packed24, require_sound

PARTS = ("values24", "codes24")
"""The tensors of a packed matrix in files and state dicts, see `sparse24.packed`."""


class PackedWeight(nn.Module):
    """The weight of a `Sparse24Linear`, in the layout that its kernels read.

    It is no parameter and gets no gradient. Its state has `values24` and `codes24` in the file
    layout, whatever layout is in memory: a layer `up_proj` stores `up_proj.weight.values24`, the
    name that the files of a packed folder have.
    """

    def __init__(self, form: WeightLayout) -> None:
        super().__init__()
        self.form = form

    @classmethod
    def empty(cls, shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
        """Return a weight (out, in) on the meta device, for a loader to fill; see `loaded`."""
        rows, width = shape
        values = torch.empty(rows, width // 2, dtype=dtype, device="meta")
        codes = torch.empty(rows, (width + 7) // 8, dtype=torch.uint8, device="meta")
        weight = cls(FileLayout(Packed24(values, codes)))
        weight._forget_buffers()  # a loader would give each of them memory
        for name, tensor in zip(PARTS, (values, codes), strict=True):
            # persistent, so that a loader finds them among the tensors that it has to fill
            weight.register_buffer(name, tensor)
        return weight

    def loaded(self, *, name: str) -> Packed24:
        """Return what a loader has put into an `empty` weight.

        Raises:
            IncompatibleData: It is no 2:4 matrix.
        """
        packed = Packed24(*(self._buffers.pop(part) for part in PARTS))  # type: ignore[arg-type]
        require_sound(packed, name=name)
        return packed

    @property
    def form(self) -> WeightLayout:
        """The weight in its layout."""
        return self._form

    @form.setter
    def form(self, form: WeightLayout) -> None:
        self._form = form
        self._forget_buffers()
        # Buffers, so that the memory footprint of the model counts them.
        for name, tensor in _tensors(form):
            self.register_buffer(f"{form.name}_{name}", tensor, persistent=False)

    def _forget_buffers(self) -> None:
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense matrix."""
        return self.form.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values, for models that cast their activations to it."""
        return self.form.dtype

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.form.device

    def extra_repr(self) -> str:
        """Return shape, dtype and layout."""
        return f"shape={self.shape}, dtype={self.dtype}, layout={self.form.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Move the weight, as `model.to(device)` asks; it cannot be cast."""
        if any(part in self._buffers for part in PARTS):  # not loaded yet
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.dtype != self.dtype:
            raise IncompatibleData(
                f"a packed weight is {_name(self.dtype)} and cannot become {_name(moved.dtype)}",
                where="the model is partly cast: load it again",
                fix="pass only a device to model.to()",
            )
        if moved.device != self.device:
            # The kernels of the other device read another layout: `Sparse24Linear` chooses it.
            self.form = FileLayout(self.form.packed().to(moved.device))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        packed = self.form.packed()
        for part, tensor in zip(PARTS, (packed.values, packed.codes), strict=True):
            # on the meta device, while a model is loaded, the buffers themselves
            destination[prefix + part] = self._buffers.get(part, tensor)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + part for part in PARTS]
        tensors = [state_dict[name] for name in names if name in state_dict]
        missing_keys += [name for name in names if name not in state_dict]
        if strict:
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key not in names
            ]
        if len(tensors) < len(names):
            return
        # Copies: the caller may change or free its state dict afterwards.
        packed = Packed24(*(tensor.to(self.device, copy=True) for tensor in tensors))
        try:
            require_sound(packed, name=prefix.removesuffix(".") or "the state")
        except IncompatibleData as error:
            error_msgs.append(str(error))
            return
        if (packed.shape, packed.dtype) != (self.shape, self.dtype):
            error_msgs.append(
                f"{names[0]} is a {packed.dtype} matrix {list(packed.shape)}, the layer "
                f"{self.dtype} {list(self.shape)}"
            )
            return
        self.form = FileLayout(packed)


def _tensors(form: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a layout, those of a `Packed24` in it too."""
    for field in fields(form):
        value = getattr(form, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
        elif isinstance(value, Packed24):
            yield from _tensors(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
