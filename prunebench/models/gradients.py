"""Norms of the loss's gradient for every prunable matrix, over calibration windows.

The loss is the mean cross-entropy of a window's next tokens, the model is dense, and every window
is a backward pass of its own: sum_k |g_k| (`l1`) or sum_k g_k^2 (`l2`) are not to be had from the
gradient of a sum.

One window takes two passes over the blocks, see `models.backward`. A linear's gradient is made in
slices of rows that stay in cache, and goes straight into the accumulator: none of a whole layer
ever exists.

On the CPU the accumulator is a file in the cache that is mapped into memory: when it is complete it
is what later runs on the same weights and tokens read. On a GPU it is kept there and written once.
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
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import Linear, find_linears
from prunebench.models.replay import plain_inference

Norm = Literal["l1", "l2"]

_SLICE = 1 << 19  # elements of a gradient that are made at a time
_VERSION = 2
_PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux
_CHECK_TOKENS = 128


@dataclass(frozen=True)
class GradientNorms:
    """Accumulated gradients on disk.

    Attributes:
        path: A safetensors file: for each linear a float32 [out, in] under its name.
        norm: `l1` or `l2`.
        samples: Number of windows.
    """

    path: Path
    norm: Norm
    samples: int

    def read(self, name: str) -> Float[Tensor, "out in"]:
        """Return sum_k |g_k| (l1) or sqrt(sum_k g_k^2) (l2) of one linear, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            total: Tensor = file.get_tensor(name)
        return total if self.norm == "l1" else total.sqrt_()


def gradient_norms(
    model: nn.Module,
    token_ids: Int[Tensor, "samples seqlen"],
    *,
    norm: Norm,
    advance: Callable[[int], None] = lambda done: None,
) -> GradientNorms:
    """Return the accumulated gradients of the dense model, from the cache if they are there.

    Args:
        model: The dense model, in evaluation mode.
        token_ids: Calibration windows.
        norm: Which norm over the windows.
        advance: Hears 1 for every finished window.

    Raises:
        IncompatibleData: A layer's gradient is zero everywhere, or not finite; it is named.
        SaveError: The cache has no room for one float32 a prunable weight.
    """
    linears = find_linears(model)
    path = _cache_path(model, token_ids, norm)
    found = GradientNorms(path, norm, len(token_ids))
    if path.is_file():
        advance(len(token_ids))
        return found
    require_writable(path.parent, need_bytes=4 * sum(one.size for one in linears) + (1 << 20))
    device = next(model.parameters()).device
    with atomic_file(path) as part, _Accumulators(part, linears, norm, device) as sums:
        with plain_inference(model):
            backward = Backward(model, linears, sums)
            plans_from = token_ids[:1, :_CHECK_TOKENS].to(device)
            backward.prepare(plans_from)
            for window in torch.split(token_ids, 1):
                backward.add(window.to(device))
                advance(1)
        sums.finish()
    return found


def _cache_path(model: nn.Module, token_ids: Tensor, norm: Norm) -> Path:
    digest = hashlib.sha256(f"{_VERSION} {norm} {hash_weights(model)} {token_ids.shape}".encode())
    digest.update(token_ids.contiguous().numpy().tobytes())
    config: Any = getattr(model, "config", None)  # the same weights may compute another function
    settings = {**config.to_dict(), "_name_or_path": None} if config is not None else {}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return cache_dir() / "gradients" / f"{digest.hexdigest()[:32]}.safetensors"


class _Accumulators:
    """One float32 sum a linear: views of a mapped safetensors file, or tensors on the device."""

    def __init__(
        self, path: Path, linears: Sequence[Linear], norm: Norm, device: torch.device
    ) -> None:
        self.norm = norm
        self._linears = linears
        self._on_cpu = device.type == "cpu"
        self._buffer = torch.empty(0, device=device)
        header: dict[str, Any] = {}
        end = 0
        for one in linears:
            shape = [one.out_features, one.in_features]
            header[one.name] = {
                "dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * one.size],
            }  # fmt: skip
            end += 4 * one.size
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 4096)  # the data begin on a page
        begin = 8 + len(text)
        with path.open("w+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            os.posix_fallocate(file.fileno(), 0, begin + end)  # a full disk says so now
            self._map = mmap.mmap(file.fileno(), 0)
        self._offsets = {name: begin + row["data_offsets"][0] for name, row in header.items()}
        self._mapped: dict[str, Tensor] = {}
        for one in linears:
            flat = np.frombuffer(self._map, np.float32, one.size, self._offsets[one.name])
            self._mapped[one.name] = torch.from_numpy(flat).view(one.out_features, one.in_features)
        self._sums = self._mapped
        if not self._on_cpu:
            self._sums = {k: torch.zeros_like(v, device=device) for k, v in self._mapped.items()}

    def __enter__(self) -> _Accumulators:
        return self

    def __exit__(self, *error: object) -> None:
        self._sums = self._mapped = {}

    def add_product(self, linear: Linear, outer: Tensor, inputs: Tensor) -> None:
        """Add the norm of outer^T inputs, where outer is (tokens, out) and inputs (tokens, in)."""
        total = self._sums[linear.name]
        outer, inputs = outer.to(torch.float32), inputs.to(torch.float32)
        rows = max(1, _SLICE // linear.in_features)
        if self._buffer.numel() < rows * linear.in_features:
            self._buffer = torch.empty(rows * linear.in_features, device=outer.device)
        for start in range(0, linear.out_features, rows):
            part = total[start : start + rows]
            gradient = self._buffer[: part.numel()].view(part.shape)
            torch.mm(outer[:, start : start + rows].T, inputs, out=gradient)
            self._add(part, gradient)

    def add_gradient(self, linear: Linear, gradient: Tensor) -> None:
        """Add the norm of a gradient that exists already."""
        whole = gradient.T if linear.transposed else gradient
        self._add(self._sums[linear.name], whole.to(torch.float32))

    def _add(self, total: Tensor, gradient: Tensor) -> None:
        if self.norm == "l1":
            total += gradient.abs_()
        else:
            total.addcmul_(gradient, gradient)

    def fetch(self, linears: Sequence[Linear]) -> None:
        """Map the pages of linears that lie side by side, at once: one by one they cost more."""
        if self._on_cpu and linears:
            begin = self._offsets[linears[0].name] // _PAGE * _PAGE
            end = self._offsets[linears[-1].name] + 4 * linears[-1].size
            with contextlib.suppress(OSError):  # Linux before 5.14 cannot
                self._map.madvise(_POPULATE_WRITE, begin, min(end, len(self._map)) - begin)

    def release(self) -> None:
        """Let the pages of the file go from this process (they stay in the system's cache)."""
        if self._on_cpu:
            self._map.madvise(mmap.MADV_DONTNEED)

    def finish(self) -> None:
        """Check every sum and write them out."""
        for one in self._linears:
            total = self._sums[one.name]
            value = float(total.sum(dtype=torch.float64))
            unreached = one.expert is not None and value == 0
            if not (np.isfinite(value) and value > 0) and not unreached:
                reason = "zero everywhere" if value == 0 else "not finite"
                raise IncompatibleData(
                    f"the gradient of {one.name} is {reason}",
                    where="the loss of the dense model on the calibration windows",
                    fix="use --dtype float32 or bfloat16, other calibration text, or check the "
                    "weights",
                )
            if not self._on_cpu:
                self._mapped[one.name].copy_(total)
            self.release()
        self._map.flush()
