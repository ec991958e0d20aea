"""The Hugging Face hub: timeouts, errors, reachability, and pushing.

Every call of huggingface_hub goes through `asking`, which turns any failure into an error of three
lines. Files are downloaded in `hub_files`.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from prunebench.errors import MissingResource, PrunebenchError
from prunebench.files import explain_os_error

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without a byte
WRITTEN_SECONDS = 300.0  # for the answer to an upload: the hub takes long for a large commit
PAUSES_SECONDS = (1.0, 3.0)  # before each retry
MAX_WAIT_SECONDS = 60  # longest `Retry-After` to follow; a longer one is an error

_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO,
}  # fmt: skip
_T = TypeVar("_T")


@functools.cache
def limit_times() -> None:
    """Set a timeout for every request of huggingface_hub; most of them have none.

    A default timeout of the client is not enough: many calls pass `timeout=None`. The storage
    backend hf_xet has timeouts of five minutes, and reads others from the environment.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        session = default_client_factory()
        hooks = session.event_hooks
        session.event_hooks = {
            "request": [*hooks["request"], _limit],
            "response": [*hooks["response"], _refuse_long_waits],
        }
        return session

    set_client_factory(client)
    os.environ.setdefault("HF_XET_CLIENT_CONNECT_TIMEOUT", f"{CONNECT_SECONDS:.0f}s")
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{2 * READ_SECONDS:.0f}s")


def _limit(request: Any) -> None:
    """Lower the timeouts of a request to ours; the environment may raise them."""
    from huggingface_hub import constants

    silence = WRITTEN_SECONDS if request.method in ("POST", "PUT") else READ_SECONDS
    longest = max(silence, constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)
    timeouts = request.extensions.get("timeout") or {}
    limits = {"connect": CONNECT_SECONDS, "read": longest, "write": longest, "pool": longest}
    # None means no timeout.
    request.extensions["timeout"] = {
        name: min(timeouts.get(name) or limit, limit) for name, limit in limits.items()
    }


def _refuse_long_waits(response: Any) -> None:
    """Raise if the hub asks to wait for minutes: huggingface_hub would wait, five times."""
    from huggingface_hub.utils._http import hf_raise_for_status

    seconds = response.headers.get("Retry-After", "")
    if response.status_code in (429, 503) and seconds.isdigit() and int(seconds) > MAX_WAIT_SECONDS:
        # A hook is called before the body is read, and the error quotes it.
        response.read()
        hf_raise_for_status(response)


@functools.cache
def hub_problem() -> str:
    """Return why the hub does not answer, or "" if it does; asked once per process."""
    from huggingface_hub import constants, get_session

    limit_times()
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except hub_errors() as error:
        return failure_reason(error, "", None)[0]
    return ""


def hub_reachable() -> bool:
    """Return whether the hub answers."""
    return not hub_problem()


@functools.cache
def hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub and its storage backend raise for network and hub failures.

    Most are subclasses of the errors of its HTTP library, which differs between its versions;
    hf_xet raises RuntimeError for every failure.
    """
    from huggingface_hub import errors as hub

    names = (
        "HFValidationError",
        "EntryNotFoundError",
        "XetDownloadError",
        "RevisionResolutionError",
    )
    errors = (getattr(hub, name) for name in names if hasattr(hub, name))
    http = _http_library()
    return (OSError, RuntimeError, json.JSONDecodeError, http.HTTPError, http.InvalidURL, *errors)


@contextmanager
def asking(what: str, *, fix: str, revision: str | None = None) -> Iterator[None]:
    """Convert any failure of the hub in the `with` block to an error with its cause and a fix.

    Args:
        what: What is downloaded: a repository, or a repository and a file.
        fix: What to do without the hub; used if the cause has no fix of its own.
        revision: The revision that was requested, if any.

    Raises:
        MissingResource: It cannot be downloaded.
        SaveError: The cache of huggingface_hub cannot be written.
    """
    limit_times()
    try:
        yield
    except PrunebenchError:
        raise
    except hub_errors() as error:
        raise hub_failure(what, error, fix=fix, revision=revision) from error


def patiently(call: Callable[[], _T]) -> _T:
    """Call, and retry after a pause if the connection was cut or the hub failed (status >= 500)."""
    for seconds in PAUSES_SECONDS:
        try:
            return call()
        except hub_errors() as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            cut = _is(error, "RemoteProtocolError") or _is(error, "ReadError")
            if not cut and status < 500:
                raise
            time.sleep(seconds)
    return call()


def hub_failure(
    what: str, error: Exception, *, fix: str, revision: str | None = None
) -> PrunebenchError:
    """Return the error to raise for one of `hub_errors`, with its cause and a fix; see `asking`."""
    root = _root(error)
    number = _disk_errno(root)
    # A full or read-only disk is not a failure of the hub, and needs other advice.
    if number:
        from huggingface_hub import constants

        place = Path(getattr(root, "filename", None) or constants.HF_HUB_CACHE)
        return explain_os_error(OSError(number, os.strerror(number)), place)
    where, advice = failure_reason(error, what, revision)
    return MissingResource(f"{what} cannot be downloaded", where=where, fix=advice or fix)


def hub_error_under(error: BaseException) -> Exception | None:
    """Return the hub response or connection failure that caused an error, or None."""
    deepest = None
    below: BaseException | None = error
    # The deepest one is the cause; those above it only wrap it.
    while below is not None:
        answered = getattr(below, "response", None) is not None
        if isinstance(below, Exception) and (answered or _is(below, "TransportError")):
            deepest = below
        below = below.__cause__ or below.__context__
    return deepest


def _disk_errno(error: BaseException) -> int:
    """Return the errno of a disk error, or 0 for other errors."""
    match = re.search(r"\(os error (\d+)\)", str(error))  # of libraries in Rust
    number = getattr(error, "errno", None) or (int(match[1]) if match else 0)
    return number if number in _DISK_ERRORS else 0


def _root(error: BaseException) -> BaseException:
    """Return the cause inside the errors of huggingface_hub that hide it ("not in the cache")."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    wrappers = LocalEntryNotFoundError | ValueError | RuntimeError
    while error.__cause__ is not None and isinstance(error, wrappers):
        error = error.__cause__
    return error


