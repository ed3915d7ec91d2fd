"""Places for copies, behind six verbs: put, get, list, exists, delete, discard_unfinished.

    local    a folder, the simplest mirror; written through `files`, so it survives what a run directory survives
    s3 gcs azure, any fsspec protocol      `FsspecStorage`
    hf       a repository on the hub, one commit a checkpoint: `hub.HubStorage`

Keys are relative, with `/` between names. Credentials come from each provider's usual chain (environment, profile,
login) and from nowhere else: a `remote_path` that carries some is refused, and is not repeated in the message.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from trietune.errors import UserError
from trietune.io import files
from trietune.io.json_types import JsonMapping, JsonObject

PROTOCOLS = {"s3": "s3", "gcs": "gcs", "azure": "abfs"}
_PACKAGES = {"s3": "s3fs", "gcs": "gcsfs", "gs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 30


class Storage(Protocol):
    """Keys and bytes in one place. Errors are those of the library behind it; `retry` knows which pass.

    `location` may be shown to anybody. `is_atomic` says that one `put` or `delete` of many keys happens all at once.
    """

    location: str
    is_atomic: bool

    def put(self, sources: Sequence[tuple[str, Path]]) -> None:
        """Copy files to keys, in this order, over what is there."""
        ...

    def get(self, key: str, max_bytes: int) -> bytes:
        """The first `max_bytes` of a key. Raises FileNotFoundError."""
        ...

    def list(self, prefix: str) -> dict[str, int]:
        """Each key below `prefix/` with its size in bytes; never from a cache."""
        ...

    def exists(self, key: str) -> bool: ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove keys, in this order; those that are gone already are not an error."""
        ...

    def discard_unfinished(self, prefix: str) -> int:
        """Drop what killed uploads left invisible below `prefix`, where a store has such a thing; how many."""
        ...


class FolderStorage:
    """A folder on this machine or on a mounted one; each file is whole or absent there too."""

    is_atomic = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def put(self, sources: Sequence[tuple[str, Path]]) -> None:
        for key, source in sources:
            target = self._path(key)
            files.make_folders(target.parent)
            staging = target.with_name(f".staging-{target.name}-{secrets.token_hex(6)}")
            try:
                _copy(source, staging)
                files.rename(staging, target)
            except BaseException:
                files.discard(staging)
                raise
            files.flush_folder(target.parent)

    def get(self, key: str, max_bytes: int) -> bytes:
        with self._path(key).open("rb") as file:
            return file.read(max_bytes)

    def list(self, prefix: str) -> dict[str, int]:
        sizes = {}
        for folder, _, names in os.walk(self._path(prefix)):
            for name in names:
                path = Path(folder) / name
                if not name.startswith(".staging-") and path.is_file():
                    sizes[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return sizes

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            path = self._path(key)
            if path.is_file():
                files.remove_file(path)
                files.flush_folder(path.parent)
        for folder in {self._path(key).parent for key in keys}:
            if folder.is_dir() and not any(folder.iterdir()):
                files.remove_folder(folder)

    def discard_unfinished(self, prefix: str) -> int:
        leftovers = [
            Path(folder) / name
            for folder, _, names in os.walk(self._path(prefix))
            for name in names
            if re.fullmatch(r"\.staging-.+-[0-9a-f]{12}", name)
        ]
        for path in leftovers:
            files.remove_file(path)
        return len(leftovers)

    def _path(self, key: str) -> Path:
        _check_key(key)
        return self.root / key


class FsspecStorage:
    """Any protocol that fsspec knows; its caches and its own retries are off, so ours are the only ones."""

    is_atomic = False

    def __init__(self, protocol: str, remote_path: str, options: JsonMapping | None = None) -> None:
        self.protocol = protocol
        self.root = re.sub(r"^[a-z0-9+.-]+://", "", remote_path).strip("/")
        self.location = f"{protocol}://{self.root}"
        self._options = dict(options or {})
        self._opened: object = None

    def put(self, sources: Sequence[tuple[str, Path]]) -> None:
        for key, source in sources:
            if self.protocol not in _PACKAGES:  # object stores have no folders to make
                self._system.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)
            self._system.put_file(str(source), self._path(key))

    def get(self, key: str, max_bytes: int) -> bytes:
        with self._system.open(self._path(key), "rb", cache_type="none") as file:
            data = file.read(max_bytes)
        return bytes(data)

    def list(self, prefix: str) -> dict[str, int]:
        _check_key(prefix)
        self._system.invalidate_cache()
        try:
            found = self._system.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        skipped = len(self.root) + 1
        return {
            path.lstrip("/")[skipped:]: int(entry["size"] or 0)
            for path, entry in found.items()
            if entry.get("type") == "file" and path.lstrip("/").startswith(f"{self.root}/")
        }

    def exists(self, key: str) -> bool:
        self._system.invalidate_cache()
        return bool(self._system.exists(self._path(key)))

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                self._system.rm_file(self._path(key))
            except FileNotFoundError:
                continue

    def discard_unfinished(self, prefix: str) -> int:
        if self.protocol != "s3":
            return 0  # elsewhere the provider drops them after a week by itself
        bucket, _, start = self._path(prefix).partition("/")
        leftovers = [
            upload for upload in self._system.list_multipart_uploads(bucket) if upload["Key"].startswith(f"{start}/")
        ]
        for upload in leftovers:
            self._system.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        return len(leftovers)

    def _path(self, key: str) -> str:
        _check_key(key)
        return f"{self.root}/{key}"

    @property
    def _system(self) -> Any:
        if self._opened is None:
            self._opened = _open_system(self.protocol, self._options)
        return self._opened


