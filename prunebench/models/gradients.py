"""Norms of the loss's gradient for every prunable matrix, over calibration windows.

The loss is the mean cross-entropy of a window's next tokens, the model is dense, and every window
is a backward pass of its own: sum_k |g_k| (`l1`) or sum_k g_k^2 (`l2`) are not to be had from the
gradient of a sum.

One window takes two passes over the blocks. Forward without a graph: the input of every block and
the output of every linear are kept. Backward block by block: the block runs again with a graph, its
linears give what they gave before without a product, so that only attention and element-wise work
is repeated; a linear's gradient is made in slices of rows that stay in cache, and goes straight
into the accumulator. No gradient of a whole layer ever exists, and of the graph only one block.
(The matrices of fused experts run again, and their gradient exists until it is added.)

On the CPU the accumulator is a file in the cache that is mapped into memory: when it is complete it
is what later runs on the same weights and tokens read. On a GPU it is kept there and written once.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.files import atomic_file, cache_dir, require_writable
from prunebench.models.linears import Linear, find_blocks, find_linears
from prunebench.models.load import hash_weights
from prunebench.models.replay import BlockCall, check_replay, plain_inference, record_calls

Norm = Literal["l1", "l2"]

_SLICE = 1 << 19  # elements of a gradient that are made at a time
_HEAD_ROWS = 128  # tokens whose logits exist at a time
_VERSION = 1
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
            backward = _Backward(model, linears, sums)
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


class _Replayed(torch.autograd.Function):
    """A linear whose output is known: no product forward, its gradient to the accumulator."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, output: Tensor, linear: Linear, sums: _Accumulators
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.linear, ctx.sums = linear, sums
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inputs,) = ctx.saved_tensors
        linear, outer = ctx.linear, gradients[0]
        ctx.sums.add_product(linear, outer.flatten(0, -2), inputs.flatten(0, -2))
        weight = linear.stored.T if linear.transposed else linear.stored  # (out, in)
        return outer @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _Backward:
    """Adds the gradients of one window after the other."""

    def __init__(self, model: nn.Module, linears: Sequence[Linear], sums: _Accumulators) -> None:
        self.model = model
        self.blocks = find_blocks(model)[1]
        self.sums = sums
        self._by_block = [
            [one for one in linears if one.block_index == index]
            for index in range(len(self.blocks))
        ]
        self._returns: list[tuple[Any, ...] | None] = []
        self._changed: set[Linear] = set()
        forward: Any = model.forward
        self._some_logits = "logits_to_keep" in inspect.signature(forward).parameters

    def prepare(self, sample: Int[Tensor, "one seqlen"]) -> None:
        """Check that the blocks can be replayed, and see which outputs are changed in place."""
        plans = check_replay(self.model, self.blocks, self._by_block, sample)
        self._returns = [plan.returns for plan in plans]
        hidden, calls = record_calls(self.model, self.blocks, sample, returns_tuple=self._returns)
        for index, block in enumerate(self.blocks):
            known: dict[Linear, list[Tensor]] = {}
            with torch.no_grad(), _outputs_kept(self._by_block[index], known):
                hidden = calls[index].run(block, hidden)
            self._changed |= {one for one, made in known.items() if any(t._version for t in made)}

    def add(self, window: Int[Tensor, "one seqlen"]) -> None:
        """Add |g| or g^2 of one window to the accumulators."""
        hidden, calls = record_calls(self.model, self.blocks, window, returns_tuple=self._returns)
        inputs: list[Tensor] = []
        known: list[dict[Linear, list[Tensor]]] = []
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                inputs.append(hidden)
                known.append({})
                with _outputs_kept(self._by_block[index], known[index], self._changed):
                    hidden = calls[index].run(block, hidden)
        gradient = self._head(window, hidden)
        for index in reversed(range(len(self.blocks))):
            gradient = self._block(index, calls[index], inputs.pop(), known.pop(), gradient)
            self.sums.release()

    def _head(self, window: Tensor, hidden: Tensor) -> Tensor:
        """Return the gradient of the window's loss with respect to the last hidden state."""
        leaf = hidden.detach().requires_grad_()
        targets = window[0, 1:]
        step = _HEAD_ROWS if self._some_logits else len(targets)
        with _blocks_replaced(self.blocks, leaf, self._returns), torch.enable_grad():
            for start in range(0, len(targets), step):
                rows = torch.arange(start, min(start + step, len(targets)), device=window.device)
                wanted: dict[str, Any] = {"logits_to_keep": rows} if self._some_logits else {}
                logits = self.model(input_ids=window, use_cache=False, **wanted).logits
                logits = logits[0] if self._some_logits else logits[0, :-1]
                slope = _loss_slope(logits.detach(), targets[rows]).div_(len(targets))
                torch.autograd.backward([logits], [slope.to(logits.dtype)])
        assert leaf.grad is not None
        return leaf.grad

    def _block(
        self,
        index: int,
        call: BlockCall,
        hidden: Tensor,
        known: dict[Linear, list[Tensor]],
        gradient: Tensor,
    ) -> Tensor:
        """Run a block again with a graph, add its linears' gradients, return its input's."""
        leaf = hidden.detach().requires_grad_()
        linears = self._by_block[index]
        self.sums.fetch(linears)
        with _outputs_given(linears, known, self.sums, self._changed), torch.enable_grad():
            output = call.run(self.blocks[index], leaf)
            torch.autograd.backward([output], [gradient])
        assert leaf.grad is not None
        return leaf.grad


