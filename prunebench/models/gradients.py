"""Norms of the loss's gradient for every prunable matrix, over calibration windows.

The loss is the mean cross-entropy of a window's next tokens, and the model is dense. Every window
has its own backward pass: sum_k |g_k| (`l1`) and sum_k g_k^2 (`l2`) cannot be computed from the
gradient of a sum.

A window takes two passes over the blocks, see `models.backward`. A linear's gradient is computed in
slices of rows that fit the CPU cache and is added to the accumulator at once, so the gradient of a
whole layer never exists.

On the CPU the accumulator is a memory-mapped file in the cache folder; once complete, later runs on
the same weights and tokens read it. On a GPU it is in GPU memory and written once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.files import atomic_file, cache_dir, require_writable
from prunebench.models.backward import Backward
from prunebench.models.hashing import hash_weights, settings_text
from prunebench.models.linears import Linear, find_linears
from prunebench.models.replay import plain_inference
from prunebench.models.stored_outputs import product_operands

Norm = Literal["l1", "l2"]

_SLICE = {"cpu": 1 << 19, "cuda": 1 << 24}  # elements of a gradient computed at a time
_VERSION = 3  # of the cached file; part of its name
_PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23  # Linux's MADV_POPULATE_WRITE, which Python's mmap does not name
_CHECK_TOKENS = 128


@dataclass(frozen=True)
class GradientNorms:
    """Gradient norms of a model, in a file.

    Attributes:
        path: A safetensors file: for each linear a float32 [out, in] under its name.
        norm: `l1` or `l2`.
        samples: Number of windows.
    """

    path: Path
    norm: Norm
    samples: int

    def read(self, name: str) -> Float[Tensor, "out in"]:
        """Return sum_k |g_k| (l1) or sqrt(sum_k g_k^2) (l2) of a linear, (out, in), on the CPU."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            total: Tensor = file.get_tensor(name)
        # For l2 the file holds sum_k g_k^2.
        return total if self.norm == "l1" else total.sqrt_()


def gradient_norms(
    model: nn.Module,
    token_ids: Int[Tensor, "samples seqlen"],
    *,
    norm: Norm,
    advance: Callable[[int], None] = lambda done: None,
) -> GradientNorms:
    """Return the gradient norms of the dense model, from the cache if it has them.

    Args:
        model: The dense model, in evaluation mode.
        token_ids: Calibration windows, (samples, seqlen).
        norm: The norm over the windows.
        advance: Called with 1 after each window, or with their number if the cache has the norms.

    Raises:
        IncompatibleData: A layer's gradient is zero everywhere, or not finite; it is named.
        SaveError: The cache has no space for a float32 for each prunable weight.
    """
    linears = find_linears(model)
    path = _cache_path(model, token_ids, norm)
    norms = GradientNorms(path, norm, len(token_ids))
    if path.is_file():
        advance(len(token_ids))
        return norms
    size = sum(linear.size for linear in linears)
    require_writable(path.parent, need_bytes=4 * size + (1 << 20))  # a float32 each, and a header
    device = next(model.parameters()).device
    with atomic_file(path) as part, _Accumulators(part, linears, norm, device) as sums:
        with plain_inference(model):
            backward = Backward(model, linears, sums)
            backward.prepare(token_ids[:1, :_CHECK_TOKENS].to(device))
            # [1, seqlen] each: a sum of |g_k| needs every g_k by itself.
            for window in torch.split(token_ids, 1):
                backward.add(window.to(device))
                advance(1)
        sums.finish()
    return norms


def _cache_path(model: nn.Module, token_ids: Tensor, norm: Norm) -> Path:
    digest = hashlib.sha256(f"{_VERSION} {norm} {hash_weights(model)} {token_ids.shape}".encode())
    digest.update(token_ids.contiguous().numpy().tobytes())
    digest.update(settings_text(model).encode())
    return cache_dir() / "gradients" / f"{digest.hexdigest()[:32]}.safetensors"


