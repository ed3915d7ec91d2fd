"""A man in the middle between a storage client and a storage server, who counts, refuses, cuts, waits and lies."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What happens to one request. Without any of these it is passed on and its answer passed back.

    Attributes:
        status: answered at once, with `headers`; the server never hears of the request.
        before, after: called before the request is passed on, and after the server has carried it out.
        drop: the connection is closed without an answer; with `after_bytes`, in the middle of the answer.
        change: what becomes of the answer's body.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None
    drop: bool = False
    after_bytes: int = 0
    change: Callable[[bytes], bytes] | None = None


Rule = Callable[[int, str, str], Fault | None]


class Proxy:
    """Passes requests on to `target`, a port on this machine; `rule(number, method, path)` chooses a fault for each."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.rule: Rule = lambda number, method, path: None
        self.requests: list[tuple[str, str]] = []
        self.num_faults = 0
        self._guard = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                return  # clients that were killed leave broken pipes behind

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def forget(self) -> None:
        """Start counting anew, without any rule."""
        self.rule = lambda number, method, path: None
        self.requests.clear()
        self.num_faults = 0

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = _read_body(request)
        with self._guard:
            self.requests.append((request.command, request.path))
            fault = self.rule(len(self.requests), request.command, request.path) or Fault()
            self.num_faults += fault != Fault()
        if fault.before:
            fault.before()
        if fault.status is not None:
            _answer(request, fault.status, fault.headers, b"")
            return
        if fault.drop and not fault.after_bytes:
            request.close_connection = True
            return
        status, headers, answer = self._pass_on(request, body)
        if fault.after:
            fault.after()
        if fault.change:
            answer = fault.change(answer)
        if fault.drop:
            request.wfile.write(_head(status, headers, len(answer)) + answer[: fault.after_bytes])
            request.close_connection = True
            return
        _answer(request, status, headers, answer)

    def _pass_on(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.target, timeout=30)
        headers = {
            name: value for name, value in request.headers.items()
            if name.lower() not in ("transfer-encoding", "expect", "connection", "content-length")
        }  # fmt: skip
        server.request(request.command, request.path, body, headers)
        response = server.getresponse()
        answer = response.read()
        kept = {
            name: value for name, value in response.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "date", "server")
            and (name.lower() != "content-length" or request.command == "HEAD")
        }  # fmt: skip
        server.close()
        return response.status, kept, answer


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()


def _read_body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in request.headers.get("Transfer-Encoding", ""):
        body = b""
        while size := int(request.rfile.readline().split(b";")[0], 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        while request.rfile.readline().strip():
            continue
        return body
    return request.rfile.read(int(request.headers.get("Content-Length", 0)))


def _head(status: int, headers: dict[str, str], length: int) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
    if not any(name.lower() == "content-length" for name in headers):
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _answer(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
    request.wfile.write(_head(status, headers, len(body)) + (b"" if request.command == "HEAD" else body))
