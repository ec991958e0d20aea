"""Forecast of a mask training from shapes alone: memory by item, tokens, and time.

Bytes of persistent tensors are exact; those of activations and of the graph of one block are
estimates (a test compares both with what a training allocates). Time is that of the matrix products
and mask passes of a step, at the speed of a small probe on random numbers; element-wise operations
between them, loading, the prior and scoring are not included.
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
from prunebench.pruners.maskllm.config import TrainingConfig
from prunebench.pruners.maskllm.optimise import Optimizer
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation, WeightGradient
from prunebench.pruners.training import Forecast
from prunebench.sparsity import Sparsity
from prunebench.training.loop import batch_windows
from prunebench.training.shards import Shards

_GRAPH_COPIES = 1.5  # tensors of a block's graph per output of its linears (estimate)
_PIECE_BYTES = 48 << 20  # temporaries of one piece of the logits, with its random bits
_PROBE_ROWS, _PROBE_WIDTH = 512, 2048  # weights of the probe of a mask pass: a million
_STATE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class MemoryPlan:
    """Forecasts the cost of one training.

    Attributes:
        model: On the meta device, or real.
        options: The training's configuration.
        sparsity: N:M.
        dtype: Of the weights.
        device: Where the training will run.
        processes: Number of processes.
    """

    model: nn.Module
    options: TrainingConfig
    sparsity: Sparsity
    dtype: torch.dtype
    device: torch.device
    processes: int = 1

    def forecast(self) -> Forecast:
        """Return memory of one process, tokens of all processes, and time."""
        config = self.options
        return Forecast(
            memory=self.memory(),
            tokens=config.steps * config.batch * config.train_seqlen,
            seconds=self.seconds(),
        )

    # ------------------------------------------------------------ memory

    def memory(self) -> dict[str, int]:
        """Return the bytes of every item in memory during training, in one process."""
        linears = find_linears(self.model)
        experts = self._largest_block([linear for linear in linears if linear.expert is not None])
        parameters = sum(p.numel() for p in self.model.parameters())
        return {
            "model": parameters * self.dtype.itemsize,
            "logits": self._choices * self._groups(linears) * self._logit_bytes,
            "moments": self._moments(linears),
            "noise draws": self._draws(linears),
            # uint8 each: the prior's choices and the best so far
            "masks kept": 2 * self._groups(linears),
            "gradients": self._gradients(linears) + experts * self.dtype.itemsize,
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
        """Return the rows of the first process: no other owns more."""
        rows = Shards(0, self.processes).rows(linear.out_features)
        count: int = rows.stop - rows.start
        return count

    def _groups(self, linears: Sequence[Linear]) -> int:
        assert self.sparsity.group is not None
        group = self.sparsity.group
        return sum(self._rows(linear) * linear.in_features // group for linear in linears)

    def _moments(self, linears: Sequence[Linear]) -> int:
        # One number per candidate and group
        each = self._choices * self._groups(linears) * _STATE_BYTES[self.options.state_dtype]
        if self.options.state_dtype == "int8":
            # one float32 scale per choice and row
            each += 4 * self._choices * sum(self._rows(linear) for linear in linears)
        return int(each * (2 if self.options.optimizer == "adamw" else 1))

    def _draws(self, linears: Sequence[Linear]) -> int:
        return 4 * self._choices * self._groups(linears) if self.options.noise_samples > 1 else 0

    def _gradients(self, linears: Sequence[Linear]) -> int:
        """Return the bytes of the owned rows of all layers, and of one whole block in float32."""
        width = 4 if self.options.state_dtype == "float32" else 2
        owned = sum(self._rows(linear) * linear.in_features for linear in linears)
        return int(width * owned + 4 * self._largest_block(linears))

    def _largest_block(self, linears: Sequence[Linear]) -> int:
        sizes: dict[int, int] = {}
        for linear in linears:
            sizes[linear.block_index] = sizes.get(linear.block_index, 0) + linear.size
        return max(sizes.values(), default=0)

    def _activations(self, linears: Sequence[Linear]) -> int:
        """Return the bytes of saved outputs and inputs, and of one block's graph or some logits."""
        windows, seqlen = self._micro()
        batch = batch_windows(windows, seqlen, self.device.type)
        plain = [linear for linear in linears if linear.expert is None]
        blocks = linears[-1].block_index + 1
        hidden = self._hidden()
        outputs = sum(linear.out_features for linear in plain) + (blocks + 1) * hidden
        graph = int(_GRAPH_COPIES * (outputs / blocks + 2 * hidden))
        # logits of HEAD_ROWS positions, their gradient, and both in float32
        head = (
            max(1, HEAD_ROWS // batch) * batch * self._vocabulary() * (2 * self.dtype.itemsize + 8)
        )
        tokens = windows * seqlen
        return tokens * outputs * self.dtype.itemsize + max(
            batch * seqlen * graph * self.dtype.itemsize, head
        )

    def _micro(self) -> tuple[int, int]:
        """Return the number of windows in a micro-batch, and their length in tokens."""
        config = self.options
        share = config.batch // self.processes // config.noise_samples
        windows = max(1, min(share, config.micro_tokens // config.train_seqlen))
        return windows, config.train_seqlen

    def _hidden(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]

    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    # ------------------------------------------------------------ time

    def seconds(self) -> float:
        """Estimate the duration of all steps and held-out evaluations, from a probe."""
        config = self.options
        rate, soften, update = self._product_rate(), *self._mask_seconds()
        linears = find_linears(self.model)
        weights = sum(linear.size for linear in linears)
        used = sum(linear.size * self._share(linear) for linear in linears)
        head = self._hidden() * self._vocabulary()
        tokens = config.batch * config.train_seqlen / self.processes
        passes = math.ceil(tokens / math.prod(self._micro()))
        # 6 operations per weight and token: 2 forward, 4 backward
        step = 6 * (used + head) * tokens / rate
        # a block's mask is computed in the forward and again in the backward pass
        step += weights / self.processes * (2 * passes * soften + update)
        tokens = config.held_out * config.train_seqlen / self.processes
        evaluation = 2 * (used + head) * tokens / rate
        return config.steps * step + (config.steps // config.eval_every + 1) * evaluation

    def _share(self, linear: Linear) -> float:
        """Return the share of the tokens that reach a matrix: 1, except for experts."""
        if linear.expert is None:
            return 1.0
        config = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
        experts = int(getattr(linear.module, linear.attribute).shape[0])
        return int(getattr(config, "num_experts_per_tok", experts)) / experts

    def _product_rate(self) -> float:
        """Return operations per second of a product with the model's largest weight."""
        largest = max(find_linears(self.model), key=lambda linear: linear.size)
        windows, seqlen = self._micro()
        rows = batch_windows(windows, seqlen, self.device.type) * seqlen
        inputs = torch.ones(rows, largest.in_features, dtype=self.dtype, device=self.device)
        weight = torch.ones(
            largest.out_features, largest.in_features, dtype=self.dtype, device=self.device
        )
        # 2 operations, a multiplication and an addition, per weight and row
        seconds = self._timed(lambda: inputs @ weight.T)
        return 2 * rows * largest.size / seconds

    def _mask_seconds(self) -> tuple[float, float]:
        """Return the seconds per weight of a soft mask, and of an update of its logits."""
        config = self.options
        assert self.sparsity.kept and self.sparsity.group
        table = candidates(self.sparsity.kept, self.sparsity.group).to(self.device)
        width = _PROBE_WIDTH // len(table[0])
        # Zeros do: the time of a mask pass does not depend on the values.
        logits = torch.zeros(
            len(table),
            _PROBE_ROWS * width,
            dtype=getattr(torch, config.logit_dtype),
            device=self.device,
        )
        layer = LayerLogits(0, logits, table, width)
        optimizer = Optimizer(config.optimizer, state_dtype=config.state_dtype)
        optimizer.prepare(layer)
        weight = torch.zeros(_PROBE_ROWS, _PROBE_WIDTH, dtype=self.dtype, device=self.device)
        out = torch.empty_like(weight)
        slope = WeightGradient(
            torch.zeros(weight.shape, device=self.device),
            torch.zeros(_PROBE_ROWS, device=self.device),
            torch.zeros(_PROBE_WIDTH, device=self.device),
        )
        relaxation = Relaxation(
            0, 0, temperature=1.0, scale=1.0, noise=config.noise, reward=config.reward,
            curvature=config.curvature,
        )  # fmt: skip
        has_norm = config.optimizer != "adamw" or bool(config.clip)

        def update() -> None:
            directions = optimizer.directions(layer, weight, slope, relaxation)
            optimizer.step(layer, directions, relaxation, count=1, rate=0.0, unit=1.0)
            if has_norm:  # computed in a pass of its own
                for _ in optimizer.directions(layer, weight, slope, relaxation):
                    pass

        size = weight.numel()
        soften = self._timed(lambda: dispatch.soften(layer, weight, relaxation, out)) / size
        return soften, self._timed(update) / size

    def _timed(self, action: Callable[[], object]) -> float:
        """Return the seconds of the faster of two calls, after a warm-up call."""
        seconds = []
        # The first call is the warm-up: it compiles kernels and allocates memory.
        for _ in range(3):
            self._wait()
            start_time = time.perf_counter()
            action()
            self._wait()
            seconds.append(time.perf_counter() - start_time)
        return min(seconds[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
