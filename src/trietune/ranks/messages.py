"""What processes tell each other, as bytes: plain values, and errors. JSON and raw bytes, never pickle.

[length of the JSON | JSON | bytes of the first blob | bytes of the second ...]
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from trietune.errors import EXIT_BUG, StopRequested, UserError
from trietune.io.json_types import JsonObject

_BLOB, _PATH = "$bytes", "$path"


class FailedElsewhere(UserError):  # noqa: N818  (an event, not an error of its own)
    """Another process failed and has said so; this one ends with the same exit code and adds nothing."""


def encode(value: object) -> bytes:
    """`value` as bytes: None, booleans, numbers, text, bytes, paths, and lists, tuples, dictionaries of these."""
    blobs: list[bytes] = []
    text = json.dumps(_plain(value, blobs)).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def decode(message: bytes) -> Any:
    """The value that was encoded; tuples come back as lists."""
    length = struct.unpack_from("<Q", message)[0]
    begin = 8 + length
    return _restored(json.loads(message[8:begin]), memoryview(message)[begin:])


def encode_error(error: BaseException) -> JsonObject:
    """What another process needs to end in the same way."""
    if isinstance(error, StopRequested):
        return {"kind": "stop", "signal": error.signal_name, "exit_code": error.exit_code}
    if isinstance(error, UserError):
        return {
            "kind": "user",
            "what": error.what,
            "where": error.where,
            "next_step": error.next_step,
            "exit_code": error.exit_code,
        }
    return {"kind": "bug", "what": f"{type(error).__name__}: {error}"}


def error_elsewhere(found: JsonObject, who: str) -> Exception:
    """The exception with which a process ends after another one, `who`, reported `found`."""
    if found["kind"] == "stop":
        return StopRequested(found["signal"], found["exit_code"])
    if found["kind"] == "user":
        return FailedElsewhere(
            found["what"], where=found["where"], next_step=found["next_step"], exit_code=found["exit_code"]
        )
    return FailedElsewhere(f"{who} failed: {found['what']}", exit_code=EXIT_BUG)


def _plain(value: object, blobs: list[bytes]) -> object:
    if isinstance(value, bytes):
        begin = sum(len(blob) for blob in blobs)
        blobs.append(value)
        return {_BLOB: [begin, len(value)]}
    if isinstance(value, Path):
        return {_PATH: str(value)}
    if isinstance(value, dict):
        return {key: _plain(item, blobs) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, blobs) for item in value]
    return value


def _restored(value: object, blobs: memoryview) -> object:
    if isinstance(value, dict):
        if value.keys() == {_BLOB}:
            begin, length = value[_BLOB]
            return bytes(blobs[begin : begin + length])
        if value.keys() == {_PATH}:
            return Path(value[_PATH])
        return {key: _restored(item, blobs) for key, item in value.items()}
    return [_restored(item, blobs) for item in value] if isinstance(value, list) else value
