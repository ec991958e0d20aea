"""Calibration text that the dense model writes itself, as a token file.

    python -m benchmarks.scripts.self_text self.safetensors            # 32 x 512 tokens, seed 0
    prunebench run -m sparsegpt --sparsity 2:4 --calibration tokens:self.safetensors

The first token of a window is random, four follow greedily, the rest is sampled at temperature 1
(Shin et al., 2406.15524, who filter for English; we do not).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import default_model

if TYPE_CHECKING:
    from torch import Tensor

_GREEDY = 4


def main() -> None:
    """Write the file and print what it took."""
    parser = argparse.ArgumentParser(prog="self_text", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from prunebench.calibration.windows import Windows, save_windows

    start_time = time.perf_counter()
    tokens = write_windows(
        default_model(), samples=options.samples, seqlen=options.seqlen, seed=options.seed
    )
    save_windows(options.path, Windows(tokens, packed=False))
    seconds = time.perf_counter() - start_time
    print(
        f"{options.samples} windows of {options.seqlen} tokens in {seconds:.0f} s: {options.path}"
    )


def write_windows(model: Any, *, samples: int, seqlen: int, seed: int) -> Tensor:
    """Return tokens that a model writes, int64 [samples, seqlen]; a text that ends goes on."""
    import torch

    torch.manual_seed(seed)  # `generate` takes no generator
    first = torch.randint(model.config.vocab_size, (samples, 1), device=model.device)
    given = {"pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(first, do_sample=False, max_new_tokens=_GREEDY, **given)
    tokens: Tensor = model.generate(
        greedy, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=seqlen - greedy.shape[1], **given,
    )  # fmt: skip
    return tokens


if __name__ == "__main__":
    main()
