"""Packages of the scripts for GPU machines: what is missing is said at the start, in one line.

Such a machine may have torch, Triton and transformers and nothing else of ours, and no network.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

PRUNING = (
    "torch", "transformers", "safetensors", "numpy", "jaxtyping", "greenlet", "pydantic",
    "platformdirs", "filelock", "psutil",
)  # fmt: skip
"""What walking and pruning a model imports, by the names of the packages."""

PACKED = ("torch", "jaxtyping")
"""What packed layers import."""


def require_packages(names: Sequence[str], *, program: str) -> None:
    """Exit with one line on stderr and code 3 if packages are missing; nothing is imported.

    Args:
        names: Of packages.
        program: What needs them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{program} needs {', '.join(missing)}, not installed here: "
            f"pip install {' '.join(missing)}, or carry their wheels",
            file=sys.stderr,
        )
        raise SystemExit(3)
