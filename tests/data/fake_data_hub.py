"""A hub of data sets on loopback: files in memory, answered as the real one answers what `datasets` asks.

GET       /api/datasets/{id}[/revision/{rev}]     the commit that a revision stands for
GET       /api/datasets/{id}/tree/{rev}[/{path}]  which files there are
POST      /api/datasets/{id}/paths-info/{rev}     what some paths are
HEAD, GET /datasets/{id}/resolve/{rev}/{file}     a file
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

COMMIT = "d5a1" * 10


@dataclass
class DataHub:
    server: HTTPServer
    data_sets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken_with: int | None = None
    paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server.expect_request(re.compile(".*")).respond_with_handler(self.answer)

    def answer(self, request: Request) -> Response:
        self.paths.append(f"{request.method} {request.path}")
        if self.broken_with:
            return Response("out of order", status=self.broken_with)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", request.path):
            return self._info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", request.path):
            return self._tree(match[1], match[3] or "", recursive=request.args.get("recursive", "false") == "true")
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", request.path):
            wanted = request.get_json()["paths"] if request.is_json else request.form.getlist("paths")
            return self._paths_info(match[1], wanted)
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path):
            return self._file(match[1], match[3], request)
        return Response(status=404)

    def _info(self, name: str, revision: str) -> Response:
        if name not in self.data_sets:
            return refuse(401, "RepoNotFound", "Repository Not Found")
        if revision not in ("main", COMMIT):
            return refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in self.data_sets[name]]
        body = {"_id": "1", "id": name, "sha": COMMIT, "private": False, "gated": False, "tags": [], "downloads": 0}
        return as_json({**body, "likes": 0, "siblings": siblings})

    def _tree(self, name: str, folder: str, *, recursive: bool) -> Response:
        files = self.data_sets[name]
        inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            return refuse(404, "EntryNotFound", "Entry not found")
        entries = []
        for path, data in inside.items():
            rest = path[len(folder) + 1 if folder else 0 :]
            if recursive or "/" not in rest:
                entries.append(describe(path, data))
        folders = {path.rsplit("/", 1)[0] for path in inside if "/" in path and path.rsplit("/", 1)[0] != folder}
        return as_json([*entries, *({"type": "directory", "path": path, "size": 0, "oid": "0"} for path in folders)])

    def _paths_info(self, name: str, wanted: list[str]) -> Response:
        files = self.data_sets[name]
        entries = [describe(path, files[path]) for path in wanted if path in files]
        for path in wanted:
            if any(one.startswith(f"{path}/") for one in files):
                entries.append({"type": "directory", "path": path, "size": 0, "oid": "0"})
        return as_json(entries)

    def _file(self, name: str, path: str, request: Request) -> Response:
        if name not in self.data_sets:
            return refuse(401, "RepoNotFound", "Repository Not Found")
        if name in self.gated:
            return refuse(401, "GatedRepo", "Access to dataset is restricted")
        data = self.data_sets[name].get(path)
        if data is None:
            return Response(
                status=404,
                headers={"X-Error-Code": "EntryNotFound", "X-Error-Message": "no", "X-Repo-Commit": COMMIT},
            )
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(len(data))})
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            return Response(data[int(match[1]) : int(match[2]) + 1 if match[2] else None], status=206, headers=headers)
        return Response(data, headers=headers)


def describe(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": digest(data)}


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def as_json(body: object) -> Response:
    return Response(json.dumps(body), content_type="application/json")


def refuse(status: int, code: str, message: str) -> Response:
    return Response(status=status, headers={"X-Error-Code": code, "X-Error-Message": message})
