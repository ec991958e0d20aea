"""Turn exceptions into exit codes and a message of up to three lines.

0 ok, 1 bug, 2 usage, 3 missing resource, 4 incompatible data, 5 could not save, 6 check failed,
7 out of memory, 8 some cells failed, 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from prunebench.errors import MissingResource, PrunebenchError, SaveError
from prunebench.progress import quiet_libraries


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that every exception becomes a message and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        # not every command has --debug; the variable works with all
        debug = bool(kwargs.get("debug")) or os.environ.get("PRUNEBENCH_DEBUG", "") not in ("", "0")
        try:
            with quiet_libraries(warn=not kwargs.get("quiet")):
                command(*args, **kwargs)
        except PrunebenchError as error:
            _fail(error, debug=debug)
        except KeyboardInterrupt:
            say("")
            say("interrupted: no result was saved, and no file is half written")
            say(f"run it again with: {command_line()}")
            raise typer.Exit(130) from None
        # before OSError, of which it is a subclass. At exit Python flushes stdout again: with
        # devnull in its place that flush cannot fail
        except BrokenPipeError:  # the reader of our output has gone: prunebench compare | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            _fail(_os_error(error), debug=debug)
        # without this, a package that a model's own code needs would look like a bug of prunebench
        except ImportError as error:
            if not _is_of_transformers(error):
                _bug(error, debug=debug)
            _fail(_missing_package(error), debug=debug)
        # a RuntimeError: it must pass in front of the handler of bugs
        except typer.Exit:
            raise
        except Exception as error:
            _bug(error, debug=debug)

    return wrapper


def say(text: str) -> None:
    """Write one line to stderr."""
    print(text, file=sys.stderr)


def command_line() -> str:
    """Return the command that is running, as one would type it."""
    return shlex.join(["prunebench", *sys.argv[1:]])


def _fail(error: PrunebenchError, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    say(f"error: {error.what}")
    for line in (error.where, error.fix):
        if line:
            say(f"  {line}")
    raise typer.Exit(error.exit_code)


def _bug(error: Exception, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    say(f"error: {type(error).__name__}: {error}")
    say("  this is a bug of prunebench or of a plug-in")
    say("  please report it with the output of the same command and --debug")
    raise typer.Exit(1) from None


def _is_of_transformers(error: ImportError) -> bool:
    """Whether transformers raised it: it asks so for a package that a model needs."""
    # the innermost frame is the one that raised
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return bool(frames) and str(frames[-1]).partition(".")[0] == "transformers"


def _missing_package(error: ImportError) -> PrunebenchError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return MissingResource(
        "this model needs a package that is not installed",
        where=f"transformers says: {first[:200]}",
        fix="install the package that it names, or choose another model",
    )


def _os_error(error: OSError) -> PrunebenchError:
    place = error.filename or "a file"
    return SaveError(
        f"cannot use {place}",
        where=error.strerror or str(error),
        fix="check the path, its permissions, and the free space",
    )
