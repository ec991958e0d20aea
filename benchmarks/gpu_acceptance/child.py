"""The process of one part: `python3 -m benchmarks.gpu_acceptance.child PART TARGET LOG SECONDS`."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_acceptance.record import Recorder


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one part; what it raises is the last line of its errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("target")
    parser.add_argument("log", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    module, _, name = options.target.partition(":")
    measure = getattr(importlib.import_module(module), name)
    measure(recorder(options.part, options.log, options.seconds, dry=options.dry))


def recorder(part: str, log: Path, seconds: float, *, dry: bool) -> Recorder:
    """Return what a part gets."""
    import torch

    # A dry run takes a GPU where there is one: tiny sizes, but the real kernels.
    on_cpu = dry and not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
    return Recorder(part, log, device, dry, seconds)


if __name__ == "__main__":
    main()
