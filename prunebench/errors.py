"""Errors that a user can fix: one line what, one line where or why, one line what to do.

Each class has its own exit code, listed in docs/cli.md. Any other exception is a bug of prunebench
and ends with exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrunebenchError(Exception):
    """A failure that the user can act on.

    Args:
        what: One line that names the thing and its value.
        where: One line that says where it was found, or why it is wrong.
        fix: One line that says what to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.where, self.fix) if line)


class UsageError(PrunebenchError):
    """A wrong option, name or recipe."""

    exit_code = 2


class MissingResource(PrunebenchError):
    """A model, a text, a package or a network is not available."""

    exit_code = 3


class IncompatibleData(PrunebenchError):
    """Data is damaged, or does not fit the request."""

    exit_code = 4


class SaveError(PrunebenchError):
    """A result, a model or a cache entry could not be written."""

    exit_code = 5


class CheckFailed(PrunebenchError):
    """A check failed: one that was requested, or one that every run makes."""

    exit_code = 6


class OutOfMemory(PrunebenchError):
    """The host or the device ran out of memory."""

    exit_code = 7


class SomeCellsFailed(PrunebenchError):
    """A sweep finished, and some of its cells failed."""

    exit_code = 8


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest of some names, as the last line of an error message.

    Returns:
        `"did you mean 'wanda'? Known: ..."`, or only the list where nothing is near.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names)}"
