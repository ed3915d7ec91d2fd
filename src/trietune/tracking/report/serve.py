"""The report of runs that are still going, on this machine's own address only.

One path is answered, with the page as the files are now; while a run is in progress the browser asks again by itself. A
page of the web that a browser has open could ask too, under a name that points here: so the name that was asked for
must be this machine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from trietune.errors import UserError
from trietune.tracking.report.record import read_run
from trietune.tracking.report.report import render_page

LOOPBACK = "127.0.0.1"
_OWN_NAMES = ("127.0.0.1", "localhost")
REFRESH_S = 5


def serve_report(
    run_directories: Sequence[Path], *, port: int = 0, say: Callable[[str], None] = lambda text: None
) -> ThreadingHTTPServer:
    """A server of the page, bound and not yet running: call `serve_forever`.

    Args:
        port: 0 takes a free one.
        say: gets the address.

    Raises:
        UserError: a folder without a run, or a port that is taken.
    """
    for directory in run_directories:
        read_run(directory)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, run_directories)

        def log_message(self, *_: object) -> None:
            return

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be used: {error}", next_step="--port 0, which picks a free one") from error
    say(f"http://{LOOPBACK}:{server.server_address[1]}/")
    return server


def _answer(request: BaseHTTPRequestHandler, run_directories: Sequence[Path]) -> None:
    name = (request.headers.get("Host") or "").rpartition(":")[0] or (request.headers.get("Host") or "")
    if name not in _OWN_NAMES:
        _send(request, 421, "text/plain", b"this report is read on its own machine")
        return
    if request.path != "/":
        _send(request, 404, "text/plain", b"there is one page: /")
        return
    try:
        runs = [read_run(directory) for directory in run_directories]
    except (UserError, OSError) as error:
        _send(request, 503, "text/plain; charset=utf-8", str(error).encode())
        return
    is_going = any(run.status == "running" for run in runs)
    _send(request, 200, "text/html; charset=utf-8", render_page(runs).encode(), refresh=is_going)


def _send(request: BaseHTTPRequestHandler, status: int, kind: str, body: bytes, *, refresh: bool = False) -> None:
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body)))
    request.send_header("Cache-Control", "no-store")
    request.send_header("X-Content-Type-Options", "nosniff")
    if refresh:
        request.send_header("Refresh", str(REFRESH_S))
    request.end_headers()
    request.wfile.write(body)
