"""Token sequences on disk: written in blocks, whole or absent, read through memory maps.

    <cache folder>/tokens/<key>/
        input_ids.npy  labels.npy  offsets.npy      see `TokenSequences`
        examples.jsonl  example_ends.npy            the text, one example a line, and where each line ends
        weights.npy                                 of tokens, where there are weights
        row_sizes.npy  grades.npy                   of answers that are compared: how many a row has, how good each is
        meta.json                                   counts, and size and SHA-256 of each file above

The key is made of everything that decides the content, so an entry is never out of date. It is written under another
name and renamed when it is whole. Every file is checked when an entry is opened: a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from trietune.data.encoder import EncodedExamples
from trietune.data.examples import Example, Message, TokenSequences
from trietune.errors import EXIT_USER_ERROR, StopRequested
from trietune.io.cache_folder import mark_used
from trietune.io.json_types import JsonObject

LAYOUT_VERSION = 1
_BUILDING = ".building-"
_ROW_FILES = ("row_sizes.npy", "grades.npy")
_WEIGHTS = "weights.npy"
_FILES = ("input_ids.npy", "labels.npy", "offsets.npy", "examples.jsonl", "example_ends.npy")
# A process killed while building left a folder; no build takes as long as this.
_ABANDONED_AFTER_S = 7 * 24 * 3600
# NumPy's header of a flat array has this size whatever its length is, so it can be written last.
_NPY_HEADER_BYTES = 128


def make_key(**parts: object) -> str:
    """The name of an entry: SHA-256 over JSON of everything that decides its content."""
    text = json.dumps({"layout_version": LAYOUT_VERSION, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def open_cached(cache_folder: Path, key: str) -> tuple[TokenSequences, JsonObject] | None:
    """The sequences of an entry and its notes; None if there is none, or a damaged one, which is then removed."""
    folder = cache_folder / "tokens" / key
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name, recorded in meta["files"].items():
            if (folder / name).stat().st_size != recorded["size"] or _sha256(folder / name) != recorded["sha256"]:
                raise ValueError(name)
        mark_used(folder)
        return _open(folder), meta["notes"]
    except FileNotFoundError:
        if not folder.exists():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


class CacheWriter:
    """Collects blocks of sequences and makes an entry of them; use it as a context manager.

    Leaving the context without `finish` removes what was written.
    """

    def __init__(self, cache_folder: Path, key: str) -> None:
        parent = cache_folder / "tokens"
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        self._final = parent / key
        self._folder = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=parent))
        self._input_ids = _ArrayFile(self._folder / "input_ids.npy", np.dtype("<i4"))
        self._labels = _ArrayFile(self._folder / "labels.npy", np.dtype("<i4"))
        self._offsets = _ArrayFile(self._folder / "offsets.npy", np.dtype("<i8"))
        self._example_ends = _ArrayFile(self._folder / "example_ends.npy", np.dtype("<i8"))
        self._rows: tuple[_ArrayFile, _ArrayFile] | None = None
        self._weights: _ArrayFile | None = None
        self._examples = (self._folder / "examples.jsonl").open("wb")
        self._num_tokens = 0
        self._num_bytes = 0
        self._offsets.append(np.zeros(1, np.int64))

    def append(self, encoded: EncodedExamples, examples: Sequence[Example]) -> None:
        """Add a block: the sequences, and the example that each was made of."""
        self._input_ids.append(encoded.input_ids)
        self._labels.append(encoded.labels)
        if encoded.weights is not None:
            if self._weights is None:
                self._weights = _ArrayFile(self._folder / _WEIGHTS, np.dtype("<f8"))
            self._weights.append(encoded.weights)
        self._offsets.append(self._num_tokens + np.cumsum(encoded.lengths))
        self._num_tokens += int(encoded.lengths.sum())
        lines = [_to_line(example) for example in examples]
        self._examples.write(b"".join(lines))
        ends = self._num_bytes + np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)))
        self._example_ends.append(ends)
        self._num_bytes = int(ends[-1]) if len(ends) else self._num_bytes

    def append_rows(self, sizes: np.ndarray, grades: np.ndarray) -> None:
        """Say which of the sequences of a block are answers of one row: int64 [rows], float64 [sequences]."""
        if self._rows is None:
            sizes_file = _ArrayFile(self._folder / _ROW_FILES[0], np.dtype("<i8"))
            self._rows = (sizes_file, _ArrayFile(self._folder / _ROW_FILES[1], np.dtype("<f8")))
        for file, values in zip(self._rows, (sizes, grades), strict=True):
            file.append(values)

    def view(self) -> TokenSequences:
        """What has been written so far; the last thing to ask for before `finish`."""
        self._close()
        return _open(self._folder)

    def finish(self, notes: JsonObject) -> TokenSequences:
        """Give the entry its name, with `notes` (plain values) in it, and open it."""
        self._close()
        files = {
            name: {"size": (self._folder / name).stat().st_size, "sha256": _sha256(self._folder / name)}
            for name in (*_FILES, *(_ROW_FILES if self._rows else ()), *((_WEIGHTS,) if self._weights else ()))
        }
        (self._folder / "meta.json").write_text(json.dumps({"files": files, "notes": notes}))
        try:
            self._folder.rename(self._final)
        except OSError:
            # Another process has built the same meanwhile; the key says that the content is the same.
            if not (self._final / "meta.json").exists():
                raise
            shutil.rmtree(self._folder)
        return _open(self._final)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _close(self) -> None:
        self._examples.close()
        for array in (self._input_ids, self._labels, self._offsets, self._example_ends, *(self._rows or ())):
            array.close()
        if self._weights is not None:
            self._weights.close()


class _ArrayFile:
    """A flat .npy file that grows; its header, which says how long it is, is written when it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self._file.write(b"\0" * _NPY_HEADER_BYTES)
        self._dtype = dtype
        self._length = 0

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self._length += len(values)

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.seek(0)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        assert self._file.tell() == _NPY_HEADER_BYTES
        self._file.close()


