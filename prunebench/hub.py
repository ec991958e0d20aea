"""Whether the Hugging Face hub can be reached, and what to say if it cannot.

Asked once before a download: huggingface_hub would try five times, for half a minute.
"""

from __future__ import annotations

import functools
import os
import urllib.error
import urllib.request

from prunebench.errors import MissingResource

_TIMEOUT_SECONDS = 3.0


@functools.cache
def hub_reachable() -> bool:
    """Return whether the hub answers within three seconds (asked once a process)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises where the network or the hub fails.

    Its own errors descend from those of its HTTP library, whose name changes with its version.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def require_hub(what: str, *, fix: str) -> None:
    """Raise `MissingResource` unless the hub answers."""
    if not hub_reachable():
        raise unreachable(what, None, fix=fix)


def unreachable(what: str, error: Exception | None, *, fix: str) -> MissingResource:
    """Return the error for something that cannot be downloaded."""
    reason = f": {str(error).splitlines()[0][:160]}" if error and str(error) else ""
    return MissingResource(
        f"{what} cannot be downloaded", where=f"the hub cannot be reached{reason}", fix=fix
    )