def _open_system(protocol: str, options: JsonMapping) -> Any:
    package = _PACKAGES.get(protocol)
    try:
        import fsspec

        if package:
            importlib.import_module(package)
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        needed = package or f"the package for {protocol}"
        raise UserError(
            f"`storage_backend: {protocol}` needs {needed}, which is not installed", next_step=f"pip install {needed}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"`storage_backend: {protocol}` is unknown",
            next_step="storage_backend: local, s3, gcs, azure, hf, or a protocol that fsspec knows",
        ) from error
    settings: JsonObject = {"skip_instance_cache": True, "use_listings_cache": False, **options}
    if protocol == "s3":
        settings["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            **settings.get("config_kwargs", {}),
        }
    if protocol in ("abfs", "az"):
        settings = {"connection_timeout": _CONNECT_TIMEOUT_S, "read_timeout": _READ_TIMEOUT_S, **settings}
    system = kind(**settings)
    if protocol == "s3":
        system.retries = 1
    return system


def _copy(source: Path, target: Path) -> None:
    descriptor = files.create_file(target)
    try:
        with source.open("rb") as file:
            while piece := file.read(4 * 2**20):
                files.write(descriptor, piece)
        files.flush(descriptor)
    finally:
        files.close(descriptor)


def _check_key(key: str) -> None:
    if not key or any(part in ("", ".", "..") for part in key.split("/")) or "\x00" in key:
        raise ValueError(f"{key!r} is not a key")


def refuse_credentials(remote_path: str) -> None:
    # Secrets are pasted as they are, slashes included, with a scheme, half of one, or none: a colon before the last
    # `@`, other than that of `scheme://`, stands between a name and a password.
    user_info, at, _ = re.sub(r"^\s*[a-z][a-z0-9+.-]*://", "", remote_path, flags=re.IGNORECASE).rpartition("@")
    carries = (at and (":" in user_info or _looks_random(user_info))) or re.search(
        r"[?&;](sig|token|key|secret|password|x-amz)", remote_path, re.I
    )
    if carries:
        raise UserError(
            "`remote_path` carries a password, a key or a signature",
            where="it would be written into config files and logs",
            next_step="leave it out, and log in by the provider's own means: environment, profile, or login command",
        )


def _looks_random(text: str) -> bool:
    kinds = (str.isupper, str.islower, str.isdigit)
    return len(text) >= 20 and all(any(is_kind(char) for char in text) for is_kind in kinds)


def names_below(keys: Iterable[str], prefix: str) -> dict[str, list[str]]:
    """Keys grouped by their first name below `prefix/`: `a/x/1`, `a/x/2` below `a` give `{"x": ["1", "2"]}`."""
    groups: dict[str, list[str]] = {}
    for key in sorted(keys):
        name, separator, rest = key.removeprefix(f"{prefix}/").partition("/")
        if separator and key.startswith(f"{prefix}/"):
            groups.setdefault(name, []).append(rest)
    return groups