def _loss_slope(
    logits: Float[Tensor, "rows vocabulary"], targets: Int[Tensor, " rows"]
) -> Float[Tensor, "rows vocabulary"]:
    """Return the gradient of the summed cross-entropy: softmax - 1 at the target, float32."""
    slope = logits.to(torch.float32).softmax(-1)
    slope[torch.arange(len(targets), device=targets.device), targets] -= 1
    return slope


@contextlib.contextmanager
def _blocks_replaced(
    blocks: nn.ModuleList, last: Tensor, returns: Sequence[tuple[Any, ...] | None]
) -> Iterator[None]:
    """Let every block hand on its input, and the last one give `last`."""

    def stand_in(index: int) -> Callable[..., Any]:
        rest = returns[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = BlockCall.take(args, kwargs)[1] if index + 1 < len(blocks) else last
            return hidden if rest is None else (hidden, *rest)

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@contextlib.contextmanager
def _outputs_kept(
    linears: Sequence[Linear],
    known: dict[Linear, list[Tensor]],
    changed: Set[Linear] = frozenset(),
) -> Iterator[None]:
    """Keep what every linear gives, in the order of its calls.

    What is in `changed` gives a copy: the block writes into it.
    """

    def wrapped(linear: Linear) -> Callable[[Tensor], Tensor]:
        plain = linear.module.forward

        def forward(inputs: Tensor) -> Tensor:
            output: Tensor = plain(inputs)
            known.setdefault(linear, []).append(output)
            return output.clone() if linear in changed else output

        return forward

    with _forwards(linears, wrapped):
        yield


@contextlib.contextmanager
def _outputs_given(
    linears: Sequence[Linear],
    known: dict[Linear, list[Tensor]],
    sums: _Accumulators,
    changed: Set[Linear],
) -> Iterator[None]:
    """Let every linear give what it gave before, and add its gradient to `sums`."""

    def wrapped(linear: Linear) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            output: Tensor = _Replayed.apply(  # type: ignore[no-untyped-call]
                inputs, known[linear].pop(0), linear, sums
            )
            return output.clone() if linear in changed else output

        return forward

    with _forwards(linears, wrapped), _expert_gradients(linears, sums):
        yield


@contextlib.contextmanager
def _forwards(
    linears: Sequence[Linear], wrapped: Callable[[Linear], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    plain = [linear for linear in linears if linear.expert is None]
    try:
        for linear in plain:
            linear.module.forward = wrapped(linear)
        yield
    finally:
        for linear in plain:
            vars(linear.module).pop("forward", None)


@contextlib.contextmanager
def _expert_gradients(linears: Sequence[Linear], sums: _Accumulators) -> Iterator[None]:
    """Add the gradient of every fused parameter as it appears, and free it."""
    fused: dict[int, tuple[nn.Parameter, list[Linear]]] = {}
    for linear in linears:
        if linear.expert is not None:
            parameter: nn.Parameter = getattr(linear.module, linear.attribute)
            fused.setdefault(id(parameter), (parameter, []))[1].append(linear)
    handles = []
    try:
        for parameter, members in fused.values():

            def add(of: Tensor, members: list[Linear] = members) -> None:
                assert of.grad is not None
                for linear in members:
                    sums.add_gradient(linear, of.grad[linear.expert])
                of.grad = None

            parameter.requires_grad_(True)
            register: Any = parameter.register_post_accumulate_grad_hook
            handles.append(register(add))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, _ in fused.values():
            parameter.requires_grad_(False)
            parameter.grad = None
