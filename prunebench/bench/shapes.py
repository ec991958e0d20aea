"""The layer shapes of the benchmark, and the target speedups (H200, bfloat16)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """A linear layer of a model; `fused` in the name: several that share their input.

    Attributes:
        rows: Outputs.
        width: Inputs.
    """

    model: str
    name: str
    rows: int
    width: int

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight in a 16-bit dtype."""
        return 2 * self.rows * self.width


SHAPES = (
    LayerShape("LLaMA-2-7B", "attention", 4096, 4096),
    LayerShape("LLaMA-2-7B", "gate or up", 11008, 4096),
    LayerShape("LLaMA-2-7B", "down", 4096, 11008),
    LayerShape("LLaMA-2-7B", "fused q, k, v", 12288, 4096),
    LayerShape("LLaMA-2-7B", "fused gate, up", 22016, 4096),
    LayerShape("OPT-175B", "attention", 12288, 12288),
    LayerShape("OPT-175B", "fc1", 49152, 12288),
    LayerShape("OPT-175B", "fc2", 12288, 49152),
    LayerShape("BLOOM-176B", "fused q, k, v", 43008, 14336),
    LayerShape("BLOOM-176B", "up", 57344, 14336),
    LayerShape("BLOOM-176B", "down", 14336, 57344),
)
TOKENS = (1, 4, 8, 64, 2048)
"""The largest of their buckets, see `sparse24.buckets`: 4 is the most that has our own kernel."""
CROSSOVER_TOKENS = (512, 8192)
MOST_BYTES_A_SECOND = 4.5e12
"""Above this the cache was measured: an H200's memory bandwidth is lower."""


@dataclass(frozen=True)
class Promise:
    """Target and minimum of a speedup over the best dense product on an H200."""

    target: float
    floor: float


_DECODE = {
    (4096, 4096): Promise(1.30, 1.10),
    (11008, 4096): Promise(1.45, 1.25),
    (4096, 11008): Promise(1.45, 1.25),
    (12288, 4096): Promise(1.50, 1.30),
    (22016, 4096): Promise(1.50, 1.30),
}
_LARGE = Promise(1.60, 1.40)
END_TO_END = {"decode": Promise(1.38, 1.22), "prefill": Promise(1.20, 1.05)}
RESIDENT = Promise(0.585, 0.60)
MENDED_LIBRARY = 801
"""cuSPARSELt 0.8.1; 0.8.0 is slow on Hopper."""


def promise(rows: int, width: int, tokens: int, library: int | None) -> Promise | None:
    """Return the target speedup of a layer for a number of tokens; None if there is none.

    Args:
        rows: Outputs.
        width: Inputs.
        tokens: Number of tokens.
        library: The version of cuSPARSELt, 801 for 0.8.1; None without it.
    """
    decode = _DECODE.get((rows, width), _LARGE if rows * width >= 12288 * 12288 else None)
    # Up to 4 tokens our kernel reads the packed weights; more have none, and nothing is promised.
    if tokens == 1:
        return decode
    if tokens == 2048:
        # Many tokens run in cuSPARSELt, whose version decides.
        mended = library is not None and library >= MENDED_LIBRARY
        return Promise(1.30, 1.15) if mended else Promise(0.88, 0.82)
    return None
