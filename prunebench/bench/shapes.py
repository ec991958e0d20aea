"""The layer shapes of the benchmark."""

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
CPU_TOKENS = (1, 4, 8, 64)
MOST_BYTES_A_SECOND = 4.5e12
"""Above this the cache was measured: an H200's memory bandwidth is lower."""
