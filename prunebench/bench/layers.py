"""Benchmark one layer, dense against packed: check the numerics, then measure times, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunebench.bench.shapes import MOST_BYTES_A_SECOND, LayerShape
from prunebench.bench.timing import (
    BLOCKS,
    COLD_BYTES,
    Call,
    Clock,
    Ratio,
    interleaved,
    reason_of,
)
from prunebench.sparse24.backends.cusparselt import CuSparseLtProduct
from prunebench.sparse24.backends.protocol import Backend, Product
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.backends.triton import (
    Launch,
    TiledLayout,
    TritonBackend,
    TritonProduct,
)
from prunebench.sparse24.layouts import FileLayout, WeightLayout
from prunebench.sparse24.packed import VALID_CODES, Packed24, join_codes, unpack24
from prunebench.sparse24.policy import Policy

NOT_MEASURED = "not measured (no CUDA device)"
_MOST_COPIES = 32  # of a layer's weights; small layers do not fill `COLD_BYTES`


@dataclass(frozen=True)
class LayerResult:
    """One layer shape with one number of tokens.

    Attributes:
        backend: The fastest packed backend.
        chosen: Its launch parameters, or cuSPARSELt's algorithm.
        ratio: Best dense time over its time; None if speed was not measured.
        ratios: Median speedup over the best dense product, by name of the rival.
        dense: The best dense product (cuBLAS or autotuned).
        seconds: Median times by name.
        bytes_per_second: Stored bytes over time, of the fastest packed backend.
        cache_suspected: Whether that exceeds the memory bandwidth.
        errors: Relative error against a float32 product, by name.
        numerics_hold: Whether every packed backend has at most twice the dense product's error.
        refused: Backends that were not measured, with the reason.
        copies: Number of distinct weights that a turn cycles through.
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
        """Return a dict for JSON."""
        return asdict(self)


