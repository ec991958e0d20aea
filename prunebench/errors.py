"""What a user can fix: one line what, one line where or why, one line what to do.

Each class is an exit code of the command line (DESIGN section 7). Anything that is not a
`PrunebenchError` is a bug of ours and ends with exit code 1.
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
    """A model, a text or a network that is not there."""

    exit_code = 3


class IncompatibleData(PrunebenchError):
    """Data that is there, but damaged or does not fit the request."""

    exit_code = 4


class SaveError(PrunebenchError):
    """A result, a model or a cache entry that could not be written."""

    exit_code = 5


class CheckFailed(PrunebenchError):
    """A check that was asked for, or that every run makes, did not hold."""

    exit_code = 6


class OutOfMemory(PrunebenchError):
    """The host or the device ran out of memory."""

    exit_code = 7


class SomeCellsFailed(PrunebenchError):
    """A sweep that went through, with cells that failed."""

    exit_code = 8


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name is nearest to `name`, as the end of an error message.

    Returns:
        `"did you mean 'wanda'? Known: ..."`, or only the list where nothing is near.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names)}"
