"""The storage that a run's settings name, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trietune.checkpoints.remote.copies import RemoteRun
    from trietune.config.settings import Settings


def open_remote(settings: Settings, run_name: str) -> RemoteRun | None:
    """The run's copies below `remote_path`, or None if it has none. No connection is made yet.

    Raises:
        UserError: `storage_backend` cannot be used here.
    """
    if not settings.remote_path:
        return None
    import threading

    from trietune.checkpoints.remote.copies import RemoteRun
    from trietune.checkpoints.remote.retry import Patience
    from trietune.checkpoints.remote.storage import open_storage

    return RemoteRun(
        open_storage(settings.storage_backend, settings.remote_path), run_name, Patience(sleep=threading.Event().wait)
    )