class _Accumulators:
    """A float32 sum, (out, in), for each linear: in a mapped safetensors file, or on a GPU."""

    def __init__(
        self, path: Path, linears: Sequence[Linear], norm: Norm, device: torch.device
    ) -> None:
        self.norm = norm
        self._linears = linears
        self._on_cpu = device.type == "cpu"
        self._buffer = torch.empty(0, device=device)
        self._scale = 1.0
        header: dict[str, Any] = {}
        end = 0
        for linear in linears:
            shape = [linear.out_features, linear.in_features]
            header[linear.name] = {
                "dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * linear.size],
            }  # fmt: skip
            end += 4 * linear.size
        # safetensors: header length (u64), JSON header, data; padded so that data start on a page
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 4096)
        begin = 8 + len(text)
        with path.open("w+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            # a full disk fails here; in a mapped page it would be a bus error
            os.posix_fallocate(file.fileno(), 0, begin + end)
            # A new file reads as zeros, so every sum begins at 0.
            self._map = mmap.mmap(file.fileno(), 0)
        self._offsets = {name: begin + row["data_offsets"][0] for name, row in header.items()}
        self._mapped: dict[str, Tensor] = {}
        for linear in linears:
            flat = np.frombuffer(self._map, np.float32, linear.size, self._offsets[linear.name])
            shape = [linear.out_features, linear.in_features]
            self._mapped[linear.name] = torch.from_numpy(flat).view(shape)  # [out, in]
        self._sums = self._mapped
        if not self._on_cpu:
            self._sums = {
                name: torch.zeros_like(mapped, device=device)
                for name, mapped in self._mapped.items()
            }

    def __enter__(self) -> _Accumulators:
        return self

    def __exit__(self, *error: object) -> None:
        # The arrays are views of the map: without them it is unmapped.
        self._sums = self._mapped = {}

    def add_product(self, linear: Linear, outer: Tensor, inputs: Tensor) -> None:
        """Add the norm of the gradient outer^T inputs.

        Args:
            linear: The linear.
            outer: Gradient of its output, (tokens, out).
            inputs: Its input, (tokens, in).
        """
        total = self._sums[linear.name]  # [out, in]
        outer, inputs, how = product_operands(outer, inputs)
        size = _SLICE.get(outer.device.type, _SLICE["cuda"])
        rows = max(1, size // linear.in_features)
        if self._buffer.numel() < rows * linear.in_features:
            self._buffer = torch.empty(rows * linear.in_features, device=outer.device)
        for start in range(0, linear.out_features, rows):
            part = total[start : start + rows]  # [rows, in]
            gradient = self._buffer[: part.numel()].view(part.shape)  # [rows, in]
            # With Y = X W^T, dL/dW = (dL/dY)^T X: [rows, tokens] @ [tokens, in]
            torch.mm(outer[:, start : start + rows].T, inputs, out=gradient, **how)
            self._add(part, gradient)

    def add_gradient(self, linear: Linear, gradient: Tensor) -> None:
        """Add the norm of a gradient that autograd has computed, in the stored layout."""
        whole = gradient.T if linear.transposed else gradient  # [out, in]
        self._add(self._sums[linear.name], whole.to(torch.float32))

    def _add(self, total: Tensor, gradient: Tensor) -> None:
        if self.norm == "l1":
            # in place: callers do not use the gradient again
            total.add_(gradient.abs_(), alpha=self._scale)
        else:
            total.addcmul_(gradient, gradient, value=self._scale**2)

    def fetch(self, linears: Sequence[Linear], *, scale: float) -> None:
        """Map the pages of a block's linears in one call: a page fault for each costs more."""
        self._scale = scale
        if self._on_cpu and linears:
            # madvise needs an address on a page boundary.
            begin = self._offsets[linears[0].name] // _PAGE * _PAGE
            end = self._offsets[linears[-1].name] + 4 * linears[-1].size
            with contextlib.suppress(OSError):  # needs Linux 5.14
                self._map.madvise(_POPULATE_WRITE, begin, min(end, len(self._map)) - begin)

    def release(self) -> None:
        """Unmap the pages of the file from this process; they stay in the page cache."""
        if self._on_cpu:
            # The map is shared: of a private one this would discard the sums.
            self._map.madvise(mmap.MADV_DONTNEED)

    def finish(self) -> None:
        """Check every sum and write the file.

        Raises:
            IncompatibleData: A sum is zero everywhere, or not finite.
        """
        for linear in self._linears:
            total = self._sums[linear.name]
            value = float(total.sum(dtype=torch.float64))
            unreached = linear.expert is not None and value == 0  # no token was routed to it
            if not (np.isfinite(value) and value > 0) and not unreached:
                reason = "zero everywhere" if value == 0 else "not finite"
                raise IncompatibleData(
                    f"the gradient of {linear.name} is {reason}",
                    where="the loss of the dense model on the calibration windows",
                    fix="use --dtype float32 or bfloat16, other calibration text, or check the "
                    "weights",
                )
            if not self._on_cpu:
                self._mapped[linear.name].copy_(total)
            self.release()
        self._map.flush()
