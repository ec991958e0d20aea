"""What a configuration must hold, what is made small, and for how long it is searched."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from prunebench.errors import UsageError, nearest

Goal = Literal["bytes", "speed", "2:4"]
GOALS: tuple[str, ...] = get_args(Goal)
FloorKind = Literal["ppl", "recovery"]

_FLOOR = re.compile(r"(?P<kind>[a-z]+)=(?P<number>\d+(?:\.\d+)?)(?P<unit>x|%?)")
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[smh])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Floor:
    """The quality that must be held, beside the dense model on the same text or tasks.

    Attributes:
        kind: `ppl`: perplexity, times the dense model's; `recovery`: accuracy, as a share of it.
        limit: The most of `ppl`, the least of `recovery`.
    """

    kind: FloorKind
    limit: float

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Read `ppl=1.25x` or `recovery=95%`.

        Raises:
            UsageError: It is neither, or no model could miss or hold it.
        """
        match = _FLOOR.fullmatch(text.strip())
        if not match or match["kind"] not in ("ppl", "recovery"):
            raise UsageError(
                f"--floor {text!r} is not understood",
                where="a floor is ppl=1.25x (at most 1.25 times the perplexity of dense) or "
                "recovery=95% (at least 95% of its accuracy)",
                fix="as in --floor ppl=1.25x",
            )
        number, unit = float(match["number"]), match["unit"]
        if match["kind"] == "ppl":
            if unit == "%" or number < 1:
                raise UsageError(
                    f"--floor {text!r} is out of range",
                    where="of a perplexity it says how many times the dense one is allowed: 1 or "
                    "more",
                    fix="as in --floor ppl=1.25x",
                )
            return cls("ppl", number)
        share = number / 100 if unit == "%" else number
        if unit == "x" or not 0 < share <= 1:
            raise UsageError(
                f"--floor {text!r} is out of range",
                where="of an accuracy it is a share of the dense one: above 0%, at most 100%",
                fix="as in --floor recovery=95%",
            )
        return cls("recovery", share)

    def excess(self, value: float) -> float:
        """Return how far a value is from the floor: 1 or less where it is held."""
        if self.kind == "ppl":
            return value / self.limit
        return self.limit / value if value > 0 else math.inf

    def holds(self, value: float) -> bool:
        """Return whether a value holds the floor."""
        return value <= self.limit if self.kind == "ppl" else value >= self.limit

    def text(self, value: float) -> str:
        """Return a value in the floor's unit: `1.287x` or `96.1%`."""
        if self.kind == "recovery":
            return f"{value:.1%}"
        return f"{value:.3f}x" if value < 100 else f"{value:,.0f}x"

    @property
    def about(self) -> str:
        """What is asked, in words."""
        if self.kind == "ppl":
            return f"at most {self.limit:g} times the perplexity of dense"
        return f"at least {self.limit:.4g} of the accuracy of dense"


def parse_goal(text: str) -> Goal:
    """Read a goal.

    Raises:
        UsageError: There is no such goal.
    """
    for goal in get_args(Goal):
        if goal == text:
            return goal  # type: ignore[no-any-return]
    raise UsageError(f"unknown goal {text!r}", where="given to --goal", fix=nearest(text, GOALS))


def parse_budget(text: str) -> float:
    """Read `90s`, `30m` or `2h`; returns seconds.

    Raises:
        UsageError: It is no duration, or nothing.
    """
    match = _BUDGET.fullmatch(text.strip())
    seconds = float(match["number"]) * _SECONDS[match["unit"]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"--budget {text!r} is no duration", fix="as in --budget 30m, 90s or 2h")
    return seconds
