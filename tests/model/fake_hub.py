"""A hub on loopback: repositories in memory, answered as the real one answers the three requests that we make.

    GET       /api/models/{id}[/revision/{rev}]     what files a revision has, and the commit it stands for
    GET       /api/models/{id}/tree/{commit}        the same with sizes
    HEAD, GET /{id}/resolve/{rev}/{file}            the file

A repository may be gated, the whole hub may be out of order, and every request is kept with its headers.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

COMMIT = "5c1a" * 10


@dataclass
class Repository:
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    commit: str = COMMIT
    needs_token: str | None = None
    # Sizes to claim instead of the real ones: a model that is too large for any disk.
    claimed_sizes: dict[str, int] = field(default_factory=dict)


@dataclass
class FakeHub:
    server: HTTPServer
    repositories: dict[str, Repository] = field(default_factory=dict)
    broken_with: int | None = None
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server.expect_request(re.compile(".*")).respond_with_handler(self.answer)

    def answer(self, request: Request) -> Response:
        self.requests.append(request)
        if self.broken_with:
            return Response("out of order", status=self.broken_with)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", request.path):
            return self._info(match[1], match[2] or "main", request)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", request.path):
            return self._tree(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path):
            return self._file(match[1], match[2], match[3], request)
        return Response(status=404)

    def fetched_files(self) -> set[str]:
        return {
            request.path.split("/resolve/")[1].split("/", 1)[1]
            for request in self.requests
            if "/resolve/" in request.path
        }

    def _info(self, name: str, revision: str, request: Request) -> Response:
        repository = self.repositories.get(name)
        if repository is None:
            # Without a token the real hub does not say whether a repository is private or absent.
            return _refuse(401, "RepoNotFound", "Repository Not Found")
        if revision not in (*repository.revisions, repository.commit):
            return _refuse(404, "RevisionNotFound", "Invalid rev id")
        body = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": repository.commit,
            "private": False,
            "gated": "manual" if repository.needs_token else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [
                {"rfilename": path, "size": repository.claimed_sizes.get(path, len(data)), "blobId": _blob(data)}
                for path, data in repository.files.items()
            ],
        }
        return _json(body)

    def _tree(self, name: str, revision: str) -> Response:
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            for path, data in self.repositories[name].files.items()
        ]
        return _json(entries)

    def _file(self, name: str, revision: str, path: str, request: Request) -> Response:
        repository = self.repositories[name]
        if repository.needs_token and request.headers.get("Authorization") != f"Bearer {repository.needs_token}":
            has_token = "Authorization" in request.headers
            return _refuse(403 if has_token else 401, "GatedRepo", "Access to model is restricted")
        if path not in repository.files:
            return _refuse(404, "EntryNotFound", "Entry not found")
        data = repository.files[path]
        headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(len(data))})
        if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
            return Response(data[int(match[1]) :], status=206, headers=headers)
        return Response(data, headers=headers)


def _json(body: object) -> Response:
    return Response(json.dumps(body), content_type="application/json")


def _refuse(status: int, code: str, message: str) -> Response:
    return Response(status=status, headers={"X-Error-Code": code, "X-Error-Message": message})


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
