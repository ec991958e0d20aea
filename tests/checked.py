"""Types are checked at run time in the tests."""

from beartype import beartype


def outermost(function):
    """Check a function, but not those inside it.

    beartype writes code for a function whenever it is defined: for one inside another at every
    call of that, which took longer than what it checks.
    """
    return function if "<locals>" in getattr(function, "__qualname__", "") else beartype(function)