def _is(error: BaseException, name: str) -> bool:
    """Return whether an error is the named one of the HTTP library of huggingface_hub."""
    kind = getattr(_http_library(), name, None)
    return kind is not None and isinstance(error, kind)


def _http_library() -> Any:
    """Return the HTTP library of huggingface_hub: httpx, or its successor."""
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub's error inherits from that of the library, whichever it is.
    return sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def failure_reason(error: BaseException, what: str, revision: str | None) -> tuple[str, str]:
    """Return the cause of a failure, and its fix; "" if there is only the way without the hub."""
    from huggingface_hub.errors import FileMetadataError, HFValidationError, OfflineModeIsEnabled

    root = _root(error)
    response = getattr(root, "response", None)
    if response is not None:
        return _answer(response, what, revision)
    if isinstance(root, OfflineModeIsEnabled):
        return "the hub cannot be reached: HF_HUB_OFFLINE is set", ""
    if isinstance(root, HFValidationError):
        return first_line(root), "check the spelling"
    text = " ".join(filter(None, (str(root), str(root.__cause__ or root.__context__ or ""))))
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            f"the hub's certificate cannot be verified: {first_line(root)}",
            "name the certificates of your network's proxy in SSL_CERT_FILE",
        )
    if _is(root, "ConnectTimeout"):
        return f"the hub cannot be reached: no connection within {CONNECT_SECONDS:g} s", ""
    if _is(root, "TimeoutException") or isinstance(root, TimeoutError):
        return "the hub cannot be reached: it accepted the request and did not answer in time", ""
    if _is(root, "ProxyError"):
        return f"the proxy refuses: {first_line(root)}", "check HTTPS_PROXY and NO_PROXY"
    if _is(root, "ConnectError"):
        return f"the hub cannot be reached: {first_line(root)}", ""
    if isinstance(root, json.JSONDecodeError | FileMetadataError):
        return (
            f"what answers at {hub_endpoint()} is not a hub: {first_line(root)}",
            "check HF_ENDPOINT, and whether the network asks for a login of its own",
        )
    if _is(root, "TransportError") or "Consistency check failed" in text:
        return (
            f"the connection to the hub was cut: {first_line(root)}",
            "try again: files that are whole stay",
        )
    if type(root) is RuntimeError or type(root).__name__.startswith("Xet"):
        return f"the hub's storage failed: {first_line(root)}", "try again, or set " + _WITHOUT_XET
    return f"the hub cannot be reached: {first_line(root)}", ""


_WITHOUT_XET = "HF_HUB_DISABLE_XET=1 to fetch it without that storage"


def hub_endpoint() -> str:
    """Return the address of the hub."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _answer(response: Any, what: str, revision: str | None) -> tuple[str, str]:
    """Return the meaning of an error response of the hub (status >= 400), and its fix."""
    from huggingface_hub import get_token

    status, code = int(response.status_code), response.headers.get("X-Error-Code", "")
    says = response.headers.get("X-Error-Message", "").strip().rstrip(".")
    kind = "datasets/" if "/datasets/" in str(response.request.url) else ""
    page, token = f"{hub_endpoint()}/{kind}{what.split(' ')[0]}", get_token()
    if code == "GatedRepo":
        reason = "this login has no access to it yet" if token else "you are not logged in"
        return (
            f"it is gated, and {reason} ({status}): the license is accepted at {page}",
            "accept it there, run hf auth login, and try again; or name a local copy",
        )
    if status == 401 and token and code != "RepoNotFound":
        return (
            f"the hub does not accept the token ({status}: {says or 'unauthorized'})",
            "run hf auth login with a valid one; HF_TOKEN, where it is set, comes first",
        )
    if code == "RevisionNotFound":
        return f"it has no revision {revision or 'main'!r} ({page})", "name another one, or none"
    if code == "EntryNotFound":
        return f"the repository is there, and this file is not in it ({page})", "check the names"
    # Without a login, the hub answers 401 for a repository that does not exist.
    if code == "RepoNotFound" or status in (401, 404):
        return (
            f"it is not on the hub, or is private ({page})",
            "check the spelling, or run hf auth login if it is private",
        )
    if status == 429:
        seconds = response.headers.get("Retry-After", "")
        wait = f"; it asks to wait {seconds} s" if seconds else ""
        return (
            f"the hub limits the rate: too many requests ({status}){wait}",
            "wait and try again; a login has a higher limit (hf auth login)",
        )
    if status == 403:
        return (
            f"the hub forbids it ({status}: {says or 'no reason given'})",
            "use a token that may do it: its permissions are set in the settings of the hub",
        )
    if status >= 500:
        return (
            f"the hub is in trouble ({status} {says or response.reason_phrase})",
            "try again later: nothing is wrong here",
        )
    return f"the hub answered {status} {says or response.reason_phrase}", ""
