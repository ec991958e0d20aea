"""Which backend multiplies a layer by so many tokens, and why.

Measured on this very device if `measure` was run (kept in the cache, by GPU, library versions,
dtype, shape and bucket of tokens); else the first kind that takes the shape. Forced by `--backend`.

The cache's imports are inside the methods that need them: `benchmarks/scripts/gpu.py` chooses
backends on machines that have torch and little else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from prunebench.sparse24.backends.cusparselt import library_version
from prunebench.sparse24.backends.protocol import Support
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.buckets import Bucket, bucket_of

MIN_RATIO = 1.02
"""A layer that nothing makes faster than this stays dense, where that was measured."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why; `ratio` is dense time over its time, if it was measured."""

    backend: str
    why: str
    ratio: float | None = None


@dataclass
class Policy:
    """The choices on one device.

    Attributes:
        device: Where layers run.
        forced: A backend that is taken wherever it can be.
        speed: Whether layers may keep a second form for many tokens (cuSPARSELt's own), which
            makes 2 x 0.5625 of the dense bytes.
        table: What was measured: key to choice.
    """

    device: torch.device
    forced: str | None = None
    speed: bool = False
    table: dict[str, Choice] = field(default_factory=dict)

    @classmethod
    def load(
        cls, device: torch.device, *, forced: str | None = None, speed: bool = False
    ) -> Policy:
        """Return a policy with what was measured on this device before."""
        policy = cls(device, forced, speed)
        try:
            rows = json.loads(policy.path.read_text("utf-8"))
            policy.table = {key: Choice(**row) for key, row in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            policy.table = {}  # never measured, or written by another version
        return policy

    @property
    def path(self) -> Path:
        """The file of this device and these libraries."""
        from prunebench.files import cache_dir
        from prunebench.spec import slug

        return cache_dir() / "sparse24" / f"policy-{slug(device_key(self.device))}.json"

    def save(self) -> None:
        """Keep what was measured.

        Raises:
            SaveError: The cache cannot be written.
        """
        from prunebench.files import write_text

        rows = {key: asdict(choice) for key, choice in sorted(self.table.items())}
        write_text(self.path, json.dumps(rows, indent=1) + "\n")

    def verdicts(
        self, shape: tuple[int, int], dtype: torch.dtype, tokens: int
    ) -> dict[str, Support]:
        """Say for every backend whether it can be used, and why not."""
        found = {}
        for name, backend in backends().items():
            verdict = backend.available(self.device)
            if verdict.ok:
                noted, verdict = verdict.reason, backend.takes(shape, dtype, tokens)
                if verdict.ok:
                    verdict = Support(True, verdict.reason or noted)
            if verdict.ok and backend.keeps_second_copy and not (self.speed or self.forced == name):
                verdict = Support(False, "it keeps a second form: use --storage speed")
            found[name] = verdict
        return found

    def choose(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Choice:
        """Return the backend for a matrix (out, in) and a number of tokens."""
        verdicts = self.verdicts(shape, dtype, tokens)
        usable = [name for name, verdict in verdicts.items() if verdict.ok]
        if self.forced in usable:
            return Choice(str(self.forced), "forced by --backend")
        measured = self.table.get(table_key(shape, dtype, bucket_of(tokens)))
        if measured is not None and measured.backend in usable and self.forced is None:
            return measured
        first = usable[0]
        note = f"; {verdicts[first].reason}" if verdicts[first].reason else ""
        if self.forced:
            return Choice(first, f"--backend {self.forced} cannot: {verdicts[self.forced].reason}")
        return Choice(first, f"the first that can, not measured on this device{note}")

    def gains_nothing(self, shape: tuple[int, int], dtype: torch.dtype) -> str:
        """Say that a layer should stay dense, if all that was measured says so; else nothing."""
        if self.forced is not None:
            return ""
        start = table_key(shape, dtype, None)
        ratios = [c.ratio for key, c in self.table.items() if key.startswith(start) and c.ratio]
        if not ratios or max(ratios) >= MIN_RATIO:
            return ""
        return f"no gain was measured: at best {max(ratios):.2f} of the dense speed"

    def remember(
        self, shape: tuple[int, int], dtype: torch.dtype, bucket: Bucket,
        seconds: Mapping[str, float],
    ) -> Choice:  # fmt: skip
        """Take the fastest of what was measured in one run; `seconds` holds `dense` too."""
        rivals = {name: one for name, one in seconds.items() if name != "dense"}
        best = min(rivals, key=rivals.__getitem__)
        ratio = seconds["dense"] / rivals[best]
        choice = Choice(best, f"measured: {ratio:.2f} times the dense speed", ratio)
        self.table[table_key(shape, dtype, bucket)] = choice
        return choice


def table_key(shape: tuple[int, int], dtype: torch.dtype, bucket: Bucket | None) -> str:
    """Return the key of a measurement; without a bucket, what all of a shape begin with."""
    start = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} "
    return start + (bucket.name if bucket else "")


def device_key(device: torch.device) -> str:
    """Name a device with the versions that a choice of kernel depends on."""
    if device.type != "cuda":
        return f"{device.type} torch {torch.__version__}"
    try:
        import triton

        version = str(triton.__version__)
    except ImportError:
        version = "none"
    return (
        f"{torch.cuda.get_device_name(device)} torch {torch.__version__} "
        f"cusparselt {library_version()} triton {version}"
    )
