"""Every state that a power cut may leave, worked out from the operations that `trietune.io.files` was asked for.

A file system keeps what was flushed. Of the rest it may keep any part in any order: each change of a folder that
came after that folder's last flush is kept or lost, and a file's bytes after its last flush are there, missing,
there by half, zeros of the right size, or there in some blocks of 4 KiB alone. A `World` replays the recorded
operations on made-up inodes up to a crash and enumerates those states; `lay_out` puts one on a real disk, where the
real reader looks at it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trietune.io import files

BLOCK = 4096
Tree = dict[str, bytes | None]


@dataclass(frozen=True)
class Operation:
    """One call, with paths relative to the root; `ack` is not a call but the moment at which something is promised."""

    name: str
    path: str = ""
    target: str = ""
    data: bytes = b""
    promise: Any = None


@contextmanager
def recording(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Operation]]:
    """Note each call of `files` below `root` that changes the disk, in order, while it is carried out."""
    operations: list[Operation] = []
    paths: dict[int, str] = {}

    def relative(path: Path) -> str:
        return path.relative_to(root).as_posix()

    def wrap(name: str, note: Callable[..., Operation]) -> None:
        real = getattr(files, name)

        def recorded(*arguments: Any) -> Any:
            result = real(*arguments)
            if name == "create_file":
                paths[result] = relative(arguments[0])
            operations.append(note(*arguments))
            return result

        patch.setattr(files, name, recorded)

    with monkeypatch.context() as patch:
        wrap("make_folder", lambda path: Operation("mkdir", relative(path)))
        wrap("create_file", lambda path: Operation("create", relative(path)))
        wrap("write", lambda fd, data: Operation("write", paths[fd], data=bytes(data)))
        wrap("flush", lambda fd: Operation("fsync", paths.get(fd, "")))
        wrap("close", lambda fd: Operation("close", paths.pop(fd, "")))
        wrap("flush_folder", lambda path: Operation("fsyncdir", relative(path)))
        wrap("rename", lambda source, target: Operation("rename", relative(source), relative(target)))
        wrap("remove_file", lambda path: Operation("unlink", relative(path)))
        wrap("remove_folder", lambda path: Operation("rmdir", relative(path)))
        yield operations


@dataclass
class Inode:
    """A folder's entries or a file's bytes, as the device has them and as the running system sees them."""

    is_folder: bool
    entries: dict[str, int] = field(default_factory=dict)
    kept_entries: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, int | None, str | None]] = field(default_factory=list)
    data: bytes = b""
    kept_data: bytes = b""


class World:
    """Inodes after some operations; what existed before the recording counts as flushed."""

    def __init__(self, root: Path) -> None:
        self.inodes: dict[int, Inode] = {}
        self.root = self._load(root)

    def _load(self, path: Path) -> int:
        number = len(self.inodes)
        if path.is_dir():
            self.inodes[number] = inode = Inode(True)
            for entry in sorted(path.iterdir()):
                inode.entries[entry.name] = self._load(entry)
            inode.kept_entries = dict(inode.entries)
        else:
            data = path.read_bytes()
            self.inodes[number] = Inode(False, data=data, kept_data=data)
        return number

    def _find(self, path: str) -> int:
        number = self.root
        for name in [] if path == "." else path.split("/"):
            number = self.inodes[number].entries[name]
        return number

    def _parent(self, path: str) -> tuple[Inode, str]:
        folder, _, name = path.rpartition("/")
        return self.inodes[self._find(folder or ".")], name

    def apply(self, operation: Operation) -> None:
        match operation.name:
            case "mkdir" | "create":
                folder, name = self._parent(operation.path)
                number = len(self.inodes)
                self.inodes[number] = Inode(operation.name == "mkdir")
                folder.entries[name] = number
                folder.pending.append((name, number, None))
            case "write":
                self.inodes[self._find(operation.path)].data += operation.data
            case "fsync":
                if operation.path:
                    inode = self.inodes[self._find(operation.path)]
                    inode.kept_data = inode.data
            case "fsyncdir":
                inode = self.inodes[self._find(operation.path)]
                inode.kept_entries, inode.pending = dict(inode.entries), []
            case "unlink" | "rmdir":
                folder, name = self._parent(operation.path)
                del folder.entries[name]
                folder.pending.append((name, None, None))
            case "rename":
                source, old = self._parent(operation.path)
                target, new = self._parent(operation.target)
                number = source.entries.pop(old)
                target.entries[new] = number
                if source is target:
                    source.pending.append((new, number, old))
                else:
                    target.pending.append((new, number, None))
                    source.pending.append((old, None, None))

    def states(self, randomness: random.Random, num_random: int) -> Iterator[Tree]:
        """The trees that a crash now may leave, each as {path: bytes, or None for a folder}."""
        changes = [(number, n) for number, inode in self.inodes.items() for n in range(len(inode.pending))]
        unflushed = [n for n, inode in self.inodes.items() if not inode.is_folder and inode.data != inode.kept_data]
        whole = {number: self.inodes[number].data for number in unflushed}
        for kept in _subsets(changes, randomness, num_random):
            yield self._tree(kept, whole)
            for number in unflushed:
                for data in _partial(self.inodes[number]):
                    yield self._tree(kept, {**whole, number: data})
            if unflushed:
                yield self._tree(kept, {number: self.inodes[number].kept_data for number in unflushed})

    def _tree(self, kept: frozenset[tuple[int, int]], data: dict[int, bytes]) -> Tree:
        tree: Tree = {}

        def walk(number: int, path: str) -> None:
            inode = self.inodes[number]
            if not inode.is_folder:
                tree[path] = data.get(number, inode.kept_data)
                return
            if path:
                tree[path] = None
            entries = dict(inode.kept_entries)
            for index, (name, child, old) in enumerate(inode.pending):
                if (number, index) not in kept:
                    continue
                if old is not None:
                    entries.pop(old, None)
                if child is None:
                    entries.pop(name, None)
                else:
                    entries[name] = child
            for name, child in entries.items():
                walk(child, f"{path}/{name}" if path else name)

        walk(self.root, "")
        return tree


def _subsets(
    changes: list[tuple[int, int]], randomness: random.Random, num_random: int
) -> Iterator[frozenset[tuple[int, int]]]:
    """Every subset of up to six changes; of more all, none, each alone, all but each, and random ones."""
    if len(changes) <= 6:
        for size in range(len(changes) + 1):
            yield from map(frozenset, itertools.combinations(changes, size))
        return
    choices = [frozenset(changes), frozenset()]
    choices += [frozenset({change}) for change in changes]
    choices += [frozenset(changes) - {change} for change in changes]
    choices += [frozenset(change for change in changes if randomness.random() < 0.5) for _ in range(num_random)]
    yield from dict.fromkeys(choices)


def _partial(inode: Inode) -> Iterator[bytes]:
    size = len(inode.data)
    yield inode.kept_data
    yield inode.data[: size // 2]
    yield bytes(size)
    blocks = [inode.data[begin : begin + BLOCK] for begin in range(0, size, BLOCK)]
    for kept in itertools.product([False, True], repeat=len(blocks)) if 1 < len(blocks) <= 3 else []:
        yield b"".join(block if is_kept else bytes(len(block)) for block, is_kept in zip(blocks, kept, strict=True))


def lay_out(tree: Tree, folder: Path) -> None:
    """Put a state on disk below an empty folder."""
    for path, data in tree.items():
        if data is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)


def crashes(
    world: World, operations: list[Operation], *, seed: int = 0, num_random: int = 40
) -> Iterator[tuple[int, list[Any], Tree]]:
    """Each distinct (position, promises kept so far, tree) of a crash after each operation, and before the first."""
    randomness = random.Random(seed)
    seen: set[tuple[int, frozenset[tuple[str, bytes | None]]]] = set()
    promises: list[Any] = []
    for position, operation in enumerate(itertools.chain([Operation("start")], operations)):
        if operation.name == "ack":
            promises.append(operation.promise)
        else:
            world.apply(operation)
        for tree in world.states(randomness, num_random):
            key = (len(promises), frozenset(tree.items()))
            if key not in seen:
                seen.add(key)
                yield position, list(promises), tree
