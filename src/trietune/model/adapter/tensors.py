"""PyTorch tensors as the bytes of a safetensors file, and back, without safetensors' own file writing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from trietune.io.directory import FileContent, LazyContent
from trietune.io.safetensors import RawTensor, parse, pieces, serialize, size_bytes

_SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.uint8: "U8",
}  # fmt: skip
_TORCH_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_DTYPES.items()}
_METADATA = {"format": "pt"}
# Up to here a file is made in memory at once; a larger one, such as one with a whole embedding, is not there twice.
STREAMED_ABOVE_BYTES = 64 * 2**20
_PIECE_BYTES = 16 * 2**20


def tensors_to_content(tensors: Mapping[str, torch.Tensor]) -> FileContent:
    """A whole safetensors file, as bytes or, if it is large, in pieces of the live tensors as they are written.

    Equal tensors give equal bytes.
    """
    raw = {name: to_raw(tensor) for name, tensor in tensors.items()}
    num_bytes = size_bytes(raw, metadata=_METADATA)
    if num_bytes <= STREAMED_ABOVE_BYTES:
        return serialize(raw, metadata=_METADATA)
    return LazyContent(num_bytes, lambda: pieces(raw, metadata=_METADATA))


def bytes_to_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the host. Raises `TensorError` for what is not one."""
    found = {}
    for name, raw in parse(data)[0].items():
        found[name] = torch.empty(raw.shape, dtype=_TORCH_DTYPES[raw.dtype])
        copy_into(found[name], raw)
    return found


def to_raw(tensor: torch.Tensor) -> RawTensor:
    """The tensor's bytes, taken from where it lives when they are written."""
    return RawTensor(_SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), lambda: _pieces_of(tensor))


def copy_into(live: torch.Tensor, raw: RawTensor) -> None:
    """Overwrite `live`, of the same shape, with the numbers of `raw`, some rows at a time."""
    dtype = _TORCH_DTYPES[raw.dtype]
    data = np.frombuffer(raw.to_buffer(), dtype=np.uint8)
    rows = live.detach().unsqueeze(0) if live.ndim == 0 else live.detach()
    row_bytes = max(1, rows.shape[1:].numel() * dtype.itemsize)
    rows_at_once = max(1, _PIECE_BYTES // row_bytes)
    for begin in range(0, len(rows) if live.numel() else 0, rows_at_once):
        part = rows[begin : begin + rows_at_once]
        # A copy, for torch wants memory that it may write to.
        copied = data[begin * row_bytes : (begin + len(part)) * row_bytes].copy()
        part.copy_(torch.from_numpy(copied).view(dtype).view(part.shape))


def _pieces_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().contiguous().view(-1)
    for piece in torch.split(flat, _PIECE_BYTES // tensor.element_size()):
        yield piece.cpu().view(torch.uint8).numpy().data
