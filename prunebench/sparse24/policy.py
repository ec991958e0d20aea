"""Choose the backend of a layer for a number of tokens, with the reason.

The fastest one if `prunebench bench` has measured it on this device (cached by GPU, library
versions, dtype, shape and token bucket); else the first one that supports the shape. `--backend`
overrides the choice.

The cache's modules are imported inside the methods that use them: `benchmarks/scripts/gpu.py`
chooses backends on machines that have torch and little else.
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
"""A layer whose best measured speedup is below this stays dense."""


@dataclass(frozen=True)
class Choice:
    """The chosen backend and the reason.

    Attributes:
        backend: Name of the backend.
        why: The reason, one line.
        ratio: Speedup over dense; None if not measured.
    """

    backend: str
    why: str
    ratio: float | None = None


@dataclass
class Policy:
    """The choices on one device.

    Attributes:
        device: Where layers run.
        forced: A backend that is used wherever it can be.
        speed: Whether layers may store the weight twice (once more in cuSPARSELt's format, for many
            tokens): 2 x 0.5625 of the dense bytes.
        table: Measured choices by `table_key`.
    """

    device: torch.device
    forced: str | None = None
    speed: bool = False
    table: dict[str, Choice] = field(default_factory=dict)

    @classmethod
    def load(
        cls, device: torch.device, *, forced: str | None = None, speed: bool = False
    ) -> Policy:
        """Return a policy with the cached measurements of this device."""
        policy = cls(device, forced, speed)
        try:
            rows = json.loads(policy.path.read_text("utf-8"))
            policy.table = {key: Choice(**row) for key, row in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            policy.table = {}  # never measured, or written by another version
        return policy

    @property
    def path(self) -> Path:
        """The cache file of this device and these library versions."""
        from prunebench.files import cache_dir
        from prunebench.spec import slug

        return cache_dir() / "sparse24" / f"policy-{slug(device_key(self.device))}.json"

    def save(self) -> None:
        """Write the measurements to the cache.

        Raises:
            SaveError: The cache cannot be written.
        """
        from prunebench.files import write_text

        rows = {key: asdict(choice) for key, choice in sorted(self.table.items())}
        write_text(self.path, json.dumps(rows, indent=1) + "\n")

    def verdicts(
        self, shape: tuple[int, int], dtype: torch.dtype, tokens: int
    ) -> dict[str, Support]:
        """Return for every backend whether it can be used, with the reason."""
        verdicts = {}
        for name, backend in backends().items():
            verdict = backend.available(self.device)
            if verdict.ok:
                note, verdict = verdict.reason, backend.takes(shape, dtype, tokens)
                if verdict.ok:
                    verdict = Support(True, verdict.reason or note)
            # Forcing a backend implies its second copy.
            if verdict.ok and backend.keeps_second_copy and not (self.speed or self.forced == name):
                verdict = Support(False, "it stores a second copy: use --storage speed")
            verdicts[name] = verdict
        return verdicts

    def choose(self, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> Choice:
        """Return the backend for a matrix (out, in) and a number of tokens."""
        verdicts = self.verdicts(shape, dtype, tokens)
        usable = [name for name, verdict in verdicts.items() if verdict.ok]
        if self.forced in usable:
            return Choice(str(self.forced), "forced by --backend")
        measured = self.table.get(table_key(shape, dtype, bucket_of(tokens)))
        if measured is not None and measured.backend in usable and self.forced is None:
            return measured
        # `reference` takes everything: there is always one.
        first = usable[0]
        note = f"; {verdicts[first].reason}" if verdicts[first].reason else ""
        if self.forced:
            return Choice(first, f"--backend {self.forced} cannot: {verdicts[self.forced].reason}")
        return Choice(first, f"the first usable one, not measured on this device{note}")

    def gains_nothing(self, shape: tuple[int, int], dtype: torch.dtype) -> str:
        """Return why a layer should stay dense; "" if a backend is faster or none was measured."""
        if self.forced is not None:
            return ""
        start = table_key(shape, dtype, None)
        ratios = [c.ratio for key, c in self.table.items() if key.startswith(start) and c.ratio]
        # One token count where packing is faster is enough to pack the layer.
        if not ratios or max(ratios) >= MIN_RATIO:
            return ""
        return f"no speedup measured: at best {max(ratios):.2f}x the dense speed"

    def remember(
        self, shape: tuple[int, int], dtype: torch.dtype, bucket: Bucket,
        seconds: Mapping[str, float],
    ) -> Choice:  # fmt: skip
        """Store the fastest backend of one measurement, and return it.

        Args:
            shape: Of the matrix, (out, in).
            dtype: Of the weight.
            bucket: Of the token count.
            seconds: Times by backend, with `dense` among them.
        """
        rivals = {name: time for name, time in seconds.items() if name != "dense"}
        best = min(rivals, key=rivals.__getitem__)
        ratio = seconds["dense"] / rivals[best]
        choice = Choice(best, f"measured: {ratio:.2f}x the dense speed", ratio)
        self.table[table_key(shape, dtype, bucket)] = choice
        return choice


def table_key(shape: tuple[int, int], dtype: torch.dtype, bucket: Bucket | None) -> str:
    """Return the key of a measurement; without a bucket, the common prefix of a shape's keys."""
    start = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} "
    return start + (bucket.name if bucket else "")


def device_key(device: torch.device) -> str:
    """Return the device's name with the library versions that affect the choice of a kernel."""
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
