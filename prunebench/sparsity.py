"""`Sparsity`: how much is pruned, and in which pattern. Nothing here touches a tensor.

A sparsity is either a ratio ("0.5": half of the prunable weights are zero) or N:M: of every M
consecutive weights along the input dimension, at most N are **kept**. The papers do not agree on
the sense of N (SparseGPT, Wanda and GBLM count pruned weights in their code, vendors and MaskLLM
count kept ones); here N is always the number that is kept, so 1:4 prunes 75%.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from fractions import Fraction

from prunebench.errors import IncompatibleData, UsageError

_PATTERN = re.compile(r"^(\d+)\s*:\s*(\d+)$")
_EXAMPLES = "use a ratio such as 0.5 or 50%, or N:M such as 2:4 (keep 2 of every 4)"


@dataclass(frozen=True)
class Sparsity:
    """A target for one matrix: a ratio of zeros, or keep-N-of-M along the input.

    Attributes:
        ratio: Share of zeros, in [0, 1). Equal to `1 - kept / group` for N:M.
        kept: N of N:M, or None for a ratio.
        group: M of N:M, or None for a ratio.
    """

    ratio: float
    kept: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            # 50 for 50% is the usual slip; 1 itself is ambiguous
            hint = f"; did you mean {self.ratio / 100:g}?" if 1 < self.ratio < 100 else ""
            raise UsageError(
                f"sparsity {self.ratio:g} is not in [0, 1){hint}",
                where="a sparsity is the share of weights that become zero",
                fix=_EXAMPLES,
            )

    @classmethod
    def of_pattern(cls, kept: int, group: int) -> Sparsity:
        """Build N:M (keep `kept` of every `group` weights)."""
        if group < 2 or not 0 < kept <= group:
            raise UsageError(
                f"sparsity {kept}:{group} is not a pattern",
                where="N:M keeps N of every M weights, so it needs 1 <= N <= M and M >= 2",
                fix=_EXAMPLES,
            )
        # exact until the end: 1 - 1/3 in floats is not the float nearest to 2/3
        return cls(ratio=float(1 - Fraction(kept, group)), kept=kept, group=group)

    @classmethod
    @functools.cache  # a table of 2,000 results asks thousands of times for the same few
    def parse(cls, text: str) -> Sparsity:
        """Read "0.5", "50%" or "2:4"; several, split by commas, must say the same.

        Raises:
            UsageError: The text is neither, is out of range, or contradicts itself.
        """
        parts = [part.strip() for part in str(text).split(",") if part.strip()]
        if not parts:
            raise UsageError("the sparsity is empty", fix=_EXAMPLES)
        targets = [cls._parse_one(part) for part in parts]
        # "0.5,2:4" is allowed: the same target said twice
        pattern = next((target for target in targets if target.group is not None), targets[0])
        for target in targets:
            if target.ratio != pattern.ratio or target.group not in (None, pattern.group):
                raise UsageError(
                    f"sparsity {text!r} contradicts itself",
                    where=f"{pattern} prunes exactly {pattern.ratio:g}, {target} does not",
                    fix="give one of the two",
                )
        return pattern

    @classmethod
    def _parse_one(cls, text: str) -> Sparsity:
        match = _PATTERN.match(text)
        if match:
            return cls.of_pattern(int(match[1]), int(match[2]))
        scale = 100 if text.endswith("%") else 1
        try:
            # Fraction is exact: in floats, 1.1 / 100 is not the 0.011 that the user means
            ratio = float(Fraction(text.rstrip("%").strip()) / scale)
        except (ValueError, ZeroDivisionError):
            raise UsageError(f"sparsity {text!r} is not understood", fix=_EXAMPLES) from None
        return cls(ratio=ratio)

    @property
    def is_pattern(self) -> bool:
        """True for N:M, False for a ratio."""
        return self.group is not None

    def with_ratio(self, ratio: float) -> Sparsity:
        """Return this sparsity with another ratio; N:M, whose ratio is fixed, stays as it is."""
        return self if self.is_pattern else Sparsity(ratio)

    def count(self, size: int) -> int:
        """Return how many of `size` weights are pruned: floor(size * ratio), in exact arithmetic.

        The ratio is taken as the decimal that it prints as, so 0.29 of 100 is 29, not 28.
        """
        # 0.29 * 100 is 28.999999999999996 in floats
        return math.floor(Fraction(repr(self.ratio)) * size)

    def require_width(self, width: int, *, name: str) -> None:
        """Raise `IncompatibleData` naming the layer where M does not divide the input width."""
        if self.group is not None and width % self.group:
            raise IncompatibleData(
                f"sparsity {self} does not fit {name}: its input width {width} "
                f"is not divisible by {self.group}",
                where="N:M groups are M consecutive weights along the input of every layer",
                fix="use a ratio, or an M that divides every width of the model",
            )

    def __str__(self) -> str:
        return (
            f"{self.kept}:{self.group}" if self.is_pattern else repr(self.ratio).removesuffix(".0")
        )
