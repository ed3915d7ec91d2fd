"""A directory that is whole or absent, whatever stops the process or the machine.

    write_directory(.../step-00000050)
        mkdir   .staging-step-00000050-3f9ac1d20b7e         a sibling, so that the rename stays on one file system
        write   adapter_config.json, ...       flush each    hashed in memory on their way, never read back
        write   manifest.json                  flush         last: size and SHA-256 of all the others
        flush   .staging-step-00000050-3f9ac1d20b7e          its entries
        rename  .staging-...  ->  step-00000050              at once
        flush   its parent                                   now it is acknowledged

Readers read each file once, check it against the manifest, and hand out those bytes: nothing can change between the
check and the use, and no file is memory-mapped (a mapped file that shrinks kills the process).
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from trietune.errors import UserError
from trietune.io import disk_errors, files, manifest
from trietune.io.manifest import MANIFEST_NAME, FileEntry, Manifest, ManifestInfo

STAGING = re.compile(r"\.staging-(?P<name>.+)-[0-9a-f]{12}")
REPLACED = re.compile(r"\.replaced-(?P<name>.+)-[0-9a-f]{12}")
REMOVED = re.compile(r"\.removed-(?P<name>.+)-[0-9a-f]{12}")
DAMAGED = re.compile(r"\.damaged-(?P<name>.+)-(?P<number>[0-9]+)")

# Room beyond the bytes themselves: blocks of the folder, the journal, and other writers at the same time.
SPARE_BYTES = 1 * 2**20
_CHUNK_BYTES = 4 * 2**20


class DamagedDirectory(Exception):  # noqa: N818  (a state of a directory, not a failure of ours)
    """A directory is not whole: `file` inside it is to blame, and `reason` is how a sentence about it continues."""

    def __init__(self, directory: Path, file: str, reason: str) -> None:
        super().__init__(f"{directory.name} is not whole: {file} {reason}")
        self.directory = directory
        self.file = file
        self.reason = reason


@dataclass(frozen=True, slots=True)
class LazyContent:
    """A file that is too large to be in memory a second time: its size, and what gives its bytes piece by piece."""

    size_bytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]


FileContent = bytes | LazyContent


@dataclass(frozen=True, slots=True)
class WrittenDirectory:
    """A directory that is on disk for good; `moved_aside` is what stood in its place and was damaged."""

    path: Path
    manifest: Manifest
    moved_aside: Path | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """A directory whose every listed byte was read and fits; `extra` names files that the manifest does not know."""

    path: Path
    manifest: Manifest
    extra: tuple[str, ...] = ()


def write_directory(target: Path, contents: Mapping[str, FileContent], *, info: ManifestInfo) -> WrittenDirectory:
    """Write `contents` as the directory `target`, whole or not at all.

    Args:
        target: its parent must exist. What stands there already is replaced when it is whole, and moved to
            `.damaged-<name>-<n>` beside it when it is not.
        contents: by file name.
        info: what the manifest says beside the files.

    Raises:
        SaveFailed: the disk refused, or free space would not do. `target` is then what it was before.
    """
    try:
        return _write_directory(target, contents, info)
    except OSError as error:
        raise disk_errors.save_failed(error, target) from error


def _write_directory(target: Path, contents: Mapping[str, FileContent], info: ManifestInfo) -> WrittenDirectory:
    check_space(target.parent, sum(_size_of(content) for content in contents.values()))
    staging = files.hidden_sibling("staging", target)
    try:
        files.make_folder(staging)
        entries = {name: _write_one(staging / name, content) for name, content in contents.items()}
        written = Manifest(info=info, files=entries)
        files.write_file(staging / MANIFEST_NAME, [manifest.serialize(written)])
        files.flush_folder(staging)
        moved_aside = _make_room(target)
        files.rename(staging, target)
    except BaseException:
        files.discard(staging)
        raise
    files.flush_folder(target.parent)
    if moved_aside is not None and REPLACED.fullmatch(moved_aside.name):
        files.discard(moved_aside)
        moved_aside = None
    _check_arrived(target, written)
    return WrittenDirectory(target, written, moved_aside)


def verify_directory(directory: Path, *, without: Collection[str] = ()) -> Verified:
    """Read every byte that the manifest names, in pieces, and compare; files in `without` may differ, or be gone.

    Raises `DamagedDirectory`.
    """
    found = read_manifest(directory)
    for name, entry in found.files.items():
        if name in without:
            continue
        with _open_listed(directory, name, entry) as file:
            digest = hashlib.sha256()
            while piece := file.read(_CHUNK_BYTES):
                digest.update(piece)
        _check_digest(directory, name, entry, digest.hexdigest())
    with os.scandir(directory) as entries:
        extra = sorted(entry.name for entry in entries if entry.name not in found.files and entry.name != MANIFEST_NAME)
    return Verified(directory, found, tuple(extra))


def read_directory(directory: Path, *, without: Collection[str] = ()) -> tuple[Manifest, dict[str, bytes]]:
    """Read each file once and return the bytes that were verified; files named in `without` are left alone.

    Raises `DamagedDirectory`; `UserError` when the files do not fit into the memory that is free.
    """
    found = check_sizes(directory, without=without)
    wanted = {name: entry for name, entry in found.files.items() if name not in without}
    total = sum(entry.size for entry in wanted.values())
    if total > psutil.virtual_memory().available:
        raise UserError(
            f"{directory.name} holds {total:,} bytes, more than the memory that is free",
            where=str(directory),
            next_step="close other programs, or continue on a machine with more memory",
        )
    contents = {}
    for name, entry in wanted.items():
        with _open_listed(directory, name, entry) as file:
            data = file.read(entry.size)
        _check_digest(directory, name, entry, hashlib.sha256(data).hexdigest())
        contents[name] = data
    return found, contents


def read_manifest(directory: Path) -> Manifest:
    """Only the manifest, believed by its own digest. Raises `DamagedDirectory`."""
    if directory.is_symlink() or not directory.is_dir():
        raise DamagedDirectory(directory, "it", "is not a folder" if os.path.lexists(directory) else "is not there")
    with _open_plain(directory, MANIFEST_NAME) as file:
        data = file.read(manifest.MAX_MANIFEST_BYTES + 1)
    try:
        return manifest.parse(data)
    except manifest.ManifestError as error:
        raise DamagedDirectory(directory, MANIFEST_NAME, f"is refused: {error}") from error


def check_sizes(directory: Path, *, without: Collection[str] = ()) -> Manifest:
    """The quick look: manifest, and each file's kind and size, contents unread. Raises `DamagedDirectory`."""
    found = read_manifest(directory)
    for name, entry in found.files.items():
        if name not in without:
            with _open_listed(directory, name, entry):
                pass
    return found


