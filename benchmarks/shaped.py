"""A decoder with the shapes of LLaMA-2-7B and random weights, dense or packed; no checkpoint.

Query, key and value are one product, and so are gate and up, on both sides alike. The cache is
static, and a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from prunebench.bench.layers import random_packed
from prunebench.sparse24.layer import Sparse24Linear
from prunebench.sparse24.packed import Packed24, unpack24
from prunebench.sparse24.policy import Policy


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    layers: int = 32
    width: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the linears of a block."""
        width, inner = self.width, self.inner
        return {
            "qkv": (3 * width, width), "out": (width, width),
            "gate_up": (2 * inner, width), "down": (width, inner),
        }  # fmt: skip


LLAMA2_7B = Shape()
TINY = Shape(layers=2, width=64, inner=128, heads=4, vocabulary=96)
Linears = dict[str, Callable[[Tensor], Tensor]]


class Weights:
    """What both sides share: embeddings, norms, output layer, and the packed matrices' seeds."""

    def __init__(self, shape: Shape, *, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        options = {"generator": generator, "device": device, "dtype": dtype}
        self.shape, self.device, self.dtype = shape, device, dtype
        size = (shape.vocabulary, shape.width)
        self.embedding = torch.randn(*size, **options)  # type: ignore[call-overload]
        self.head = torch.randn(*size, **options) / shape.width**0.5  # type: ignore[call-overload]
        self.norm = torch.ones(shape.width, device=device, dtype=dtype)

    def packed(self, block: int, name: str) -> Packed24:
        """Return the matrix of a linear; the same on every call."""
        place = list(self.shape.linears).index(name)
        return random_packed(
            self.shape.linears[name], dtype=self.dtype, device=self.device, seed=8 * block + place
        )

    def dense_blocks(self) -> list[Linears]:
        """Return the masked dense linears of all blocks."""
        return [
            {name: _dense(unpack24(self.packed(i, name))) for name in self.shape.linears}
            for i in range(self.shape.layers)
        ]

    def packed_blocks(self, policy: Policy) -> list[Linears]:
        """Return the packed linears of all blocks, made one after the other."""
        return [
            {
                name: Sparse24Linear(self.packed(i, name), None, policy=policy)
                for name in self.shape.linears
            }
            for i in range(self.shape.layers)
        ]


def _dense(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.linear(x, weight)


class Decoder:
    """Greedy decoding with a static cache.

    Args:
        weights: What both sides share.
        blocks: The linears of one side.
        batch: Sequences.
        room: Positions in the cache.
    """

    def __init__(self, weights: Weights, blocks: list[Linears], *, batch: int, room: int) -> None:
        shape, device = weights.shape, weights.device
        self.weights, self.blocks, self.shape = weights, blocks, shape
        head = shape.width // shape.heads
        size = (shape.layers, 2, batch, shape.heads, room, head)
        self.cache = torch.zeros(size, device=device, dtype=weights.dtype)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.places = torch.arange(room, device=device)
        rates = 10000 ** (-torch.arange(0, head, 2, device=device) / head)
        angles = self.places[:, None] * torch.cat((rates, rates))
        self.cos, self.sin = angles.cos().to(weights.dtype), angles.sin().to(weights.dtype)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Return the logits of the last token of a prompt (batch, length), and fill the cache."""
        self.position.zero_()
        logits = self._forward(ids, causal=True)
        self.position.add_(ids.shape[1])
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence."""
        self.token.copy_(self._forward(self.token, causal=False).argmax(-1, keepdim=True))
        self.position.add_(1)

    def _forward(self, ids: Tensor, *, causal: bool) -> Tensor:
        x = self.weights.embedding[ids]
        length = ids.shape[1]
        places = self.position + self.places[:length]
        cos, sin = self.cos[places], self.sin[places]
        for number, block in enumerate(self.blocks):
            x = x + self._attend(number, block, self._norm(x), places, cos, sin, causal=causal)
            gate, up = block["gate_up"](self._norm(x)).chunk(2, dim=-1)
            x = x + block["down"](functional.silu(gate) * up)
        return functional.linear(self._norm(x[:, -1]), self.weights.head)

    def _attend(
        self, number: int, block: Linears, x: Tensor, places: Tensor, cos: Tensor, sin: Tensor,
        *, causal: bool,
    ) -> Tensor:  # fmt: skip
        batch, length, width = x.shape
        qkv = block["qkv"](x).view(batch, length, 3, self.shape.heads, -1)
        query, key, value = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        keys, values = self.cache[number]
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
        if causal:
            found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            seen = (self.places <= self.position)[None, None, None]
            found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        return block["out"](found.transpose(1, 2).reshape(batch, length, width))

    def _norm(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (self.shape.width,), self.weights.norm)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def stored_bytes(weights: Weights, blocks: list[Linears]) -> int:
    """Return what the weights of a packed side take, embeddings and output layer included."""
    layers = [one for block in blocks for one in block.values()]
    packed = sum(one.stored_bytes for one in layers if isinstance(one, Sparse24Linear))
    return int(packed + weights.embedding.nbytes + weights.head.nbytes)


def dense_bytes(weights: Weights) -> int:
    """Return what the weights take when all are dense."""
    shape = weights.shape
    linears = sum(rows * width for rows, width in shape.linears.values()) * shape.layers
    return int(2 * linears + weights.embedding.nbytes + weights.head.nbytes)
