"""Buckets of token counts: within one, the same kernel is the best."""

from __future__ import annotations

from dataclasses import dataclass

_LAST = (2, 8, 16, 64, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Bucket:
    """Token counts from `first` to `last`; the largest bucket has no end."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """Such as `17-64`."""
        return f"{self.first}-{self.last}"


BUCKETS = tuple(Bucket(1 if i == 0 else _LAST[i - 1] + 1, last) for i, last in enumerate(_LAST))


def bucket_of(tokens: int) -> Bucket:
    """Return the bucket of a token count; beyond the last one, the last one."""
    return next((one for one in BUCKETS if tokens <= one.last), BUCKETS[-1])
