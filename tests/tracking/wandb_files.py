"""Read W&B's binary run file (`run-<id>.wandb`) back, independently of how it was written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

HEADER_BYTES = 7
BLOCK_BYTES = 32_768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> list[Any]:
    """Every record of the file, in order. The file is a LevelDB log: blocks of 32 KiB of (crc, length, kind, data)."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    records, parts, place = [], [], HEADER_BYTES
    while place + HEADER_BYTES <= len(content):
        if BLOCK_BYTES - place % BLOCK_BYTES < HEADER_BYTES:
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER_BYTES])
        if kind == 0:
            break
        parts.append(content[place + HEADER_BYTES : place + HEADER_BYTES + length])
        place += HEADER_BYTES + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
            parts = []
    return records


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    """The logged values, one dictionary a call of `log`."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def only_run_file(directory: Path) -> Path:
    found = sorted(directory.glob("wandb/*run-*/*.wandb"))
    assert len(found) == 1, found
    return found[0]
