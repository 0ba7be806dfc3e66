"""JSON over HTTP: retries with growing pauses, a bound on requests in flight, errors that say what was tried."""

from __future__ import annotations

import http.client
import json
import logging
import random
import ssl
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from socket import EAI_AGAIN, gaierror
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from .terminal import printable

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""States of HTTP after which a request is sent again."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds before a request is sent again for the first time, and at most; each time twice as many."""

MOST_SHOWN = 300
"""Characters of an answer that an error shows."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts that no proxy is asked for."""

_random = random.Random()  # that of training is not to move

logger = logging.getLogger(__name__)


class RefusedError(ValueError):
    """An answer that does not change by asking again: HTTP state `status`, and what the server `said`."""

    def __init__(self, where: str, status: int, said: str) -> None:
        super().__init__(f"{where}: HTTP {status}: {said}")
        self.status, self.said = status, said


class _Fault(Exception):
    """Something that may be over soon: a kind to count, and the seconds that the server asks to wait."""

    def __init__(self, kind: str, said: str = "", wait: float = 0.0) -> None:
        super().__init__(f"{kind}: {said}" if said else kind)
        self.kind, self.wait = kind, wait


class _SameAddress(HTTPRedirectHandler):
    """Follows no redirection, since it would take a key along."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """Asks one server, from threads of its own.

    Parameters
    ----------
    url : str
        ``http://host:port`` or ``https://...``, perhaps with a path, which paths are appended to.
    requests : int
        Most requests in flight.
    timeout : float
        Seconds in which a request must be answered, all of it.
    patience : float
        Seconds, counted from a request's first failure, in which it is sent again: after errors of the connection,
        time-outs, answers that are cut or no JSON, and the states `RETRIED`. Pauses double from `FIRST_PAUSE` to
        `LONGEST_PAUSE`, or are what the server asks for (``Retry-After``).
    key : str, optional
        Sent as ``Authorization: Bearer``; no message shows it.

    Raises ValueError for another kind of url, or numbers out of range. A request raises ConnectionError when patience
    is over, or if there is no such host, and RefusedError for other states.

    The first fault is logged when it is met; `faults` counts them all.
    """

    def __init__(self, url: str, *, requests: int, timeout: float, patience: float, key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _can_be_asked(url):
            raise ValueError(f"url: expected http://host:port or https://host:port, got {url!r}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"url: expected no name, password or query in it, got them for {parts.hostname}")
        if requests < 1:
            raise ValueError(f"requests: expected at least 1, got {requests}")
        for name, seconds, low in (("timeout", timeout, 1e-3), ("patience", patience, 0.0)):
            if not low <= seconds < float("inf"):
                raise ValueError(f"{name}: expected seconds, at least {low:g}, got {seconds}")
        if key is not None and not (key.isascii() and key.isprintable() and key):
            raise ValueError("key: expected printable ASCII characters")
        self.url = url.rstrip("/")
        self.timeout, self.patience = timeout, patience
        self.faults: Counter[str] = Counter()
        self._key = key
        self._lock = threading.Lock()
        proxies = [ProxyHandler({})] if parts.hostname in LOOPBACK else []
        self._opener: OpenerDirector = build_opener(_SameAddress, *proxies)
        self._threads = _Threads(requests)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """A function's result, from one of the threads, at most `requests` of which are at work."""
        return self._threads.submit(function, *arguments)

    def call(self, path: str, content: Mapping[str, Any] | None = None, is_json: bool = True) -> Any:
        """The JSON that the server answers with, to a GET or to a POST of `content`; if not `is_json`, maybe text."""
        data = None if content is None else json.dumps(content).encode()
        failed, tries, pause = 0.0, 0, FIRST_PAUSE
        while True:
            tries += 1
            try:
                return self._once(path, data, is_json)
            except _Fault as fault:
                now = time.monotonic()
                failed = failed or now
                left = failed + self.patience - now
                if left <= 0:
                    raise ConnectionError(
                        f"{self.url}{path}: no usable answer (tries: {tries}, over {now - failed:.0f} s); the last: "
                        f"{fault}"
                    ) from fault
                self._count(fault)
                wait = max(fault.wait, pause * _random.uniform(0.5, 1.0))
            time.sleep(min(wait, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _count(self, fault: _Fault) -> None:
        with self._lock:
            is_first = not self.faults
            self.faults[fault.kind] += 1
        if is_first:
            message = "%s: %s; requests are sent again for up to %g s each, further failures are counted"
            logger.warning(message, self.url, fault, self.patience)

    def _once(self, path: str, data: bytes | None, is_json: bool) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        where = f"{self.url}{path}"
        try:
            body = self._read(Request(where, data, headers))
        except HTTPError as error:
            raise self._refusal(where, error) from error
        except URLError as error:
            unknown = isinstance(error.reason, gaierror) and error.reason.errno != EAI_AGAIN
            if unknown or isinstance(error.reason, ssl.SSLCertVerificationError):
                raise ConnectionError(f"{where}: {error.reason}") from error
            raise _Fault(_kind(error.reason), str(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Fault(_kind(error), str(error)) from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            if not is_json:
                return body.decode("utf-8", "replace")
            raise _Fault("answers that are no JSON", self._shown(body)) from error

    def _read(self, request: Request) -> bytes:
        deadline = time.monotonic() + self.timeout
        with self._opener.open(request, timeout=self.timeout) as answer:
            parts = []
            while part := answer.read1(1 << 20):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {self.timeout:g} s")
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
        return b"".join(parts)

    def _refusal(self, where: str, error: HTTPError) -> Exception:
        body = b""
        with error, suppress(OSError, http.client.HTTPException):
            body = error.read()
        said = self._shown(_message(body))
        if error.code in RETRIED:
            return _Fault(f"HTTP {error.code}", said, _retry_after(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            said = f"{said}; {'no key was' if self._key is None else 'another key must be'} given"
        if place := error.headers.get("Location"):
            said = f"it sends us to {self._shown(place.encode())}; give that as url"
        return RefusedError(where, error.code, said)

    def _shown(self, text: bytes) -> str:
        said = text.decode("utf-8", "replace")
        said = said if self._key is None else said.replace(self._key, "...")
        return printable(" ".join(said.split())[:MOST_SHOWN]) or "nothing said"


def _can_be_asked(url: str) -> bool:
    try:
        urlsplit(url).port  # noqa: B018, which looks at it
    except ValueError:
        return False
    return url.isascii() and url.isprintable() and " " not in url


def _kind(error: Any) -> str:
    kinds: list[tuple[Any, str]] = [
        (TimeoutError, "time-outs"), (ConnectionRefusedError, "connections refused"),
        (http.client.IncompleteRead, "answers cut short"), (ConnectionError, "connections lost"),
    ]  # fmt: skip
    return next((name for kind, name in kinds if isinstance(error, kind)), type(error).__name__)


def _message(body: bytes) -> bytes:
    """What an error says in words, by OpenAI's form or the common ones."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return body
    for name in ("error", "message", "detail"):
        said = said.get(name, said) if isinstance(said, dict) else said
    return said.encode() if isinstance(said, str) else json.dumps(said).encode()


def _retry_after(value: str | None) -> float:
    """Seconds that a header asks to wait, given as such or as a date."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


class _Threads:
    """Threads that nothing waits for at exit, so that a run which is stopped does not wait for a server.

    If one raises, whatever is queued fails with the same error, since the run is about to stop; what is submitted
    afterwards does not.
    """

    def __init__(self, count: int) -> None:
        self.count, self._started = count, 0
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._failures: list[BaseException] = []
        weakref.finalize(self, _dismiss, self._queue, count)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self._failures:
            self._failures = []
        self._queue.put((future, self._failures, function, arguments))
        if self._started < self.count:
            try:
                threading.Thread(target=_work, args=(self._queue,), name="xtoken-client", daemon=True).start()
                self._started += 1
            except RuntimeError:  # the system refuses it
                if not self._started:
                    raise
        return future


def _dismiss(queue: SimpleQueue[Any], count: int) -> None:
    for _ in range(count):
        queue.put(None)


def _work(queue: SimpleQueue[Any]) -> None:
    while (task := queue.get()) is not None:
        future, failures, function, arguments = task
        if failures:
            future.set_exception(failures[0])
        else:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                failures.append(error)
                future.set_exception(error)
        del task, future, failures, function, arguments  # what nobody waits for may go
