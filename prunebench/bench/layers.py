"""One layer, dense against packed: numbers checked first, then times, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunebench.bench.shapes import MOST_BYTES_A_SECOND, LayerShape
from prunebench.bench.timing import BLOCKS, COLD_BYTES, Call, Clock, Ratio, interleaved
from prunebench.sparse24.backends.cusparselt import CuSparseLtProduct
from prunebench.sparse24.backends.protocol import Product
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.backends.triton import (
    Launch,
    TiledLayout,
    Tiling,
    TritonBackend,
    TritonProduct,
)
from prunebench.sparse24.layouts import FileLayout, WeightLayout
from prunebench.sparse24.packed import Packed24, canonicalize, pack24, unpack24
from prunebench.sparse24.policy import Policy

NOT_MEASURED = "not measured (no CUDA device)"
_MOST_COPIES = 32


@dataclass(frozen=True)
class LayerResult:
    """One cell of the grid.

    Attributes:
        backend: The fastest packed one.
        chosen: How it was started: algorithm and split, or the kernel's launch.
        ratio: Best dense time over its time; null where speed was not measured.
        ratios: The median of every packed backend, and the dense product in other ways.
        dense: Which dense product was the best.
        seconds: Medians by name.
        bytes_per_second: Stored bytes over time, of the fastest packed one.
        cache_suspected: Whether that is more than memory gives.
        errors: Relative error against a float32 product, by name.
        numerics_hold: Whether every packed one errs at most twice as much as the dense product.
        refused: Backends that were not measured, with the reason.
        copies: Distinct weights in a turn.
    """

    model: str
    layer: str
    rows: int
    width: int
    tokens: int
    stored_bytes: int
    dense_bytes: int
    backend: str | None
    chosen: str
    speed: str
    ratio: Ratio | None
    ratios: dict[str, float]
    dense: str | None
    seconds: dict[str, float]
    bytes_per_second: float | None
    cache_suspected: bool
    errors: dict[str, float]
    numerics_hold: bool
    refused: dict[str, str]
    copies: int

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def random_packed(
    shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device, seed: int
) -> Packed24:
    """Return a random 2:4 matrix, packed: any two of every four are kept."""
    rows, width = shape
    generator = torch.Generator(device=device).manual_seed(seed)
    scores = torch.rand(rows, width // 4, 4, generator=generator, device=device)
    keep = scores >= scores.topk(2, dim=-1).values[..., 1:]
    keep &= keep.cumsum(-1) <= 2  # equal scores
    del scores
    weight = torch.randn(rows, width, generator=generator, device=device, dtype=dtype)
    return pack24(canonicalize(weight / width**0.5, keep.view(rows, width)))


@dataclass
class LayerBench:
    """The copies of one layer, and what is made of them.

    Attributes:
        shape: Of the layer.
        device: Where it is measured.
        dtype: Of weights and inputs.
        policy: Says which backends are to be tried.
        clock: Times them.
        compile_dense: Makes another dense product that competes for the best; None for cuBLAS only.
        launches: Other starts of the `triton` kernel to try, for the tuning sweep.
        tiling: The order of its weights.
        cold_bytes: Distinct weights in a turn.
    """

    shape: LayerShape
    device: torch.device
    dtype: torch.dtype
    policy: Policy
    clock: Clock
    compile_dense: Callable[[], Callable[[Tensor, Tensor], Tensor]] | None = None
    launches: Sequence[Launch] = ()
    tiling: Tiling = field(default_factory=Tiling)
    cold_bytes: int = COLD_BYTES

    def measure(self, tokens: int, *, blocks: int = BLOCKS) -> LayerResult:
        """Check and time one number of tokens."""
        shape = (self.shape.rows, self.shape.width)
        verdicts = self.policy.verdicts(shape, self.dtype, tokens)
        refused = {name: one.reason for name, one in verdicts.items() if not one.ok}
        names = [name for name, one in verdicts.items() if one.ok and name != "reference"]
        names = names or ["reference"]
        matrices = [self._random(seed) for seed in range(self._copies())]
        x = torch.randn(tokens, shape[1], device=self.device, dtype=self.dtype)
        dense = [unpack24(one) for one in matrices]
        products, forms = self._products(names, matrices, tokens, refused)
        errors = {"dense": relative_error(functional.linear(x, dense[0]), x, dense[0])}
        for name, made in products.items():
            errors[name] = relative_error(made[0].run(x, None), x, dense[0])
        limit = 2 * errors["dense"] + 1e-6
        right = {name: made for name, made in products.items() if errors[name] <= limit}
        seconds: dict[str, float] = {}
        ratio = best = fastest = None
        ratios: dict[str, float] = {}
        if self.clock.measures_speed:
            rivals, kinds = self._rivals(right, dense, x)
            timings = interleaved(rivals, self.clock, blocks=blocks)
            best = timings.fastest(kinds)
            seconds = {name: timings.median(name) for name in rivals}
            ratios = {name: timings.ratio(best, name).median for name in rivals if name != best}
            if right:
                fastest = timings.fastest(list(right))
                ratio = timings.ratio(best, fastest)
        else:  # the same path, and no figure from it
            interleaved(self._rivals(right, dense, x)[0], self.clock, blocks=1)
            fastest = next(iter(right), None)
        stored = forms.stored_bytes
        speed = stored / seconds[fastest] if fastest and seconds else None
        return LayerResult(
            self.shape.model, self.shape.name, *shape, tokens, stored, self.shape.dense_bytes,
            fastest, self._chosen(products, fastest, tokens),
            "measured" if ratio else NOT_MEASURED, ratio, ratios, best, seconds, speed,
            bool(speed and speed > MOST_BYTES_A_SECOND), errors,
            all(errors[name] <= limit for name in products), refused, len(matrices),
        )  # fmt: skip

    def _copies(self) -> int:
        stored = self.shape.dense_bytes * 9 // 16
        return max(1, min(_MOST_COPIES, -(-self.cold_bytes // stored)))

    def _random(self, seed: int) -> Packed24:
        shape = (self.shape.rows, self.shape.width)
        return random_packed(shape, dtype=self.dtype, device=self.device, seed=seed)

    def _products(
        self, names: list[str], matrices: list[Packed24], tokens: int, refused: dict[str, str]
    ) -> tuple[dict[str, list[Product]], WeightLayout]:
        """Build every packed rival for every copy; what fails says why in `refused`."""
        kinds = {**backends(), TritonBackend.name: TritonBackend(self.tiling)}
        shape = (self.shape.rows, self.shape.width)
        first = kinds[self.policy.choose(shape, self.dtype, 1).backend]
        forms = [first.layout(packed) or FileLayout(packed) for packed in matrices]
        found: dict[str, list[Product]] = {}
        for name in names:
            try:
                found[name] = [kinds[name].build(form) for form in forms]
                _share_algorithm(found[name], tokens)
            except Exception as error:  # a library may fail in any way: the others go on
                refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                found.pop(name, None)
        for number, launch in enumerate(self.launches if TritonBackend.name in found else ()):
            tuned = [
                TritonProduct(form, {tokens: launch})
                for form in forms
                if isinstance(form, TiledLayout)
            ]
            found[f"{TritonBackend.name}#{number}"] = list(tuned)
        return found, forms[0]

    def _rivals(
        self, products: dict[str, list[Product]], dense: list[Tensor], x: Tensor
    ) -> tuple[dict[str, list[Call]], list[str]]:
        """Return the calls of every rival, and which of them are dense."""
        rivals: dict[str, list[Call]] = {"dense": [_dense_call(x, one) for one in dense]}
        if self.compile_dense is not None:
            multiply = self.compile_dense()
            rivals["dense, max-autotune"] = [_call(multiply, x, one) for one in dense]
        kinds = list(rivals)
        for name, made in products.items():
            rivals[name] = [_product_call(one, x) for one in made]
        return rivals, kinds

    def _chosen(self, products: dict[str, list[Product]], name: str | None, tokens: int) -> str:
        return products[name][0].settings(tokens) if name else ""


def relative_error(found: Tensor, x: Tensor, dense: Tensor) -> float:
    """Return the norm of the error over that of the float32 product; infinite if it is NaN."""
    exact = x.float() @ dense.float().t()
    error = float((found.float() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def _share_algorithm(products: list[Product], tokens: int) -> None:
    """Search cuSPARSELt's algorithm for the first copy; the others have the same shape."""
    compressed = [product for product in products if isinstance(product, CuSparseLtProduct)]
    for product in compressed:
        product.algorithms.update(compressed[0].algorithms)
        product.algorithm_for(tokens)


def _dense_call(x: Tensor, weight: Tensor) -> Call:
    return lambda: functional.linear(x, weight)


def _call(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Call:
    return lambda: multiply(x, weight)


def _product_call(product: Product, x: Tensor) -> Call:
    return lambda: product.run(x, None)


def autotuned_dense() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the dense product as `torch.compile` tunes it; cuBLAS is among what it tries."""
    torch.compiler.reset()  # a function is compiled anew a limited number of times
    return torch.compile(functional.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