@dataclass(frozen=True, slots=True)
class StoredExamples:
    """Examples as text, read when they are asked for.

    Attributes:
        lines: uint8 [bytes], the file `examples.jsonl`.
        ends: int64 [examples], one past each line.
    """

    lines: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int, /) -> Example:
        fields = self.fields(index)
        return Example(
            id=fields[0],
            prompt=fields[1],
            completion=fields[2],
            answers=tuple(fields[3]) if len(fields) > 3 else (),
            messages=tuple(Message(*message) for message in fields[4]) if len(fields) > 4 else (),
            tools=fields[5] if len(fields) > 5 else "",
        )

    def fields(self, index: int) -> list[Any]:
        """The JSON list of one line."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self.ends[index - 1]) if index else 0
        fields: list[object] = json.loads(self.lines[start : int(self.ends[index])].tobytes())
        return fields


@dataclass(frozen=True, slots=True)
class StoredIds(Sequence[str]):
    """The ids of stored examples."""

    examples: StoredExamples

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return str(self.examples.fields(index)[0])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def _to_line(example: Example) -> bytes:
    fields: list[object] = [example.id, example.prompt, example.completion]
    if example.answers or example.messages:
        fields.append(example.answers)
    if example.messages:
        # What has neither weight nor further keys is written as it always was.
        parts = [
            (one.role, one.content, *((one.weight, one.more) if one.more or one.weight != 1 else ()))
            for one in example.messages
        ]
        fields.append(parts)
    if example.tools:
        fields.append(example.tools)
    # ASCII, so that a lone surrogate in a JSON source survives too.
    return json.dumps(fields).encode() + b"\n"


def _open(folder: Path) -> TokenSequences:
    lines = folder / "examples.jsonl"
    examples = StoredExamples(
        lines=_guarded(np.memmap(lines, np.uint8, mode="r"), lines) if lines.stat().st_size else np.zeros(0, np.uint8),
        ends=_open_array(folder / "example_ends.npy"),
    )
    row_start = grades = None
    if (folder / _ROW_FILES[0]).exists():
        sizes, grades = (_open_array(folder / name) for name in _ROW_FILES)
        row_start = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return TokenSequences(
        input_ids=_open_array(folder / "input_ids.npy"),
        labels=_open_array(folder / "labels.npy"),
        offsets=_open_array(folder / "offsets.npy"),
        ids=StoredIds(examples),
        examples=examples,
        row_start=row_start,
        grades=grades,
        weights=_open_array(folder / _WEIGHTS) if (folder / _WEIGHTS).exists() else None,
    )


def _open_array(path: Path) -> np.ndarray:
    # A file without values cannot be mapped.
    has_values = path.stat().st_size > _NPY_HEADER_BYTES
    array: np.ndarray = np.load(path, mmap_mode="r" if has_values else None, allow_pickle=False)
    return _guarded(array, path) if has_values else array


class _Guarded(np.memmap):
    """A mapped file whose size is looked at before each use.

    A mapped page that lies beyond the end of its file kills the process without a word. Between the look and the use
    lie microseconds; a file that is cut short while a run goes on is seen with the next batch.
    """

    _descriptor: int | None = None
    _path: Path | None = None
    _size = 0

    def __getitem__(self, key: Any) -> Any:
        if self._descriptor is not None and os.fstat(self._descriptor).st_size < self._size:
            raise StopRequested(f"the file {self._path}, which was cut short while it was read,", EXIT_USER_ERROR)
        found = super().__getitem__(key)
        return found.view(np.ndarray) if isinstance(found, np.ndarray) else found


def _guarded(array: np.ndarray, path: Path) -> np.ndarray:
    guarded = array.view(_Guarded)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(guarded, os.close, descriptor)
    guarded._descriptor = descriptor
    guarded._path = path
    guarded._size = os.fstat(descriptor).st_size
    return guarded


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_abandoned(parent: Path) -> None:
    oldest = time.time() - _ABANDONED_AFTER_S
    for folder in parent.glob(f"{_BUILDING}*"):
        try:
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue
