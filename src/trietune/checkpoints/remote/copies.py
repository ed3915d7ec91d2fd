"""One run's copies in a storage: upload, list, download, retain.

    <remote_path>/<run name>/checkpoints/step-00000050/...     as on disk
                             adapter/...

The payload goes first, sizes are checked, the manifest goes last; a removal takes the manifest first. So a manifest
that can be seen implies its payload, whatever was cut off when. The manifest's run id says whose copy it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trietune.checkpoints.remote import retry as attempts
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.storage import Storage, names_below
from trietune.checkpoints.retention import STEP_NAME, step_name
from trietune.errors import EXIT_RESUME_REFUSED, UserError
from trietune.io import directory, manifest
from trietune.io.directory import DamagedDirectory
from trietune.io.manifest import MANIFEST_NAME, FileEntry, Manifest

Result = TypeVar("Result")

_LONGEST_LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class RemoteCopy:
    """What the storage holds under one `step-*` name; `damage` says why it cannot be used, None when it looks whole."""

    step: int
    manifest: Manifest | None
    keys: Mapping[str, int]
    damage: str | None = None


class UploadDamaged(Exception):  # noqa: N818  (what the store did to the bytes)
    """After an upload the store holds other sizes than were sent; worth another attempt."""

    status_code = 500


class RemoteRun:
    """The copies of the run called `name`, below `remote_path`. Every request is tried again as `policy` says."""

    def __init__(self, storage: Storage, name: str, policy: RetryPolicy) -> None:
        self.storage = storage
        self.name = name
        self.policy = policy

    @property
    def location(self) -> str:
        return f"{self.storage.location}/{self.name}"

    def scan(self) -> list[RemoteCopy]:
        """Every `step-*` that has any key, oldest first. Asks for one listing and each manifest."""
        prefix = f"{self.name}/checkpoints"
        sizes = self._try(lambda: self.storage.list(prefix))
        copies = []
        for folder, names in names_below(sizes, prefix).items():
            match = STEP_NAME.fullmatch(folder)
            if match and folder == step_name(int(match["step"])):
                keys = {name: sizes[f"{prefix}/{folder}/{name}"] for name in names}
                copies.append(self._look(int(match["step"]), keys))
        return sorted(copies, key=lambda copy: copy.step)

    def check_owner(self, run_id: str) -> None:
        """Raise `UserError` when another run's copies lie here, before the first step.

        A storage that is away, or takes longer than five seconds, is not an error: each synchronization asks again.
        """
        found: list[RemoteCopy] = []
        adapters: list[Manifest | None] = []

        def look() -> None:
            with contextlib.suppress(Exception):
                found.extend(self.scan())
                adapters.append(self.adapter_manifest())

        thread = threading.Thread(target=look, name="trietune-owner", daemon=True)
        thread.start()
        thread.join(_LONGEST_LOOK_S)
        self.check_copies(run_id, list(found))
        for adapter in adapters:
            self.check_adapter(run_id, adapter)

    def check_adapter(self, run_id: str, found: Manifest | None) -> None:
        """Raise `UserError` for the final adapter of another run."""
        if found is not None and found.info.run_id != run_id:
            raise self._foreign("the adapter", found.info.run_id, run_id)

    def check_copies(self, run_id: str, copies: Sequence[RemoteCopy]) -> None:
        """Raise `UserError` for copies of another run; nothing of theirs is ever overwritten or removed."""
        for copy in copies:
            if copy.manifest and copy.manifest.info.run_id != run_id:
                raise self._foreign(step_name(copy.step), copy.manifest.info.run_id, run_id)

    def _foreign(self, name: str, theirs: str, ours: str) -> UserError:
        return UserError(
            f"{self.location} holds {'the adapter' if name == 'the adapter' else 'checkpoints'} of another run",
            where=f"{name} there belongs to run {theirs[:12]}, this is run {ours[:12]}",
            next_step="give this run another `wandb_run_name` or `remote_path`",
        )

    def find_run_id(self) -> str | None:
        """Whose copies these are, for a run directory that is still empty.

        Raises:
            UserError: the storage cannot be read, so it is unknown.
        """
        with self.needed_now():
            found = next((copy.manifest for copy in reversed(self.scan()) if copy.manifest), None)
        found = found or self.adapter_manifest()
        return found.info.run_id if found is not None else None

    def adapter_manifest(self) -> Manifest | None:
        """That of the final adapter's copy; None if there is none, or one that cannot be believed.

        Raises:
            UserError: the storage cannot be read, so it is unknown.
        """
        key = f"{self.name}/adapter/{MANIFEST_NAME}"
        with self.needed_now():
            if key not in self._try(lambda: self.storage.list(f"{self.name}/adapter")):
                return None
            try:
                found = manifest.parse(self._try(lambda: self.storage.get(key, manifest.MAX_MANIFEST_BYTES + 1)))
            except (FileNotFoundError, manifest.ManifestError):
                return None
        return found if found.info.kind == "adapter" else None

    @contextmanager
    def needed_now(self) -> Iterator[None]:
        """Raise storage errors as `UserError`: the caller cannot continue without it."""
        try:
            yield
        except (UserError, DamagedDirectory):
            raise
        except Exception as error:
            raise UserError(
                f"{self.location} cannot be read: {attempts.describe(error)}",
                where="`load_from_storage: True` resumes from the copies there",
                next_step="try again when it can be reached, or `load_from_storage: False` to resume from this disk",
                exit_code=EXIT_RESUME_REFUSED,
            ) from error

    def upload(self, path: Path) -> None:
        """Copy a checkpoint or the final adapter; a copy of the same bytes is left as it is.

        Raises:
            DamagedDirectory: the local directory is not whole, so it is not worth a copy.
            Exception: the storage's last word, see `retry`.
        """
        local = directory.verify_directory(path).manifest
        prefix = self._prefix(path)
        sizes = self._try(lambda: self.storage.list(prefix))
        expected = {f"{prefix}/{name}": entry.size for name, entry in local.files.items()}
        text = manifest.serialize(local)
        key = f"{prefix}/{MANIFEST_NAME}"
        payload = [(f"{prefix}/{name}", path / name) for name in sorted(local.files)]
        if key in sizes:
            same = self._try(lambda: self.storage.get(key, len(text) + 1)) == text
            if same and expected == {name: sizes.get(name) for name in expected}:
                return
        if self.storage.is_atomic:
            self._try(lambda: self.storage.put([*payload, (key, path / MANIFEST_NAME)]))
            return
        if key in sizes:
            # Otherwise the old manifest would vouch for a mixture while the new payload arrives.
            self._try(lambda: self.storage.delete([key]))
        for source in payload:
            self._try(lambda source=source: self.storage.put([source]))  # type: ignore[misc]  # bound per turn
        self._try(lambda: self._check_arrived(prefix, expected, payload))
        self._try(lambda: self.storage.put([(key, path / MANIFEST_NAME)]))

    def download(self, copy: RemoteCopy) -> tuple[Manifest, dict[str, bytes]]:
        """The verified bytes of a copy. Raises `DamagedDirectory` when they are not those that were uploaded."""
        where = Path(step_name(copy.step))
        if copy.manifest is None or copy.damage:
            raise DamagedDirectory(where, MANIFEST_NAME, copy.damage or "is missing")
        contents = {}
        for name, entry in copy.manifest.files.items():
            contents[name] = self._fetch(where, name, entry)
        return copy.manifest, contents

    def remove(self, step: int) -> None:
        """Remove a copy, its manifest first."""
        prefix = f"{self.name}/checkpoints/{step_name(step)}"
        keys = self._try(lambda: self.storage.list(prefix))
        first = f"{prefix}/{MANIFEST_NAME}"
        order = sorted(keys, key=lambda key: (key != first, key))
        self._try(lambda: self.storage.delete(order))

    def discard_unfinished(self) -> int:
        """Drop the invisible remains of killed uploads of this run."""
        return self._try(lambda: self.storage.discard_unfinished(self.name))

    def upload_plain(self, paths: list[Path]) -> None:
        """Copy files of the run directory that have no manifest, such as `metrics.jsonl`, for people to read."""
        for path in paths:
            self._try(lambda path=path: self.storage.put([(f"{self.name}/{path.name}", path)]))  # type: ignore[misc]

    def _try(self, action: Callable[[], Result]) -> Result:
        return attempts.retry(action, self.policy)

    def _prefix(self, path: Path) -> str:
        return f"{self.name}/checkpoints/{path.name}" if STEP_NAME.fullmatch(path.name) else f"{self.name}/{path.name}"

    def _look(self, step: int, keys: Mapping[str, int]) -> RemoteCopy:
        if MANIFEST_NAME not in keys:
            return RemoteCopy(step, None, keys, "its upload did not finish")
        key = f"{self.name}/checkpoints/{step_name(step)}/{MANIFEST_NAME}"
        try:
            text = self._try(lambda: self.storage.get(key, manifest.MAX_MANIFEST_BYTES + 1))
            found = manifest.parse(text)
        except FileNotFoundError:
            return RemoteCopy(step, None, keys, "it was removed a moment ago")
        except manifest.ManifestError as error:
            return RemoteCopy(step, None, keys, f"its manifest is refused: {error}")
        if found.info.step != step or found.info.kind != "checkpoint":
            return RemoteCopy(step, found, keys, f"its manifest says {found.info.kind} of step {found.info.step:,}")
        for name, entry in found.files.items():
            if keys.get(name) != entry.size:
                return RemoteCopy(step, found, keys, f"{name} has {keys.get(name, 0):,} of {entry.size:,} bytes")
        return RemoteCopy(step, found, keys)

    def _fetch(self, where: Path, name: str, entry: FileEntry) -> bytes:
        # A cut connection can look like a short file, so wrong bytes are asked for once more before they are believed.
        key = f"{self.name}/checkpoints/{where.name}/{name}"
        data = b""
        for _ in range(2):
            try:
                data = self._try(lambda: self.storage.get(key, entry.size + 1))
            except FileNotFoundError as error:
                raise DamagedDirectory(where, name, "is missing in the storage") from error
            except Exception as error:
                if not attempts.is_wrong_content(error):
                    raise
                raise DamagedDirectory(where, name, "differs from the checksum that the storage keeps of it") from error
            if len(data) == entry.size and hashlib.sha256(data).hexdigest() == entry.sha256:
                return data
        if len(data) != entry.size:
            raise DamagedDirectory(where, name, f"has {len(data):,} of {entry.size:,} bytes in the storage")
        raise DamagedDirectory(where, name, "does not hold the bytes that were uploaded (its SHA-256 differs)")

    def _check_arrived(self, prefix: str, expected: Mapping[str, int], payload: list[tuple[str, Path]]) -> None:
        sizes = self.storage.list(prefix)
        wrong = [source for source in payload if sizes.get(source[0]) != expected[source[0]]]
        if wrong:
            self.storage.put(wrong)
            raise UploadDamaged(f"{len(wrong)} files did not arrive whole")
