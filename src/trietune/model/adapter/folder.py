"""The files of an adapter on disk, read without trust: plain files, and the bytes that its manifest lists.

Without a manifest, as PEFT writes adapters, there is no telling whether a file is as it was; a line says so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from trietune.errors import UserError
from trietune.io import manifest, safetensors
from trietune.io.manifest import MANIFEST_NAME, FileEntry, ManifestError
from trietune.io.places import real_path
from trietune.model.adapter.config import CONFIG_FILE, MAX_CONFIG_BYTES

WEIGHTS_FILE = "adapter_model.safetensors"
# An adapter of rank 256 on every layer of a 70B model has 7 GB; what is larger is not an adapter of ours.
MAX_WEIGHTS_BYTES = 16 * 2**30
PROMPT_FILE, CHAT_FILE = "prompt_format.json", "chat_template.jinja"
MAX_TEXT_BYTES = 16 * 2**20
# What the numbers of an adapter come from. Its README is for people, who may edit it.
CHECKED_FILES = (CONFIG_FILE, WEIGHTS_FILE, PROMPT_FILE, CHAT_FILE)

Listed = Mapping[str, FileEntry]
"""Size and digest of each file by name, as a manifest lists them."""


def read_listed(folder: Path, report: Callable[[str], None] = lambda text: None) -> Listed | None:
    """What the manifest of an adapter lists; None, after a line to `report`, where there is none.

    Raises:
        UserError: the manifest cannot be believed, or which files are there, or their sizes, is not what it lists.
    """
    if not os.path.lexists(folder / MANIFEST_NAME):
        report(f"{folder} has no {MANIFEST_NAME}, so its files are used unchecked")
        return None
    try:
        listed = manifest.parse(read_plain_file(folder, MANIFEST_NAME, max_bytes=manifest.MAX_MANIFEST_BYTES)).files
    except ManifestError as error:
        raise _not_as_written(folder, MANIFEST_NAME, f"is refused: {error}") from error
    for name in CHECKED_FILES:
        path = folder / name
        if not os.path.lexists(path):
            if name in listed:
                raise _not_as_written(folder, name, "is missing")
        elif name not in listed:
            raise _not_as_written(folder, name, f"is not listed in {MANIFEST_NAME}")
        elif path.is_file() and path.stat().st_size != listed[name].size:
            raise _not_as_written(folder, name, f"has {path.stat().st_size:,} of {listed[name].size:,} bytes")
    return listed


def read_adapter(folder: Path, listed: Listed | None = None) -> dict[str, bytes]:
    """The adapter's two files, each read once.

    Raises:
        UserError: one is absent, no plain file, too large, or not what is `listed`.
    """
    return {
        CONFIG_FILE: read_plain_file(folder, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, listed=listed),
        WEIGHTS_FILE: read_plain_file(folder, WEIGHTS_FILE, max_bytes=MAX_WEIGHTS_BYTES, listed=listed),
    }


def read_plain_file(folder: Path, name: str, *, max_bytes: int, listed: Listed | None = None) -> bytes:
    """The bytes of `folder/name`, which are those that are `listed`, whatever changes the file meanwhile.

    Raises:
        UserError: absent, too large, other bytes, or a file whose opening would wait for ever, such as a pipe.
    """
    data = _plain_file(folder, name, max_bytes=max_bytes).read_bytes()
    if listed is not None and (name not in listed or hashlib.sha256(data).hexdigest() != listed[name].sha256):
        raise _not_as_written(folder, name, "does not hold the bytes that were written (its SHA-256 differs)")
    return data


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by name, from the header of the weights.

    Raises:
        UserError: there is not a plain file, or it is too large.
        TensorError: the header cannot be read, or does not describe a file of this size.
    """
    path = _plain_file(folder, WEIGHTS_FILE, max_bytes=MAX_WEIGHTS_BYTES)
    with path.open("rb") as file:
        return safetensors.read_shapes(file, path.stat().st_size)


def _plain_file(folder: Path, name: str, *, max_bytes: int) -> Path:
    path = folder / name
    if path.is_symlink():
        _check_link(folder, path)
    if not path.is_file():
        raise UserError(
            f"`{folder}` holds no adapter: {name} is {'not a plain file' if path.exists() else 'missing'}",
            next_step="give the folder of an adapter, such as runs/NAME/adapter",
        )
    if (size_bytes := path.stat().st_size) > max_bytes:
        raise UserError(f"`{path}` has {size_bytes:,} bytes; an adapter's has {max_bytes:,} at most")
    return path


def copied_file(folder: Path, name: str) -> Path:
    """`folder/name`, a plain file that may be handed on. Raises `UserError` for a link that leads elsewhere."""
    path = folder / name
    if path.is_symlink():
        _check_link(folder, path)
    if not path.is_file():
        raise UserError(f"`{path}` is not a plain file", next_step="remove it, or put a plain file in its place")
    return path


def _check_link(folder: Path, path: Path) -> None:
    """Refuse a link out of its folder: what it leads to may be no one's business. The hub's cache links to `blobs`."""
    home, target = real_path(folder), real_path(path)
    own = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if target.parent not in own:
        raise UserError(
            f"`{path}` is a link that leads out of its folder, to {target}",
            where="files from elsewhere are neither used nor passed on under this name",
            next_step=f"if you mean that file, copy it: `cp --remove-destination {target} {path}`",
        )


def _not_as_written(folder: Path, name: str, reason: str) -> UserError:
    return UserError(
        f"the adapter in `{folder}` is not as it was written: {name} {reason}",
        next_step="take the adapter from a copy, or from a checkpoint that `trietune verify` finds whole. If you "
        f"changed it on purpose: `cp -RL {folder} NEW && rm NEW/{MANIFEST_NAME}`, then use NEW, read unchecked",
    )
