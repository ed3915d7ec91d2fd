"""Tensors as safetensors bytes, without torch: at once or in pieces, and parsed without trust.

    8 bytes    length of the header, little-endian
    header     {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}
    data       the tensors one after another, without gaps

The safetensors package writes and reads the same bytes, but only whole: its reader copies every tensor, and its writer
needs all of them on the host, so a trained embedding would be in memory twice. Nor does it refuse repeated names, names
with slashes, or a header of a million entries. Here a large file goes out and comes back in pieces, and the header is
checked before the data are touched.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from trietune.io import strict_json

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_NAME_BYTES = 512
# One system call for so many small tensors.
_GATHERED_BYTES = 4 * 2**20

_NUMPY_DTYPES = {
    "F64": "<f8", "I64": "<i8", "U64": "<u8", "F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2", "I16": "<i2",
    "U16": "<u2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES_OF_NUMPY = {np.dtype(text): name for name, text in _NUMPY_DTYPES.items()}
_TENSOR_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]+")


class TensorError(ValueError):
    """The bytes are not tensors as we write them; the message names the tensor and the reason."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as bytes: `dtype` in the format's own words (`F32`, `BF16`, ...), row-major, little-endian.

    `data` may be a function that gives the bytes in pieces, called when they are written, so that of a large tensor
    that lives elsewhere (on a device) only a piece at a time is copied.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | Callable[[], Iterable[bytes | memoryview]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def to_buffer(self) -> bytes | memoryview:
        """All bytes in one."""
        return b"".join(self.data()) if callable(self.data) else self.data

    def to_numpy(self) -> np.ndarray[Any, Any]:
        """A read-only array over the same bytes; BF16 and the eight-bit floats come as their bit patterns, unsigned."""
        raw_dtype = _NUMPY_DTYPES.get(self.dtype) or f"<u{ITEM_BYTES[self.dtype]}"
        array = np.frombuffer(self.to_buffer(), dtype=raw_dtype).reshape(self.shape)
        array.flags.writeable = False
        return array


def from_numpy(array: np.ndarray[Any, Any], *, dtype: str | None = None) -> RawTensor:
    """A tensor of an array; `dtype="BF16"` says what unsigned 16-bit patterns mean."""
    name = dtype or _NAMES_OF_NUMPY.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise TensorError(f"NumPy's {array.dtype} has no name in safetensors")
    if ITEM_BYTES[name] != array.dtype.itemsize:
        raise TensorError(f"{name} has {ITEM_BYTES[name]} bytes per item, NumPy's {array.dtype} {array.dtype.itemsize}")
    plain = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return RawTensor(name, array.shape, plain.reshape(-1).view(np.uint8).data)


def serialize(tensors: Mapping[str, RawTensor], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a `.safetensors` file. Raises `TensorError` for what `parse` would refuse."""
    return b"".join(_pieces(tensors, metadata))


def pieces(
    tensors: Mapping[str, RawTensor], *, metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The same bytes as `serialize` in pieces: small tensors together, large ones as they come."""
    small: list[bytes | memoryview] = []
    num_small = 0
    for piece in _pieces(tensors, metadata):
        num_bytes = memoryview(piece).nbytes
        if small and num_small + num_bytes > _GATHERED_BYTES:
            yield b"".join(small)
            small, num_small = [], 0
        if num_bytes > _GATHERED_BYTES:
            yield piece
        else:
            small.append(piece)
            num_small += num_bytes
    yield b"".join(small)


def size_bytes(tensors: Mapping[str, RawTensor], *, metadata: Mapping[str, str] | None = None) -> int:
    """How many bytes `serialize` and `pieces` give."""
    return len(_header(_in_order(tensors), metadata)) + sum(tensor.size_bytes for tensor in tensors.values())


def parse(data: bytes) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Tensors (views into `data`, nothing is copied) and metadata. Raises `TensorError` at the first oddity."""
    start = 8 + _header_length(data[:8], len(data))
    view = memoryview(data)[start:]
    entries, metadata = _parse_header(data[8:start], len(view))
    return {name: RawTensor(one.dtype, one.shape, view[one.begin : one.end]) for name, one in entries.items()}, metadata


def read_shapes(file: BinaryIO, num_bytes: int) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by name, from the header of a file of `num_bytes`. Raises `TensorError` as `parse` does."""
    length = _header_length(file.read(8), num_bytes)
    entries, _ = _parse_header(file.read(length), num_bytes - 8 - length)
    return {name: one.shape for name, one in entries.items()}


def check_names(found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise `TensorError` that counts and names what is missing and what is too many, unless the names agree."""
    found, expected = set(found), set(expected)
    parts = []
    for word, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            shown = ", ".join(f"`{name}`" for name in sorted(names)[:3])
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            parts.append(f"{len(names):,} {word}: {shown}{more}")
    if parts:
        raise TensorError(f"its tensors are not those of this model ({'; '.join(parts)})")


def _pieces(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None) -> Iterable[bytes | memoryview]:
    if sys.byteorder != "little":
        raise TensorError("this machine is big-endian, and the format is little-endian")
    ordered = _in_order(tensors)
    yield _header(ordered, metadata)
    for name, tensor in ordered:
        num_bytes = 0
        for piece in tensor.data() if callable(tensor.data) else [tensor.data]:
            num_bytes += memoryview(piece).nbytes
            yield piece
        if num_bytes != tensor.size_bytes:
            raise TensorError(f"`{name}` has {num_bytes:,} bytes, its shape says {tensor.size_bytes:,}")


def _in_order(tensors: Mapping[str, RawTensor]) -> list[tuple[str, RawTensor]]:
    # Wide items first, then by name, as safetensors does: every tensor is then aligned to its own items.
    for name, tensor in tensors.items():
        _check_name(name)
        if tensor.dtype not in ITEM_BYTES or len(tensor.shape) > MAX_DIMENSIONS:
            raise TensorError(f"`{name}` is {tensor.dtype} with {len(tensor.shape)} dimensions")
    return sorted(tensors.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0]))


def _header(ordered: Sequence[tuple[str, RawTensor]], metadata: Mapping[str, str] | None) -> bytes:
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, tensor in ordered:
        end = begin + tensor.size_bytes
        document[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _header_length(start: bytes, num_bytes: int) -> int:
    """From the first eight bytes of a file of `num_bytes`."""
    if num_bytes < 10:
        raise TensorError(f"it has {num_bytes} bytes, too few for a header")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise TensorError(f"its header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
    if 8 + length > num_bytes:
        raise TensorError(f"its header claims {length:,} bytes, the file has {num_bytes:,}")
    return length


def _parse_header(text: bytes, num_data_bytes: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    # Counted before parsing: a million tiny entries would cost a gigabyte of Python objects.
    if text.count(b'"data_offsets"') > MAX_TENSORS or text.count(b":") > 5 * MAX_TENSORS:
        raise TensorError(f"it names more than the {MAX_TENSORS:,} tensors allowed")
    try:
        header = strict_json.parse(text, max_bytes=MAX_HEADER_BYTES)
    except strict_json.NotStrict as error:
        raise TensorError(f"its header: {error}") from error
    if not isinstance(header, dict):
        raise TensorError("its header is not an object")
    metadata = _check_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise TensorError(f"it names {len(header):,} tensors, more than the {MAX_TENSORS:,} allowed")
    entries = {name: _check_entry(name, entry, num_data_bytes) for name, entry in header.items()}
    _check_no_gaps(entries, num_data_bytes)
    return entries, metadata


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorError("its metadata values are not text")
    return metadata


def _check_name(name: str) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise TensorError(f"{name[:80]!r} holds half a character") from error
    if length > MAX_NAME_BYTES or not _TENSOR_NAME.fullmatch(name) or ".." in name:
        raise TensorError(f"{name[:80]!r} is not a tensor's name")


def _check_entry(name: str, entry: object, num_bytes: int) -> _Entry:
    _check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TensorError(f"`{name}` is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise TensorError(f"`{name}` has the dtype {str(dtype)[:80]!r}, which is not supported")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(size) for size in shape):
        raise TensorError(f"`{name}` has a shape that is not a short list of counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise TensorError(f"`{name}` has data_offsets that are not two counts")
    begin, end = offsets
    if not begin <= end <= num_bytes:
        raise TensorError(f"`{name}` lies at {begin:,} to {end:,} of {num_bytes:,} bytes")
    if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise TensorError(f"`{name}` has {end - begin:,} bytes, which does not match its shape and dtype")
    return _Entry(dtype, tuple(shape), begin, end)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_no_gaps(entries: Mapping[str, _Entry], num_bytes: int) -> None:
    position = 0
    for name, one in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end, item[0])):
        if one.begin != position:
            raise TensorError(f"`{name}` begins at byte {one.begin:,}, the one before ends at {position:,}")
        position = one.end
    if position != num_bytes:
        raise TensorError(f"{num_bytes - position:,} bytes after the last tensor belong to no tensor")
