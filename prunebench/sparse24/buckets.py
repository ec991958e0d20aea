"""Buckets of token counts: one choice of backend and algorithm per bucket."""

from __future__ import annotations

from dataclasses import dataclass

_LAST = (1, 4, 8, 16, 64, 256, 512, 1024, 2048, 4096, 8192)  # tokens, inclusive


@dataclass(frozen=True)
class Bucket:
    """Token counts from `first` to `last`, both inclusive."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """The name in cache keys, e.g. `17-64`."""
        return f"{self.first}-{self.last}"


BUCKETS = tuple(Bucket(1 if i == 0 else _LAST[i - 1] + 1, last) for i, last in enumerate(_LAST))


def bucket_of(tokens: int) -> Bucket:
    """Return the bucket of a token count; the last bucket also covers all larger counts."""
    return next((bucket for bucket in BUCKETS if tokens <= bucket.last), BUCKETS[-1])
