"""Enough of the Hugging Face hub to hold repositories: commits with inline files, listings, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class FakeHub:
    """`repositories` are {id: {path: bytes}}; `commits` lists the changed paths of each commit."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[list[str]] = []
        self.requests: list[str] = []
        self.answer_first: Callable[[str, str], int | None] = lambda method, path: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                hub.handle(self)

            do_GET = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        if status := self.answer_first(request.command, path):
            _send(request, status, b"{}")
        elif path == "/api/repos/create":
            name = json.loads(body)
            repo_id = f"{name.get('organization') or 'me'}/{name['name']}"
            self.repositories.setdefault(repo_id, {})
            if name.get("private") or name.get("visibility") == "private":
                self.private.add(repo_id)
            _send_json(request, {"url": f"{self.url}/{repo_id}", "name": repo_id})
        elif path == "/api/validate-yaml":
            _send_json(request, {"errors": [], "warnings": []})
        elif path.startswith("/api/models/"):
            self._api(request, path.removeprefix("/api/models/"), body)
        else:
            self._resolve(request, path)

    def _api(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        parts = path.split("/")
        repo_id, verb, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", "/".join(parts[4:])
        if repo_id not in self.repositories:
            _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        repository = self.repositories[repo_id]
        if verb == "preupload":
            wanted = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            _send_json(request, {"files": wanted})
        elif verb == "commit":
            self.commits.append(_apply(repository, body))
            _send_json(request, {"commitUrl": f"{self.url}/{repo_id}/commit/abc", "commitOid": "a" * 40})
        elif verb == "tree":
            entries = [_entry(name, data) for name, data in sorted(repository.items()) if _is_below(name, rest)]
            if entries or not rest:
                _send_json(request, entries)
            else:
                _send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif verb == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else []
            found = [_entry(name, repository[name]) for name in paths if name in repository]
            folders = [name for name in paths if name not in repository and any(_is_below(f, name) for f in repository)]
            _send_json(
                request, found + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
            )
        else:
            _send_json(request, {"id": repo_id, "modelId": repo_id, "sha": "a" * 40, "siblings": [], "private": True})

    def _resolve(self, request: BaseHTTPRequestHandler, path: str) -> None:
        repo_id, _, rest = path.lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        data = self.repositories.get(repo_id, {}).get(name)
        if data is None:
            _send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "a" * 40}
        wanted = request.headers.get("Range", "")
        if wanted.startswith("bytes="):
            begin, _, end = wanted[6:].partition("-")
            part = data[int(begin) : int(end) + 1 if end else None]
            headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(data)}"
            _send(request, 206, part, headers)
        else:
            _send(request, 200, data, headers)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def _apply(repository: dict[str, bytes], body: bytes) -> list[str]:
    changed = []
    for line in body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            repository[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "deletedFile":
            del repository[value["path"]]
        else:
            continue
        changed.append(value["path"])
    return changed


def _is_below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _send_json(request: BaseHTTPRequestHandler, document: Any) -> None:
    _send(request, 200, json.dumps(document).encode(), {"Content-Type": "application/json"})


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
