"""Choose the backend of a layer for a number of tokens, with the reason. It never guesses.

A kernel is used only where it was measured on this device as faster than the dense product: by
`prunebench bench`, which keeps the speedups in the cache, by GPU, library versions, dtype, shape
and bucket of tokens; or in `measured.json`, the table of known devices that comes with the package.
Elsewhere the weight stays packed for its memory, and no speed is claimed: `decompress` unpacks it
for each product on a GPU. `--backend` overrides the choice.

The cache's modules are imported inside the methods that use them: `benchmarks/gpu_acceptance`
chooses backends on machines that have torch and little else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunebench.sparse24.backends.cpu_build import cpu_name
from prunebench.sparse24.backends.cusparselt import library_version
from prunebench.sparse24.backends.protocol import Support
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.buckets import Bucket, bucket_of

MIN_RATIO = 1.02
"""Kernels of smaller measured speedup are not used, and layers that have only such stay dense."""

KNOWN = Path(__file__).with_name("measured.json")
"""Speedups of known devices, by `device_key` and `table_key`; measured by anybody, see docs."""

_FORMAT = 1
_SAVES_MEMORY = ("decompress", "cpu", "reference")  # where no speed was measured, in this order
NOT_MEASURED = "not measured on this device: packed for its memory (prunebench bench measures)"
Table = dict[str, dict[str, float]]


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
        table: Measured speedups over the best dense product, by `table_key` and backend.
    """

    device: torch.device
    forced: str | None = None
    speed: bool = False
    table: Table = field(default_factory=dict)

    @classmethod
    def load(
        cls, device: torch.device, *, forced: str | None = None, speed: bool = False
    ) -> Policy:
        """Return a policy with the known and the cached measurements of this device."""
        policy = cls(device, forced, speed)
        known = _read(KNOWN).get("devices")
        if isinstance(known, dict):
            policy.table |= _speedups(known.get(device_key(device)))
        policy.table |= _speedups(_read(policy.path).get("measured"))
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

        document = {
            "format": _FORMAT,
            "device": device_key(self.device),
            "measured": dict(sorted(self.table.items())),
        }
        write_text(self.path, json.dumps(document, indent=1) + "\n")

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
        # `reference` takes everything: there is always one.
        unmeasured = next(name for name in _SAVES_MEMORY if name in usable)
        if self.forced:
            reason = verdicts[self.forced].reason
            return Choice(unmeasured, f"--backend {self.forced} cannot: {reason}")
        measured = self.measured(shape, dtype, tokens)
        ratios = {name: ratio for name, ratio in measured.items() if name in usable}
        if not ratios:
            note = verdicts[unmeasured].reason
            return Choice(unmeasured, f"{NOT_MEASURED}; {note}" if note else NOT_MEASURED)
        best = max(ratios, key=ratios.__getitem__)
        if ratios[best] >= MIN_RATIO:
            return Choice(best, f"measured: {ratios[best]:.2f}x the dense speed", ratios[best])
        why = f"none is faster than dense here (best: {best}, {ratios[best]:.2f}x): saves memory"
        return Choice(unmeasured, why, ratios.get(unmeasured))

    def measured(
        self, shape: tuple[int, int], dtype: torch.dtype, tokens: int
    ) -> Mapping[str, float]:
        """Return the measured speedup of each backend; empty if nothing was measured."""
        return self.table.get(table_key(shape, dtype, bucket_of(tokens)), {})

    def gains_nothing(self, shape: tuple[int, int], dtype: torch.dtype) -> str:
        """Return why a layer should stay dense; "" if a backend is faster or none was measured."""
        if self.forced is not None:
            return ""
        start = table_key(shape, dtype, None)
        ratios = [
            ratio
            for key, row in self.table.items()
            if key.startswith(start)
            for name, ratio in row.items()
            if name in backends() and (self.speed or not backends()[name].keeps_second_copy)
        ]
        # One token count where packing is faster is enough to pack the layer.
        if not ratios or max(ratios) >= MIN_RATIO:
            return ""
        return f"no speedup measured: at best {max(ratios):.2f}x the dense speed"

    def remember(
        self, shape: tuple[int, int], dtype: torch.dtype, bucket: Bucket,
        seconds: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Store the speedups of one measurement.

        Args:
            shape: Of the matrix, (out, in).
            dtype: Of the weight.
            bucket: Of the token count.
            seconds: Times by backend, with `dense`, the best dense product, among them.
        """
        row = {name: seconds["dense"] / t for name, t in seconds.items() if name != "dense"}
        self.table[table_key(shape, dtype, bucket)] = row


def _read(path: Path) -> dict[str, Any]:
    """Return a table of this format; empty if there is none, or one of another version."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return {}
    return document


def _speedups(rows: Any) -> Table:
    """Return the rows that are speedups by backend: what is damaged counts as not measured."""
    if not isinstance(rows, dict):
        return {}
    table = {
        key: {
            name: float(ratio)
            for name, ratio in row.items()
            if isinstance(ratio, int | float) and math.isfinite(ratio) and ratio > 0
        }
        for key, row in rows.items()
        if isinstance(row, dict)
    }
    return {key: row for key, row in table.items() if row}


def table_key(shape: tuple[int, int], dtype: torch.dtype, bucket: Bucket | None) -> str:
    """Return the key of a measurement; without a bucket, the common prefix of a shape's keys."""
    start = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} "
    return start + (bucket.name if bucket else "")


def device_key(device: torch.device) -> str:
    """Return the device's name with the library versions that affect the choice of a kernel."""
    if device.type != "cuda":
        chip = f"{cpu_name()} {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return f"{device.type} {chip} torch {torch.__version__}"
    try:
        import triton

        version = str(triton.__version__)
    except ImportError:
        version = "none"
    return (
        f"{torch.cuda.get_device_name(device)} torch {torch.__version__} "
        f"cusparselt {library_version()} triton {version}"
    )
