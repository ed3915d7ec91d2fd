"""Which failures of a store are worth another attempt, how long to wait, and how to speak of them.

Worth it: status 408, 429 and 5xx, and connections that fail or fall silent. Not worth it: everything else. A missing
right (403) does not come by itself, and a client that asks for ever hides the mistake.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from trietune.io.causes import causes

Result = TypeVar("Result")

_TRANSIENT_STATUS = {408, 429}
_TRANSIENT_ERRNO = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN,
    errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.EPIPE,
}  # fmt: skip
# Every client library has a base class of its own for a connection that failed; by name, so that none is imported.
_CONNECTION_CLASSES = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "botocore.exceptions.HTTPClientError",
    "fsspec.exceptions.FSTimeoutError",
    "httpx.TransportError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.HTTPError",
}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long. Waits double from `first_wait_s` to `longest_wait_s`, each between half and all of it.

    `sleep` is given seconds and returns True to give up at once, as when the run is being stopped.
    """

    sleep: Callable[[float], bool]
    num_attempts: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    randomness: random.Random = field(default_factory=random.Random)

    def wait_s(self, attempt: int, asked_s: float | None = None) -> float:
        """Before the attempt after `attempt` (counted from 1); a `Retry-After` of the store is the least."""
        whole = min(self.longest_wait_s, self.first_wait_s * 2.0 ** (attempt - 1))
        wait = whole * self.randomness.uniform(0.5, 1.0)
        return max(wait, min(asked_s, self.longest_wait_s)) if asked_s else wait


def retry(action: Callable[[], Result], policy: RetryPolicy) -> Result:
    """The result of `action`, tried again after transient failures. Raises the last failure."""
    number = 1
    while True:
        try:
            return action()
        except Exception as error:
            if number >= policy.num_attempts or not is_transient(error):
                raise
            if policy.sleep(policy.wait_s(number, retry_after_s(error))):
                raise
        number += 1


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    for link in causes(error):
        # In this order: a cut answer is a connection that failed, though its cause may call itself a "400".
        if _is_connection_failure(link) or is_wrong_content(link):
            return True
        if (status := _status(link)) is not None:
            return status in _TRANSIENT_STATUS or 500 <= status < 600
    return False


def is_wrong_content(error: BaseException) -> bool:
    """Whether a client library found that bytes on their way differ from the store's own checksum of them."""
    return any("Checksum" in type(link).__name__ for link in causes(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of any client library, or None."""
    return next((status for link in causes(error) if (status := _status(link)) is not None), None)


def _status(link: BaseException) -> int | None:
    response = getattr(link, "response", None)
    candidates = [getattr(link, name, None) for name in ("status_code", "status", "code")]
    if isinstance(response, dict):
        candidates.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    else:
        candidates += [getattr(response, name, None) for name in ("status_code", "status")]
    for candidate in candidates:
        if isinstance(candidate, str) and candidate.isdecimal():
            candidate = int(candidate)
        if isinstance(candidate, int) and 400 <= candidate < 600:
            return candidate
    return None


def retry_after_s(error: BaseException) -> float | None:
    """What the store asked for in `Retry-After`, in seconds; dates are not understood and count as nothing."""
    for link in causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders") or {}
        else:
            headers = getattr(link, "headers", None) or getattr(response, "headers", None) or {}
        for name in ("retry-after", "Retry-After"):
            value = headers.get(name) if hasattr(headers, "get") else None
            if value and str(value).isdecimal():
                return float(value)
    return None


def describe(error: BaseException) -> str:
    """The failure in our own words. The library's text is left out: it may quote URLs and keys."""
    status = None if any(_is_connection_failure(link) for link in causes(error)) else status_of(error)
    if status is not None:
        meaning = {401: "not logged in", 403: "no right", 404: "not found", 429: "too many requests"}.get(status)
        return f"the store answered {status}" + (f" ({meaning})" if meaning else "")
    for link in causes(error):
        if isinstance(link, socket.gaierror):
            return "the store's name could not be resolved"
        if isinstance(link, TimeoutError) or "imeout" in type(link).__name__:
            return "the store did not answer in time"
        if isinstance(link, PermissionError):
            return "no right to do that"
        if isinstance(link, FileNotFoundError):
            return "not found"
        # EIO is the storage libraries' word for "something".
        if isinstance(link, OSError) and link.errno and link.errno != errno.EIO:
            return os.strerror(link.errno)
    names = [type(link).__name__ for link in causes(error)]
    if "NoCredentialsError" in names or "DefaultCredentialsError" in names:
        return "no credentials were found"
    return "the connection failed" if is_transient(error) else f"{names[-1]}"


def _is_connection_failure(error: BaseException) -> bool:
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return bool(names & _CONNECTION_CLASSES)