def random_packed(
    shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device, seed: int
) -> Packed24:
    """Return a random 2:4 matrix, packed: any two of every four are kept."""
    rows, width = shape
    generator = torch.Generator(device=device).manual_seed(seed)
    codes = torch.tensor(VALID_CODES, dtype=torch.uint8, device=device)
    # [rows, groups]; all six patterns, drawn as they are stored
    patterns = torch.randint(6, (rows, width // 4), generator=generator, device=device)
    values = torch.randn(rows, width // 2, generator=generator, device=device, dtype=dtype)
    # Scaled so that outputs are of order one; -0.0 + 0.0 = +0.0.
    return Packed24(values / width**0.5 + 0.0, join_codes(codes[patterns]))


@dataclass
class LayerBench:
    """Benchmark of one layer shape on random weights.

    Attributes:
        shape: Of the layer.
        device: Where to measure.
        dtype: Of weights and inputs.
        policy: Decides which backends are measured.
        clock: Measures times.
        compile_dense: Returns a second dense product as a rival; None for cuBLAS only.
        launches: Further launch parameters of the `triton` kernel to try, for tuning.
        tile_rows: Of the layout of the `triton` kernel.
        cold_bytes: Bytes of distinct weights in a turn.
    """

    shape: LayerShape
    device: torch.device
    dtype: torch.dtype
    policy: Policy
    clock: Clock
    compile_dense: Callable[[], Callable[[Tensor, Tensor], Tensor]] | None = None
    launches: Sequence[Launch] = ()
    tile_rows: int = 16
    cold_bytes: int = COLD_BYTES

    def measure(self, tokens: int, *, blocks: int = BLOCKS) -> LayerResult:
        """Check the numerics and measure times for one number of tokens."""
        shape = (self.shape.rows, self.shape.width)
        verdicts = self.policy.verdicts(shape, self.dtype, tokens)
        refused = {name: verdict.reason for name, verdict in verdicts.items() if not verdict.ok}
        # `reference` allocates a dense matrix at every call: measured only where nothing else runs.
        names = [name for name in verdicts if name not in refused and name != "reference"]
        names = names or ["reference"]
        # Distinct weights, see `timing`: one matrix would stay in the L2 cache.
        matrices = [self._random(seed) for seed in range(self._copies())]
        x = torch.randn(tokens, shape[1], device=self.device, dtype=self.dtype)
        dense = [unpack24(matrix) for matrix in matrices]
        products, forms = self._products(names, matrices, tokens, refused)
        errors = {"dense": relative_error(functional.linear(x, dense[0]), x, dense[0])}
        errors |= self._errors(products, x, dense[0], refused)
        # Relative to the dense product's own rounding: a fixed bound would not suit every width and
        # dtype.
        limit = 2 * errors["dense"] + 1e-6
        # A wrong product is reported in `errors` and not timed: its speed would mean nothing.
        right = {name: copies for name, copies in products.items() if errors[name] <= limit}
        seconds: dict[str, float] = {}
        ratio = best = fastest = None
        ratios: dict[str, float] = {}
        if self.clock.measures_speed:
            rivals, kinds = self._rivals(right, dense, x)
            # One rival that cannot be compiled or captured is one cell, not all of them.
            others = rivals.keys() - {"dense"}
            timings = interleaved(rivals, self.clock, blocks=blocks, optional=others)
            refused |= timings.failed
            best = timings.fastest([name for name in kinds if name in timings.seconds])
            seconds = {name: timings.median(name) for name in timings.seconds}
            ratios = {name: timings.ratio(best, name).median for name in seconds if name != best}
            if timed := [name for name in right if name in seconds]:
                fastest = timings.fastest(timed)
                # Against the best dense product, not against the default one.
                ratio = timings.ratio(best, fastest)
        else:  # no GPU: run the same code path, without a result
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
        # 2:4 in 16 bits takes 0.5625 = 9/16: the packed copies are what must exceed the cache.
        stored = self.shape.dense_bytes * 9 // 16
        return max(1, min(_MOST_COPIES, -(-self.cold_bytes // stored)))

    def _random(self, seed: int) -> Packed24:
        shape = (self.shape.rows, self.shape.width)
        return random_packed(shape, dtype=self.dtype, device=self.device, seed=seed)

    def _products(
        self, names: list[str], matrices: list[Packed24], tokens: int, refused: dict[str, str]
    ) -> tuple[dict[str, list[Product]], WeightLayout]:
        """Build every packed product for every copy; failures are recorded in `refused`."""
        # A backend of its own for these tiles: `backends` holds the default one.
        kinds = {**backends(), TritonBackend.name: TritonBackend(self.tile_rows)}
        forms = [self._layout(packed, kinds) for packed in matrices]
        products: dict[str, list[Product]] = {}
        for name in names:
            try:
                products[name] = [kinds[name].build(form) for form in forms]
                _share_algorithm(products[name], tokens)
            except Exception as error:  # a library can fail in any way; measure the others
                refused[name] = reason_of(error)
                products.pop(name, None)
        for number, launch in enumerate(self.launches if TritonBackend.name in products else ()):
            tuned = [
                TritonProduct(form, {tokens: launch})
                for form in forms
                if isinstance(form, TiledLayout)
            ]
            products[f"{TritonBackend.name}#{number}"] = list(tuned)
        return products, forms[0]

    def _layout(self, packed: Packed24, kinds: Mapping[str, Backend]) -> WeightLayout:
        """Return the layout of a layer whose kernel for one token is the fastest."""
        verdicts = self.policy.verdicts(packed.shape, packed.dtype, 1)
        names = [n for n, v in verdicts.items() if v.ok and self.policy.forced in (None, n)]
        layouts = (kinds[name].layout(packed) for name in names)
        return next((each for each in layouts if each is not None), FileLayout(packed))

    def _errors(
        self, products: dict[str, list[Product]], x: Tensor, dense: Tensor, refused: dict[str, str]
    ) -> dict[str, float]:
        """Return the error of every product; one that cannot be run is moved to `refused`."""
        errors = {}
        for name in list(products):
            try:
                errors[name] = relative_error(products[name][0].run(x, None), x, dense)
            except Exception as error:  # a library can fail in any way; measure the others
                refused[name] = reason_of(error)
                del products[name]
        return errors

    def _rivals(
        self, products: dict[str, list[Product]], dense: list[Tensor], x: Tensor
    ) -> tuple[dict[str, list[Call]], list[str]]:
        """Return the calls of every rival, one per copy, and the names of the dense ones."""
        # One call per copy of the weights: a turn runs through all of them.
        rivals: dict[str, list[Call]] = {"dense": [_dense_call(x, weight) for weight in dense]}
        if self.compile_dense is not None:
            multiply = self.compile_dense()
            rivals["dense, max-autotune"] = [_call(multiply, x, weight) for weight in dense]
        kinds = list(rivals)
        for name, copies in products.items():
            rivals[name] = [_product_call(product, x) for product in copies]
        return rivals, kinds

    def _chosen(self, products: dict[str, list[Product]], name: str | None, tokens: int) -> str:
        return products[name][0].settings(tokens) if name else ""


def relative_error(out: Tensor, x: Tensor, dense: Tensor) -> float:
    """Return the relative error of `out` against the float32 product x @ dense.T; NaN gives inf."""
    exact = x.float() @ dense.float().t()
    error = float((out.float() - exact).norm() / exact.norm())
    # False for NaN only, which is not equal to itself.
    return error if error == error else float("inf")


def _share_algorithm(products: list[Product], tokens: int) -> None:
    """Search cuSPARSELt's algorithm for the first copy only; the others have the same shape."""
    compressed = [product for product in products if isinstance(product, CuSparseLtProduct)]
    for product in compressed:
        product.algorithms.update(compressed[0].algorithms)
        product.algorithm_for(tokens)


# Functions and not lambdas in a loop: those would all see the loop's last weight.
def _dense_call(x: Tensor, weight: Tensor) -> Call:
    return lambda: functional.linear(x, weight)


def _call(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Call:
    return lambda: multiply(x, weight)


def _product_call(product: Product, x: Tensor) -> Call:
    return lambda: product.run(x, None)


def autotuned_dense() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the dense product autotuned by `torch.compile`, which tries cuBLAS, too."""
    torch.compiler.reset()  # a function is compiled anew a limited number of times
    return torch.compile(functional.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