def remove_directory(directory: Path) -> None:
    """Remove a directory so that no reader ever sees half of it: first the name, for good, then what is inside."""
    hidden = files.hidden_sibling("removed", directory)
    try:
        files.rename(directory, hidden)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _remove_in_place(directory)
        files.flush_folder(directory.parent)
        return
    files.flush_folder(directory.parent)
    files.remove_tree(hidden)


def clean_leftovers(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Finish or undo what a killed process left in `folder` for directories whose names match `name`.

    Call it only under the run's lock. Staging and half-removed directories go; a directory that was to be replaced
    comes back when its successor never arrived. Only our own hidden names are touched. Returns what was dealt with.
    """
    dealt_with = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        replaced = REPLACED.fullmatch(entry.name)
        ours = replaced or STAGING.fullmatch(entry.name) or REMOVED.fullmatch(entry.name)
        if ours is None or not name.fullmatch(ours["name"]):
            continue
        if replaced and not os.path.lexists(folder / replaced["name"]):
            files.rename(entry, folder / replaced["name"])
            files.flush_folder(folder)
        else:
            files.discard(entry)  # what cannot be removed now is in no one's way and is met again at the next start
        dealt_with.append(entry)
    return dealt_with


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError (ENOSPC) when `folder` has no room for so many bytes: better before than in the middle."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        reason = (
            f"{os.strerror(errno.ENOSPC)} ({num_bytes:,} bytes and one megabyte to spare are needed, {free:,} free)"
        )
        raise OSError(errno.ENOSPC, reason, str(folder))


def move_aside(directory: Path) -> Path:
    """Rename a damaged directory to the first free `.damaged-<name>-<n>` beside it and return that path."""
    number = 1
    while os.path.lexists(aside := directory.with_name(f".damaged-{directory.name}-{number}")):
        number += 1
    rename_directory(directory, aside)
    return aside


def _check_arrived(target: Path, written: Manifest) -> None:
    """Some file systems acknowledge a rename that they have not made: what the folder lists now is what counts."""
    with os.scandir(target.parent) as entries:
        is_listed = any(entry.name == target.name for entry in entries)
    try:
        is_there = is_listed and check_sizes(target).files == dict(written.files)
    except DamagedDirectory:
        is_there = False
    if not is_there:
        raise OSError(errno.ESTALE, "it was written, renamed and acknowledged, but is not there", str(target))


def _rename_folder(source: Path, target: Path) -> None:
    """Rename, or copy where a folder cannot be renamed (one from a lower layer of an overlay), whole or not at all."""
    try:
        files.rename(source, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV or source.is_symlink():
            raise
    staging = files.hidden_sibling("staging", target)
    try:
        files.make_folder(staging)
        for path in sorted(source.iterdir()):
            files.write_file(staging / path.name, [path.read_bytes()])
        files.flush_folder(staging)
        files.rename(staging, target)
    except BaseException:
        files.discard(staging)
        raise
    files.flush_folder(target.parent)
    _remove_in_place(source)


def _remove_in_place(directory: Path) -> None:
    """Remove a folder that cannot be hidden first: its manifest goes first, so it is never taken for whole."""
    if os.path.lexists(directory / MANIFEST_NAME):
        files.remove_file(directory / MANIFEST_NAME)
        files.flush_folder(directory)
    files.remove_tree(directory)


def rename_directory(source: Path, target: Path) -> None:
    """Give a directory another name beside it, for good."""
    _rename_folder(source, target)
    files.flush_folder(target.parent)


def _write_one(path: Path, content: FileContent) -> FileEntry:
    digest, size = hashlib.sha256(), 0

    def hashed() -> Iterator[bytes | memoryview]:
        nonlocal size
        for piece in [content] if isinstance(content, bytes) else content.pieces():
            digest.update(piece)
            size += memoryview(piece).nbytes
            yield piece

    files.write_file(path, hashed())
    if size != _size_of(content):
        raise ValueError(f"{path.name} has {size:,} bytes, {_size_of(content):,} were promised")
    return FileEntry(size, digest.hexdigest())


def _size_of(content: FileContent) -> int:
    return len(content) if isinstance(content, bytes) else content.size_bytes


def _make_room(target: Path) -> Path | None:
    if not os.path.lexists(target):
        return None
    try:
        verify_directory(target)
    except DamagedDirectory:
        return move_aside(target)
    aside = files.hidden_sibling("replaced", target)
    rename_directory(target, aside)
    return aside


@contextmanager
def _open_plain(directory: Path, name: str) -> Iterator[BinaryIO]:
    # O_NONBLOCK: opening a FIFO would wait for a writer for ever; the kind is checked on the open descriptor.
    try:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DamagedDirectory(directory, name, "is missing") from error
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else f"cannot be opened ({error.strerror})"
        raise DamagedDirectory(directory, name, reason) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedDirectory(directory, name, "is not a plain file")
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        try:
            yield io.BufferedReader(file)
        except OSError as error:
            raise DamagedDirectory(directory, name, f"cannot be read ({error.strerror})") from error


@contextmanager
def _open_listed(directory: Path, name: str, entry: FileEntry) -> Iterator[BinaryIO]:
    with _open_plain(directory, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            raise DamagedDirectory(directory, name, f"has {size:,} of {entry.size:,} bytes")
        yield file


def _check_digest(directory: Path, name: str, entry: FileEntry, sha256: str) -> None:
    if sha256 != entry.sha256:
        raise DamagedDirectory(directory, name, "does not hold the bytes that were written (its SHA-256 differs)")
