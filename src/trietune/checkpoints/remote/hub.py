"""Copies in a repository on the Hugging Face hub: one commit a checkpoint, so there it is whole or absent by itself.

`remote_path` is `owner/name` or `owner/name/folder`, with `datasets/` before it for a data set repository. A
repository that does not exist yet is created, private.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trietune.checkpoints.remote.retry import status_of
from trietune.checkpoints.remote.storage import FsspecStorage
from trietune.errors import UserError


class HubStorage(FsspecStorage):
    """Reads through the hub's file system, writes by commits; the login is that of `hf auth login` or `HF_TOKEN`."""

    is_atomic = True

    def __init__(self, remote_path: str) -> None:
        super().__init__("hf", remote_path)
        names = self.root.split("/")
        self._repo_type = "dataset" if names[0] == "datasets" else "model"
        names = names[1:] if self._repo_type == "dataset" else names
        if len(names) < 2 or not all(names):
            raise UserError(
                f"`remote_path: {remote_path}` does not name a repository",
                next_step="remote_path: my-name/my-adapters",
            )
        self._repo_id = "/".join(names[:2])
        self._folder = "/".join(names[2:])

    def put(self, sources: Sequence[tuple[str, Path]]) -> None:
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(self._in_repository(key), str(path)) for key, path in sources]
        message = f"Add {sources[-1][0].rpartition('/')[0]}"
        try:
            self._commit(operations, message)
        except Exception as error:
            if status_of(error) != 404:
                raise
            self._hub.create_repo(self._repo_id, repo_type=self._repo_type, private=True, exist_ok=True)
            self._commit(operations, message)

    def delete(self, keys: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        present = [key for key in keys if self.exists(key)]
        if present:
            operations = [CommitOperationDelete(self._in_repository(key)) for key in present]
            self._commit(operations, f"Remove {present[-1].rpartition('/')[0]}")

    def _commit(self, operations: list[Any], message: str) -> None:
        self._hub.create_commit(self._repo_id, operations=operations, commit_message=message, repo_type=self._repo_type)

    def _in_repository(self, key: str) -> str:
        self._path(key)  # refuses keys that leave the folder
        return f"{self._folder}/{key}" if self._folder else key

    @property
    def _hub(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi()
