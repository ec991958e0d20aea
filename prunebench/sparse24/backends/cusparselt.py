"""`cslt`: torch's cuSPARSELt operators, called directly, for many tokens.

Not through `to_sparse_semi_structured`: that class has one algorithm per tensor, and the best one
depends on the number of tokens. Guards: a library that is missing or known to be slow, unsupported
shapes, fewer than 5 tokens (padded to 8), float16 that destroys the CUDA context on some chips
(tried in a subprocess), and algorithms with wrong results (each is run three times against a
float32 product before it is used).

The library makes its handles for the first device of a process: one GPU a process.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.errors import IncompatibleData
from prunebench.sparse24.backends.protocol import Product, Support, takes_dtype
from prunebench.sparse24.buckets import bucket_of
from prunebench.sparse24.layouts import WeightLayout
from prunebench.sparse24.packed import Packed24

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
_SLOW_ON_HOPPER = 800  # 0.8.0: "performance regressions on H100 and L4", fixed in 0.8.1
_REPEATS = 3  # of an algorithm before it is trusted
_PAD_TOKENS = 8  # the library takes multiples of 8 tokens in 16 bits
_FEWEST_TOKENS = 5  # fewer would be padded to twice as many, and have a kernel of their own
_ROWS_MULTIPLE = 16


@dataclass(frozen=True)
class Algorithm:
    """One of the library's algorithms for a product; ids are specific to a library version.

    Attributes:
        note: Which algorithms were refused before it, and why.
    """

    id: int = 0
    split_k: int = 1
    split_k_mode: int = -1
    note: str = field(default="", compare=False)


class Operators(Protocol):
    """The operators of the library; replaced by a fake in tests."""

    has_split_k: bool

    def compress(self, weight: Tensor) -> Tensor: ...  # noqa: D102
    def mm(  # noqa: D102
        self, blob: Tensor, x: Tensor, bias: Tensor | None, algorithm: Algorithm
    ) -> Tensor: ...
    def search(self, blob: Tensor, x: Tensor, bias: Tensor | None) -> list[Algorithm]: ...  # noqa: D102


class TorchOperators:
    """`torch._cslt_*`; products are [tokens, out], contiguous."""

    def __init__(self) -> None:
        schemas = torch._C._jit_get_schemas_for_operator("aten::_cslt_sparse_mm")
        self.has_split_k = any(a.name == "split_k" for s in schemas for a in s.arguments)

    def compress(self, weight: Tensor) -> Tensor:
        """Return a 2:4 matrix [out, in] in the library's format."""
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            return torch._cslt_compress(weight)

    def mm(self, blob: Tensor, x: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
        """Return x @ W.T + bias, [tokens, out]; `x` is [tokens, in]."""
        options: dict[str, Any] = {"alg_id": algorithm.id}
        if self.has_split_k:
            options |= {"split_k": algorithm.split_k, "split_k_mode": algorithm.split_k_mode}
        # The library works on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(blob):  # type: ignore[no-untyped-call]
            # transpose_result: [out, tokens] is stored as [tokens, out].
            return torch._cslt_sparse_mm(blob, x.t(), bias=bias, transpose_result=True, **options)

    def search(self, blob: Tensor, x: Tensor, bias: Tensor | None) -> list[Algorithm]:
        """Return the algorithm that the library measured as fastest, then its default."""
        with torch.cuda.device_of(blob):  # type: ignore[no-untyped-call]
            return [*self._fastest(blob, x, bias), Algorithm()]

    def _fastest(self, blob: Tensor, x: Tensor, bias: Tensor | None) -> list[Algorithm]:
        search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
        if search is not None and self.has_split_k:
            # The dense operand is passed transposed: the library computes W x^T, [out, tokens].
            best, split_k, mode, _ = search(blob, x.t(), bias, None, None, True)
            return [Algorithm(best, split_k, mode)]
        if hasattr(torch, "_cslt_sparse_mm_search"):
            best = torch._cslt_sparse_mm_search(blob, x.t(), bias=bias, transpose_result=True)
            return [Algorithm(int(best))]
        return []


def library_version() -> int | None:
    """Return the version of cuSPARSELt (801 is 0.8.1); None without it."""
    if not torch.backends.cusparselt.is_available():
        return None
    version = torch.backends.cusparselt.version()
    return None if version is None else int(version)


class CuSparseLtBackend:
    """The backend; stores its compressed matrix in addition to the layer's layout."""

    name = "cslt"
    keeps_second_copy = True

    def __init__(self) -> None:
        # A search takes seconds, and layers of one shape have the same result.
        self._searched: dict[tuple[object, ...], dict[str, Algorithm]] = {}

    def available(self, device: torch.device) -> Support:
        """Return support: the GPUs of cuSPARSELt, with a torch that was built with it."""
        if device.type != "cuda":
            return Support(False, f"the device is {device.type}, not cuda")
        if not torch.cuda.is_available():
            return Support(False, "no CUDA device")
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) not in CAPABILITIES:
            return Support(False, f"cuSPARSELt does not support sm_{major}{minor}")
        if not (hasattr(torch, "_cslt_compress") and hasattr(torch, "_cslt_sparse_mm")):
            return Support(False, f"torch {torch.__version__} has no cuSPARSELt operators")
        version = library_version()
        if version is None:
            return Support(False, f"torch {torch.__version__} was built without cuSPARSELt")
        if version == _SLOW_ON_HOPPER and (major, minor) == (9, 0):
            return Support(True, "cuSPARSELt 0.8.0 is known to be slow on H100: fixed in 0.8.1")
        return Support(True, f"cuSPARSELt {version}")

    def takes(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Support:
        """Return support: many tokens, sizes divisible by 16, bfloat16; float16 after a trial."""
        if tokens < _FEWEST_TOKENS:
            return Support(False, f"{tokens} tokens: cuSPARSELt pads them to {_PAD_TOKENS}")
        if shape[0] % _ROWS_MULTIPLE or shape[1] % _ROWS_MULTIPLE:
            return Support(False, f"16 does not divide {shape[0]} x {shape[1]}")
        if dtype == torch.float16:
            return _float16_survives()
        return takes_dtype(dtype)

    def layout(self, packed: Packed24) -> WeightLayout | None:
        """Return None: the matrix is compressed from a dense copy, which any layout can give."""
        return None

    def build(self, form: WeightLayout) -> Product:
        """Compress a dense copy, which is freed afterwards."""
        searched = self._searched.setdefault((form.device, form.shape, form.dtype), {})
        return CuSparseLtProduct.of(form, TorchOperators(), searched)


@dataclass(frozen=True)
class CuSparseLtProduct:
    """A compressed matrix, with one algorithm per token bucket, searched on first use.

    Attributes:
        algorithms: By bucket; products of one shape share them.
    """

    blob: Tensor
    form: WeightLayout
    operators: Operators
    algorithms: dict[str, Algorithm] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        form: WeightLayout,
        operators: Operators,
        algorithms: dict[str, Algorithm] | None = None,
    ) -> CuSparseLtProduct:
        """Compress the matrix of a layout."""
        searched = {} if algorithms is None else algorithms
        return cls(operators.compress(_dense(form)), form, operators, searched)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the compressed matrix."""
        return self.blob.nbytes

    def run(self, x: Float[Tensor, "tokens in"], bias: Tensor | None) -> Tensor:
        """Return `x @ W.T + bias`, [tokens, out]; tokens are padded to a multiple of 8."""
        tokens = x.shape[0]
        algorithm = self.algorithm_for(tokens)
        padded = _padded(x)
        out = self.operators.mm(self.blob, padded, bias, algorithm)
        return out if len(padded) == tokens else out[:tokens].contiguous()

    def settings(self, tokens: int) -> str:
        """Return the algorithm."""
        return str(self.algorithm_for(tokens))

    def algorithm_for(self, tokens: int) -> Algorithm:
        """Return the algorithm of a token bucket, searched and verified on first use.

        Raises:
            IncompatibleData: Every algorithm gives wrong results here.
        """
        bucket = bucket_of(tokens)
        if bucket.name not in self.algorithms:
            self.algorithms[bucket.name] = self._search(bucket.last)
        return self.algorithms[bucket.name]

    def _search(self, tokens: int) -> Algorithm:
        # The search and the checks wait for the device, which a capture does not allow.
        if self.blob.is_cuda and torch.cuda.is_current_stream_capturing():
            raise IncompatibleData(
                "an algorithm of cuSPARSELt cannot be searched while a CUDA graph is captured",
                fix="run the layer once with as many tokens before",
            )
        generator = torch.Generator(device=self.form.device).manual_seed(0)
        shape = (tokens, self.form.shape[1])
        x = torch.randn(shape, generator=generator, device=self.form.device).to(self.form.dtype)
        dense = _dense(self.form)
        # The bucket's largest token count is searched: the others in it use the same algorithm.
        refused: list[str] = []
        for algorithm in self.operators.search(self.blob, x, None):
            reason = why_wrong(algorithm, self, x, dense)
            if not reason:
                return replace(algorithm, note="; ".join(refused))
            refused.append(f"{algorithm.id} refused: {reason}")
        rows, width = self.form.shape
        raise IncompatibleData(
            f"cuSPARSELt gives wrong results for {rows} x {width} with {tokens} tokens",
            where="; ".join(refused),
            fix="use --backend decompress, or another version of cuSPARSELt",
        )


def why_wrong(algorithm: Algorithm, product: CuSparseLtProduct, x: Tensor, dense: Tensor) -> str:
    """Return why an algorithm may not be used; "" if it may.

    It must be deterministic, with at most twice the dense product's error; both are compared with
    the product in float32. Some algorithms of some versions are wrong, and differ from run to run
    (pytorch#155333).
    """
    exact = x.float() @ dense.float().t()  # [tokens, out]
    scale = exact.norm() + 1e-30
    allowed = float(2 * ((x @ dense.t()).float() - exact).norm() / scale + 1e-6)
    first: Tensor | None = None
    for out in _repeats(algorithm, product, x):
        error = float((out.float() - exact).norm() / scale)
        if not error <= allowed:  # "not <=": NaN fails, too
            return f"relative error {error:.1e}, above {allowed:.1e}"
        if first is not None and not torch.equal(out, first):
            return "its results differ from run to run"
        first = out
    return ""


def _repeats(algorithm: Algorithm, product: CuSparseLtProduct, x: Tensor) -> Iterator[Tensor]:
    for _ in range(_REPEATS):
        yield product.operators.mm(product.blob, _padded(x), None, algorithm)[: len(x)].clone()


def _padded(x: Tensor) -> Tensor:
    missing = -x.shape[0] % _PAD_TOKENS
    x = x.contiguous()
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _dense(form: WeightLayout) -> Tensor:
    dense = torch.empty(form.shape, dtype=form.dtype, device=form.device)
    form.write_dense(dense)
    return dense


_TRIAL = """
import torch
weight = torch.tensor([1, 0, 0, 1], device="cuda").half().tile((256, 64))
x = torch.randn(256, 256, device="cuda").half()
blob = torch._cslt_compress(weight)
out = torch._cslt_sparse_mm(blob, x.t(), transpose_result=True)
torch.cuda.synchronize()
assert torch.allclose(out, x @ weight.t(), atol=0.5, rtol=0.05)
"""


@functools.cache
def _float16_survives() -> Support:
    """Try float16 in a subprocess: a failure destroys the CUDA context."""
    # The process owns its CUDA context: if that is destroyed, this one's is not.
    trial = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, check=False)
    if trial.returncode == 0:
        return Support(True, "float16 works here")
    return Support(False, "float16 fails in cuSPARSELt on this machine: use bfloat16")
