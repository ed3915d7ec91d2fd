"""What the cache folder holds, who uses it, and what nobody has used for long.

    data/tokens, data/groups   tokens and groups of a data set     made again from the data
    data/reference             scores of a reference               computed again
    gguf                       converted GGUF files                made again from the file
    sample                     the sample model                    fetched again

An entry's own time is that of its last use: whoever reads one sets it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trietune.io.cache_folder import cache_folder
from trietune.io.files import remove_tree

SECONDS_PER_DAY = 86_400
KEPT_DAYS = 30
# Folders of the cache whose entries are one thing each, with what these are.
KINDS: Mapping[str, str] = {
    "data/tokens": "tokens of a data set",
    "data/groups": "order of a data set by common beginnings",
    "data/reference": "scores of a reference",
    "gguf": "a converted GGUF file",
    "sample": "the sample model",
}
_USED_BY: Mapping[str, str] = {
    "data/tokens": "train, evaluate: the same data, tokenizer and prompt",
    "data/groups": "train: the same data with `group_by_prefix`",
    "data/reference": "train: the same preferences and base model",
    "gguf": "`model_name` of that .gguf file, and the sample model",
    "sample": "`model_name: smollm2-135m-instruct`",
}


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One thing in the cache.

    Attributes:
        kind: key of `KINDS`, or the name of a folder that is not known.
        about: which one, if it says so.
        used: when it was read or written last, in seconds since the epoch.
    """

    path: Path
    kind: str
    size_bytes: int
    used: float
    about: str = ""

    @property
    def what(self) -> str:
        return f"{KINDS.get(self.kind, 'not known')}{f': {self.about}' if self.about else ''}"

    @property
    def used_by(self) -> str:
        return _USED_BY.get(self.kind, "not known")

    def days_unused(self, now: float) -> float:
        return max(0.0, now - self.used) / SECONDS_PER_DAY


def list_cache(folder: Path | None = None) -> list[CacheEntry]:
    """All entries, the largest first of each kind."""
    root = folder or cache_folder()
    entries = [_entry(path, kind) for path, kind in _places(root)]
    return sorted(entries, key=lambda entry: (entry.kind, -entry.size_bytes, entry.path))


def prune_cache(
    entries: Sequence[CacheEntry], *, days: float = KEPT_DAYS, now: float | None = None
) -> list[CacheEntry]:
    """Remove what nothing used for `days`, and return it. An entry that a process has open stays readable to it."""
    now = time.time() if now is None else now
    old = [entry for entry in entries if entry.days_unused(now) >= days]
    for entry in old:
        remove_tree(entry.path)
    return old


def _places(root: Path) -> Iterator[tuple[Path, str]]:
    for folder in _children(root):
        name = folder.name
        inner = _children(folder) if name == "data" else [folder]
        for group in inner:
            kind = f"data/{group.name}" if name == "data" else name
            # What is being made has a name that begins with a dot.
            yield from ((entry, kind) for entry in _children(group) if not entry.name.startswith("."))


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _entry(path: Path, kind: str) -> CacheEntry:
    size, used = 0, 0.0
    for file in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]:
        try:
            found = file.lstat()
        except OSError:
            continue
        if not file.is_dir():
            size += found.st_size
        used = max(used, found.st_mtime)
    return CacheEntry(path, kind, size, used, _about(path, kind))


def _about(path: Path, kind: str) -> str:
    if kind != "data/tokens":
        return ""
    try:
        notes = json.loads((path / "meta.json").read_text("utf-8"))["notes"]
        return f"{notes['source']}, {int(notes['kept']):,} examples"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
