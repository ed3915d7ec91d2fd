"""Changes to disk, as a dozen functions over one system call each.

Nothing in `trietune.checkpoints` opens a file for writing, renames or removes by other means. So a test can record what
a save does, lay out every state that a power cut could leave, or make the n-th call fail, by replacing the functions
here. Callers therefore write `files.rename(...)`, never `from files import rename`.

New files and folders get the modes that the umask leaves (0666 and 0777 before it), so other users and servers read
an adapter as they read any file of this user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

# What file systems say, network ones and FUSE, that cannot flush a folder; all other errors are real.
_NO_SUCH_OPERATION = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def make_folder(path: Path) -> None:
    """Create one folder; its parent must exist, the folder must not."""
    path.mkdir(mode=0o777)


def create_file(path: Path) -> int:
    """Open a file that does not exist yet for writing and return its descriptor; links are never followed."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`; the kernel may take it in parts."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while view:
        written = os.write(descriptor, view)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepted no byte")
        view = view[written:]


def flush(descriptor: int) -> None:
    """Return only when the file's bytes are on the device.

    A failure is never retried: Linux marks the pages clean after a failed fsync, so a second call succeeds although
    the bytes are gone. The caller drops what it was writing and starts a new file.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves the bytes in the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Close a descriptor of `create_file`."""
    os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Return only when the folder's entries (creations, renames, removals) are on the device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SUCH_OPERATION:
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name on the same file system, at once."""
    source.rename(target)


def remove_file(path: Path) -> None:
    """Remove one name; a link goes, what it points to stays."""
    path.unlink()


def remove_folder(path: Path) -> None:
    """Remove one empty folder."""
    path.rmdir()


def open_lock(path: Path) -> int:
    """Open, creating it if needed, the file that carries a run's lock; links are never followed."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def open_folder(path: Path) -> int:
    """Open a folder, to lock it and to know it again wherever it is moved."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def rewrite_lock(descriptor: int, data: bytes) -> None:
    """Replace what the lock file says about its holder; never flushed, for it means nothing after a crash."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)


# What follows is made of the functions above.


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Create `path`, write its pieces one after another, and flush it; the folder still needs its flush."""
    descriptor = create_file(path)
    try:
        for piece in pieces:
            write(descriptor, piece)
        flush(descriptor)
    finally:
        close(descriptor)


def hidden_sibling(purpose: str, target: Path) -> Path:
    """A name that is not taken, beside `target`, of the form `.<purpose>-<name>-<random>`."""
    return target.with_name(f".{purpose}-{target.name}-{secrets.token_hex(6)}")


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in place of `path` so that a reader, or a crash, finds the old or the new bytes whole."""
    staging = hidden_sibling("staging", path)
    try:
        write_file(staging, [data])
        rename(staging, path)
    except BaseException:
        discard(staging)
        raise
    flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Flush a file that another part writes, such as `metrics.jsonl`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Create `path` and the parents that are missing, each flushed into its parent."""
    missing = []
    current = path
    while not current.is_dir():
        missing.append(current)
        current = current.parent
    for folder in reversed(missing):
        try:
            make_folder(folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
        flush_folder(folder.parent)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of `folders` that are empty, in order; what holds something stays."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            remove_folder(folder)


def remove_tree(path: Path) -> None:
    """Remove a file, a link, or a folder with all below it; never follows a link out of the folder."""
    if path.is_symlink() or not path.is_dir():
        remove_file(path)
        return
    for entry in _entries(path):
        remove_tree(entry)
    remove_folder(path)


def discard(path: Path) -> None:
    """Remove what an unfinished write left, as far as the disk lets us; the next start cleans up the rest."""
    try:
        if os.path.lexists(path):
            remove_tree(path)
    except OSError:
        return


def _entries(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    return (folder / name for name in names)
