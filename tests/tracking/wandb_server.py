"""A W&B server as small as W&B's client lets it be, and the ways in which a real one fails."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

Fault = Literal["none", "500", "hang", "garbage", "500 after health", "hang after health", "hang at upload"]


class WandbServer:
    """Serves on a free port of the loopback interface; `requests` are (path, body) as they came."""

    def __init__(self, fault: Fault = "none") -> None:
        self.fault = fault
        self.requests: list[tuple[str, str]] = []
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8", "replace")
                server.requests.append((self.path, body))
                is_health = self.path == "/healthz"
                fault = server.fault
                if fault == "hang" or (fault == "hang after health" and not is_health):
                    server.released.wait()
                    return
                if fault == "hang at upload" and "file_stream" in self.path:
                    server.released.wait()
                    return
                if fault == "garbage":
                    self.wfile.write(b"220 mail.example.org ready\r\n")
                    self.close_connection = True
                    return
                is_broken = fault == "500" or (fault == "500 after health" and not is_health)
                content = b"{}" if is_broken else json.dumps(server.reply(self.path, body)).encode()
                self.send_response(500 if is_broken else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer  # noqa: N815  (names that the library calls)

        return Handler

    def reply(self, path: str, body: str) -> dict[str, Any]:
        if path != "/graphql":
            return {}
        request = json.loads(body)
        query, variables = request["query"], request.get("variables") or {}
        if "upsertBucket" in query:
            project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "team"}}
            bucket = {"id": "b", "name": variables.get("name"), "displayName": "n", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createArtifact" in query:
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        if "RunResumeStatus" in query:
            return {"data": {"model": {"bucket": None}}}
        return {"data": {}}
