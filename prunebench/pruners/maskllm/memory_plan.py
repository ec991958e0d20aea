"""What a training of masks will need, from shapes alone: memory by item, tokens, and time.

Bytes of what is kept are exact; those of activations and of the graph of one block are estimates
(a test compares both with what a training really allocates). Time is that of the matrix products
and mask passes of a step, at the speed of a small probe on random numbers: what is element-wise
between them, loading, the prior and scoring come on top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunebench.models.backward import HEAD_ROWS
from prunebench.models.linears import Linear, find_linears
from prunebench.pruners.maskllm import dispatch
from prunebench.pruners.maskllm.candidates import candidates
from prunebench.pruners.maskllm.learn import batch_windows
from prunebench.pruners.maskllm.optimise import Optimizer
from prunebench.pruners.maskllm.options import Options
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation, WeightGradient
from prunebench.pruners.maskllm.shards import Shards
from prunebench.pruners.training import Forecast
from prunebench.sparsity import Sparsity

_GRAPH_COPIES = 1.5  # tensors of a block's graph beside each output of its linears
_PIECE_BYTES = 48 << 20  # what is made from one piece of the logits, with its random bits
_PROBE_ROWS, _PROBE_WIDTH = 512, 2048  # of a mask pass: a million weights
_STATE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class MemoryPlan:
    """A training on a model, in numbers.

    Attributes:
        model: On the meta device, or real.
        options: All filled in.
        sparsity: N:M.
        dtype: Of the weights.
        device: Where it will run.
        processes: How many learn together.
    """

    model: nn.Module
    options: Options
    sparsity: Sparsity
    dtype: torch.dtype
    device: torch.device
    processes: int = 1

    def forecast(self) -> Forecast:
        """Return what one process will need."""
        one = self.options
        assert one.steps and one.batch and one.train_seqlen
        return Forecast(
            memory=self.memory(),
            tokens=one.steps * one.batch * one.train_seqlen,
            seconds=self.seconds(),
        )

    # ------------------------------------------------------------ memory

    def memory(self) -> dict[str, int]:
        """Return the bytes of every item that exists while logits are learned, in one process."""
        linears = find_linears(self.model)
        fused = self._largest_block([x for x in linears if x.expert is not None])
        parameters = sum(p.numel() for p in self.model.parameters())
        return {
            "model": parameters * self.dtype.itemsize,
            "logits": self._choices * self._groups(linears) * self._logit_bytes,
            "moments": self._moments(linears),
            "noise draws": self._draws(linears),
            "masks kept": 2 * self._groups(linears),
            "gradients": self._gradients(linears) + fused * self.dtype.itemsize,
            "workspace": self._largest_block(linears) * self.dtype.itemsize,
            "activations": self._activations(linears),
            "pieces": _PIECE_BYTES,
        }

    @property
    def _choices(self) -> int:
        assert self.sparsity.kept is not None and self.sparsity.group is not None
        return math.comb(self.sparsity.group, self.sparsity.kept)

    @property
    def _logit_bytes(self) -> int:
        return _STATE_BYTES[self.options.logit_dtype]

    def _rows(self, linear: Linear) -> int:
        """Return the most rows that one process owns: those of the first."""
        rows = Shards(0, self.processes).rows(linear.out_features)
        count: int = rows.stop - rows.start
        return count

    def _groups(self, linears: Sequence[Linear]) -> int:
        assert self.sparsity.group is not None
        return sum(self._rows(one) * one.in_features // self.sparsity.group for one in linears)

    def _moments(self, linears: Sequence[Linear]) -> int:
        each = self._choices * self._groups(linears) * _STATE_BYTES[self.options.state_dtype]
        if self.options.state_dtype == "int8":
            each += 4 * self._choices * sum(self._rows(one) for one in linears)
        return int(each * (2 if self.options.optimizer == "adamw" else 1))

    def _draws(self, linears: Sequence[Linear]) -> int:
        return 4 * self._choices * self._groups(linears) if self.options.noise_samples > 1 else 0

    def _gradients(self, linears: Sequence[Linear]) -> int:
        """Return the bytes of the own rows of all layers, and of one block whole."""
        width = 4 if self.options.state_dtype == "float32" else 2
        own = sum(self._rows(one) * one.in_features for one in linears)
        return int(width * own + 4 * self._largest_block(linears))

    def _largest_block(self, linears: Sequence[Linear]) -> int:
        sizes: dict[int, int] = {}
        for one in linears:
            sizes[one.block_index] = sizes.get(one.block_index, 0) + one.size
        return max(sizes.values(), default=0)

    def _activations(self, linears: Sequence[Linear]) -> int:
        """Return the bytes of kept outputs and inputs, one block's graph, and some logits."""
        windows, seqlen = self._micro()
        batch = batch_windows(windows, seqlen, self.device.type)
        plain = [one for one in linears if one.expert is None]
        blocks = linears[-1].block_index + 1
        hidden = self._hidden()
        outputs = sum(one.out_features for one in plain) + (blocks + 1) * hidden
        graph = int(_GRAPH_COPIES * (outputs / blocks + 2 * hidden))
        head = (
            max(1, HEAD_ROWS // batch) * batch * self._vocabulary() * (2 * self.dtype.itemsize + 8)
        )
        tokens = windows * seqlen
        return tokens * outputs * self.dtype.itemsize + max(
            batch * seqlen * graph * self.dtype.itemsize, head
        )

    def _micro(self) -> tuple[int, int]:
        """Return how many windows have activations at a time, and their length."""
        one = self.options
        assert one.batch and one.train_seqlen
        share = one.batch // self.processes // one.noise_samples
        return max(1, min(share, one.micro_tokens // one.train_seqlen)), one.train_seqlen

    def _hidden(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]

    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    # ------------------------------------------------------------ time

    def seconds(self) -> float:
        """Return about how long the steps and their measurements take, by a probe."""
        one = self.options
        assert one.steps and one.batch and one.train_seqlen and one.eval_every and one.held_out
        rate, soften, update = self._product_rate(), *self._mask_seconds()
        linears = find_linears(self.model)
        weights = sum(x.size for x in linears)
        used = sum(x.size * self._share(x) for x in linears)
        head = self._hidden() * self._vocabulary()
        tokens = one.batch * one.train_seqlen / self.processes
        passes = math.ceil(tokens / math.prod(self._micro()))
        step = 6 * (used + head) * tokens / rate
        step += weights / self.processes * (2 * passes * soften + update)
        held = 2 * (used + head) * one.held_out * one.train_seqlen / self.processes / rate
        return one.steps * step + (one.steps // one.eval_every + 1) * held

    def _share(self, linear: Linear) -> float:
        """Return the share of the tokens that reach a matrix: all, but for experts."""
        if linear.expert is None:
            return 1.0
        config = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
        experts = int(getattr(linear.module, linear.attribute).shape[0])
        return int(getattr(config, "num_experts_per_tok", experts)) / experts

    def _product_rate(self) -> float:
        """Return operations a second of products of the model's own shape."""
        largest = max(find_linears(self.model), key=lambda one: one.size)
        windows, seqlen = self._micro()
        rows = batch_windows(windows, seqlen, self.device.type) * seqlen
        inputs = torch.ones(rows, largest.in_features, dtype=self.dtype, device=self.device)
        weight = torch.ones(
            largest.out_features, largest.in_features, dtype=self.dtype, device=self.device
        )
        seconds = self._timed(lambda: inputs @ weight.T)
        return 2 * rows * largest.size / seconds

    def _mask_seconds(self) -> tuple[float, float]:
        """Return the seconds a weight of making a soft mask, and of changing its logits."""
        one = self.options
        assert (
            one.optimizer and one.noise is not None and self.sparsity.kept and self.sparsity.group
        )
        table = candidates(self.sparsity.kept, self.sparsity.group).to(self.device)
        width = _PROBE_WIDTH // len(table[0])
        logits = torch.zeros(
            len(table),
            _PROBE_ROWS * width,
            dtype=getattr(torch, one.logit_dtype),
            device=self.device,
        )
        layer = LayerLogits(0, logits, table, width)
        optimizer = Optimizer(one.optimizer, state_dtype=one.state_dtype)
        optimizer.prepare(layer)
        weight = torch.zeros(_PROBE_ROWS, _PROBE_WIDTH, dtype=self.dtype, device=self.device)
        out = torch.empty_like(weight)
        slope = WeightGradient(
            torch.zeros(weight.shape, device=self.device),
            torch.zeros(_PROBE_ROWS, device=self.device),
            torch.zeros(_PROBE_WIDTH, device=self.device),
        )
        relaxation = Relaxation(
            0, 0, temperature=1.0, scale=1.0, noise=one.noise, reward=one.reward or 0.0,
            curvature=one.curvature or 0.0,
        )  # fmt: skip
        measured = one.optimizer != "adamw" or bool(one.clip)  # the norm is a pass of its own

        def update() -> None:
            made = optimizer.directions(layer, weight, slope, relaxation)
            optimizer.step(layer, made, relaxation, count=1, rate=0.0, unit=1.0)
            if measured:
                for _ in optimizer.directions(layer, weight, slope, relaxation):
                    pass

        size = weight.numel()
        soften = self._timed(lambda: dispatch.soften(layer, weight, relaxation, out)) / size
        return soften, self._timed(update) / size

    def _timed(self, action: Callable[[], object]) -> float:
        """Return the seconds of the faster of two calls, after one that warms up."""
        taken = []
        for _ in range(3):
            self._wait()
            begun = time.perf_counter()
            action()
            self._wait()
            taken.append(time.perf_counter() - begun)
        return min(taken[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
