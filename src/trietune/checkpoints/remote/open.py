"""The storage that `storage_backend` and `remote_path` name, and a run's copies there."""

from __future__ import annotations

import threading

from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.hub import HubStorage
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.storage import PROTOCOLS, FolderStorage, FsspecStorage, Storage, refuse_credentials
from trietune.errors import UserError
from trietune.io.places import expand


def open_remote(backend: str, remote_path: str | None, run_name: str) -> RemoteRun | None:
    """The copies of the run `run_name` below `remote_path`, or None without such a path. Connects to nothing yet.

    Raises:
        UserError: the backend cannot be used here, or `remote_path` carries credentials.
    """
    if not remote_path:
        return None
    return RemoteRun(open_storage(backend, remote_path), run_name, RetryPolicy(sleep=threading.Event().wait))


def open_storage(backend: str, remote_path: str) -> Storage:
    """The storage that `storage_backend` and `remote_path` name. No connection is made yet. Raises `UserError`."""
    refuse_credentials(remote_path)
    if not remote_path.strip("/ "):
        raise UserError("`remote_path` is empty", next_step="remote_path: my-bucket/runs")
    if backend == "local":
        return FolderStorage(expand(remote_path.removeprefix("file://")))
    if backend == "hf":
        return HubStorage(remote_path)
    return FsspecStorage(PROTOCOLS.get(backend, backend), remote_path)
