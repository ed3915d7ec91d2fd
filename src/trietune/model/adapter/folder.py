"""The files of an adapter on disk, read without trust: plain files, of the size that they should have."""

from __future__ import annotations

import math
from pathlib import Path

from trietune.errors import UserError
from trietune.io import strict_json
from trietune.io.safetensors import ITEM_BYTES, MAX_HEADER_BYTES, MAX_TENSORS, TensorError
from trietune.model.adapter.config import CONFIG_FILE, MAX_CONFIG_BYTES

WEIGHTS_FILE = "adapter_model.safetensors"
# An adapter of rank 256 on every layer of a 70B model has 7 GB; what is larger is no adapter of ours.
MAX_WEIGHTS_BYTES = 16 * 2**30


def read_adapter(folder: Path) -> dict[str, bytes]:
    """The adapter's two files, each read once. Raises `UserError` if one is absent, no plain file, or too large."""
    return {
        CONFIG_FILE: read_plain_file(folder, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES),
        WEIGHTS_FILE: read_plain_file(folder, WEIGHTS_FILE, max_bytes=MAX_WEIGHTS_BYTES),
    }


def read_plain_file(folder: Path, name: str, *, max_bytes: int) -> bytes:
    """The bytes of `folder/name`. Raises `UserError`, without opening what would wait for ever, such as a pipe."""
    return _plain_file(folder, name, max_bytes=max_bytes).read_bytes()


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by name, from the header of the weights alone.

    Raises:
        UserError: no plain file there, or one too large.
        TensorError: the header is none, or does not describe a file of this size.
    """
    path = _plain_file(folder, WEIGHTS_FILE, max_bytes=MAX_WEIGHTS_BYTES)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise TensorError(f"its header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
        text = file.read(length)
    if text.count(b'"data_offsets"') > MAX_TENSORS or text.count(b":") > 5 * MAX_TENSORS:
        raise TensorError(f"it names more than the {MAX_TENSORS:,} tensors allowed")
    try:
        header = strict_json.parse(text, max_bytes=MAX_HEADER_BYTES)
        header.pop("__metadata__", None)
        sizes = {name: (ITEM_BYTES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}
        num_bytes = sum(item * math.prod(shape) for item, shape in sizes.values())
    except (strict_json.NotStrict, KeyError, TypeError, AttributeError) as error:
        raise TensorError(f"its header cannot be read ({error})") from error
    if 8 + length + num_bytes != path.stat().st_size:
        raise TensorError(
            f"its header describes {num_bytes:,} bytes, the file has {path.stat().st_size - 8 - length:,}"
        )
    return {name: shape for name, (_, shape) in sizes.items()}


def _plain_file(folder: Path, name: str, *, max_bytes: int) -> Path:
    path = folder / name
    if not path.is_file():
        raise UserError(
            f"`{folder}` holds no adapter: {name} is {'no plain file' if path.exists() else 'missing'}",
            next_step="give the folder of an adapter, such as runs/NAME/adapter",
        )
    if (size_bytes := path.stat().st_size) > max_bytes:
        raise UserError(f"`{path}` has {size_bytes:,} bytes; an adapter's has {max_bytes:,} at most")
    return path
